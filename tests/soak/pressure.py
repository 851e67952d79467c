# SPDX-License-Identifier: Apache-2.0
"""Bounds on memory, by whatever cgroup controller this machine has where we may use it.

Version 2 throttles a group above `memory.high`. Version 1, on hybrid hosts, has a limit only: a worker that
needs more waits in its page fault until it gets it, since the OOM killer is off unless it is wanted; but what
the kernel needs on its behalf fails with ENOMEM, and a `recv` into new memory with EFAULT. Version 1 can also
bound what TCP sockets hold, which version 2 cannot do apart from the rest.

In version 1 a worker leaves the memory cgroup that it was started in. So that is not done where somebody has
set a limit there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from support.cgroup import Cgroup, V1Cgroup, find_v1
from support.memory import EVERYTHING, Bound, can_bound_sockets, is_limited

NO_LIMIT = "-1"
# How much more than wanted a group is left each time that a limit was refused, and for how long that goes on.
STEP = 1 << 16  # bytes
PATIENCE = 0.5  # seconds


class Pressure:
    """How much memory groups of processes below `root`, a version 2 cgroup of our own, may have."""

    def __init__(self, root: Cgroup, sockets: bool = False) -> None:
        """`by` is "v2", "v1" or empty afterwards, and `why_not` says why it is empty.

        `sockets` is false where the memory of sockets cannot be bounded, or was not asked for: counting it
        costs every connection a little.
        """
        self.by, self.why_not = "", "no memory controller of cgroups"
        self.sockets = False
        self._bounds: dict[str, Bound] = {}
        self._v1: V1Cgroup | None = None
        if "memory" in (root.path / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (root.path / "cgroup.subtree_control").write_text("+memory")
                self.by = "v2"
        found = None if self.by else find_v1("memory")
        if found is None:
            return
        mount, self._home = found
        if is_limited(self._home, mount):
            self.why_not = "this process has a limit of its own (cgroup v1), which its workers would leave"
            return
        # Of the same name, so that support/leftovers.py finds it.
        self._v1 = V1Cgroup(mount / root.path.name, self._home)
        self.by = "v1"
        self.sockets = sockets and can_bound_sockets(self._v1.path)

    def join(self, group: Cgroup, pid: int) -> None:
        """A new worker of a group, before it makes a socket."""
        if self._v1 is not None:
            self._find(group).add(pid)

    def limit(self, group: Cgroup, spare: int, killer: bool = False) -> None:
        """Leave a group so many bytes more than it has; with `killer` (version 1) its OOM killer is on."""
        if self._v1 is None:
            used = int((group.path / "memory.current").read_text())
            (group.path / "memory.high").write_text(str(used + spare))
            return
        bound = self._find(group)
        (bound.path / "memory.oom_control").write_text("0" if killer else "1")
        with contextlib.suppress(OSError):
            bound.leave(spare, EVERYTHING, STEP, PATIENCE)

    def free(self, group: Cgroup) -> None:
        if self._v1 is None:
            (group.path / "memory.high").write_text("max")
        else:
            (self._find(group).path / "memory.limit_in_bytes").write_text(NO_LIMIT)

    def limit_sockets(self, group: Cgroup, spare: int) -> None:
        """Leave a group's TCP sockets so many bytes more than they hold."""
        with contextlib.suppress(OSError):
            self._find(group).leave(spare, step=STEP, timeout=PATIENCE)

    def free_sockets(self, group: Cgroup) -> None:
        self._find(group).free()

    def count_refused(self) -> int:
        """Allocations that did not find memory at once, so far."""
        return sum(int((each.path / "memory.failcnt").read_text()) for each in self._bounds.values())

    def count_killed(self, group: Cgroup) -> int:
        """Processes that the OOM killer has ended, so far."""
        if self.by == "v2":
            return read_field(group.path / "memory.events", "oom_kill")
        return read_field(self._find(group).path / "memory.oom_control", "oom_kill") if self.by else 0

    def remove(self) -> None:
        for each in (*self._bounds.values(), self._v1):
            if each is not None:
                each.remove()

    def _find(self, group: Cgroup) -> Bound:
        assert self._v1 is not None
        name = group.path.name
        if name not in self._bounds:
            self._bounds[name] = Bound(self._v1.path / name, self._home, self.sockets)
        return self._bounds[name]


def read_field(path: Path, name: str) -> int:
    """A number out of a file with a name and a number on each line; 0 if it is not there."""
    fields = dict(line.split() for line in path.read_text().splitlines())
    return int(fields.get(name, 0))
