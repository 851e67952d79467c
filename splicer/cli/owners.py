# SPDX-License-Identifier: Apache-2.0
"""Names for the two owners of a connection, as the daemon tells them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from .query import number, text

FILTERS = ("container", "service", "process")


def name_party(owner: Mapping[str, object]) -> str:
    """The container; else the compose service, pod or cgroup it is of; the process where the cgroup has no
    name; empty if nothing is known. Whatever shows a party begins with this name."""
    if pod := text(owner, "pod"):
        pod = f"pod/{pod}"
    cgroup = text(owner, "cgroup").rstrip("/").rpartition("/")[2]
    return text(owner, "container") or text(owner, "service") or pod or cgroup or text(owner, "process")


def name_owner(owner: Mapping[str, object]) -> str:
    """The party; with the process where its cgroup holds all kinds of them, as that of a login does."""
    party, process = name_party(owner), text(owner, "process")
    is_one_program = any(text(owner, key) for key in ("container", "service", "pod")) or party.endswith(
        ".service"
    )
    return party if is_one_program or process in ("", party) else f"{party}/{process}"


def describe_owner(owner: Mapping[str, object]) -> str:
    """`container/process[pid]`, as far as it is known."""
    party, process, pid = name_party(owner), text(owner, "process"), number(owner, "pid")
    described = party if process in ("", party) else f"{party}/{process}"
    return f"{described}[{pid}]" if pid and described else described


def matches(owner: Mapping[str, object], key: str, patterns: Collection[str]) -> bool:
    """Is `key` (one of FILTERS) of a owner one of the names or shell patterns?"""
    value = text(owner, key)
    return bool(value) and any(value == pattern or fnmatchcase(value, pattern) for pattern in patterns)
