# SPDX-License-Identifier: Apache-2.0
"""Names for the two owners of a connection, as the daemon tells them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from .query import number, text

FILTERS = ("container", "service", "process")


def name_cgroup_owner(owner: Mapping[str, object]) -> str:
    """The container; else the compose service, pod or cgroup it is of; empty if nothing is known."""
    if pod := text(owner, "pod"):
        pod = f"pod/{pod}"
    cgroup = text(owner, "cgroup").rstrip("/").rpartition("/")[2]
    return text(owner, "container") or text(owner, "service") or pod or cgroup


def name_owner(owner: Mapping[str, object]) -> str:
    """The container, service or pod; else the process, else the cgroup; empty if nothing is known."""
    known = {key: value for key, value in owner.items() if key != "cgroup"}
    return name_cgroup_owner(known) or text(owner, "process") or name_cgroup_owner(owner)


def describe_owner(owner: Mapping[str, object]) -> str:
    """`container/process[pid]`, as far as it is known."""
    name, process, pid = name_owner(owner), text(owner, "process"), number(owner, "pid")
    described = name if process in ("", name) else f"{name}/{process}"
    return f"{described}[{pid}]" if pid and described else described


def matches(owner: Mapping[str, object], key: str, patterns: Collection[str]) -> bool:
    """Is `key` (one of FILTERS) of a owner one of the names or shell patterns?"""
    value = text(owner, key)
    return bool(value) and any(value == pattern or fnmatchcase(value, pattern) for pattern in patterns)
