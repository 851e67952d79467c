# SPDX-License-Identifier: Apache-2.0
"""Names for the two parties of a connection, as the daemon tells them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from .query import number, text

FILTERS = ("container", "service", "process")


def name_owner(party: Mapping[str, object]) -> str:
    """The container; else the compose service, pod or cgroup it is of; empty if nothing is known."""
    if pod := text(party, "pod"):
        pod = f"pod/{pod}"
    cgroup = text(party, "cgroup").rstrip("/").rpartition("/")[2]
    return text(party, "container") or text(party, "service") or pod or cgroup


def name_party(party: Mapping[str, object]) -> str:
    """The container, service or pod; else the process, else the cgroup; empty if nothing is known."""
    known = {key: value for key, value in party.items() if key != "cgroup"}
    return name_owner(known) or text(party, "process") or name_owner(party)


def describe_party(party: Mapping[str, object]) -> str:
    """`container/process[pid]`, as far as it is known."""
    owner, process, pid = name_party(party), text(party, "process"), number(party, "pid")
    described = owner if process in ("", owner) else f"{owner}/{process}"
    return f"{described}[{pid}]" if pid and described else described


def matches(party: Mapping[str, object], key: str, patterns: Collection[str]) -> bool:
    """Is `key` (one of FILTERS) of a party one of the names or shell patterns?"""
    value = text(party, key)
    return bool(value) and any(value == pattern or fnmatchcase(value, pattern) for pattern in patterns)
