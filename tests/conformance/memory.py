# SPDX-License-Identifier: Apache-2.0
"""Bounds on the socket memory of probes: cgroups below this process's own, if it is in one."""

from __future__ import annotations

from pathlib import Path

from support.cgroup import find_v1, remove_tree
from support.memory import Bound, can_bound_sockets


def make_bound(name: str) -> Bound | None:
    """None where the kernel has nothing to bind with."""
    home = _find_home()
    return Bound(home / name, home) if home else None


def remove_bounds(prefix: str) -> None:
    """Remove what processes that are gone left, by the beginning of its name."""
    home = _find_home()
    for place in home.glob(f"{prefix}*") if home else ():
        remove_tree(place)


def _find_home() -> Path | None:
    found = find_v1("memory")
    return found[1] if found and can_bound_sockets(found[1]) else None
