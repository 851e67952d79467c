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

from support.cgroup import Cgroup

from soak.hierarchy import find_home, find_v1, move, remove_empty

PAGE = 4096
UNLIMITED = 1 << 60
NO_LIMIT = "-1"
# Bytes for the sockets of a group. Any limit does; the kernel counts from the first one that is set.
PLENTY = 1 << 34
TRIES = 8


class Pressure:
    """How much memory groups of processes below `root`, a version 2 cgroup of our own, may have."""

    def __init__(self, root: Cgroup, sockets: bool = False) -> None:
        """`by` is "v2", "v1" or empty afterwards, and `why_not` says why it is empty.

        `sockets` is false where the memory of sockets cannot be bounded, or was not asked for: counting it
        costs every connection a little.
        """
        self.by, self.why_not = "", "no memory controller of cgroups"
        self.sockets = False
        self._groups: dict[str, Path] = {}
        self._directory: Path | None = None
        if "memory" in (root.path / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (root.path / "cgroup.subtree_control").write_text("+memory")
                self.by = "v2"
        mount = None if self.by else find_v1("memory")
        if mount is None:
            return
        if is_limited(find_home("memory", mount), mount):
            self.why_not = "this process has a limit of its own (cgroup v1), which its workers would leave"
            return
        # Of the same name, so that support/leftovers.py finds it.
        self._directory = mount / root.path.name
        self._directory.mkdir()
        self.by = "v1"
        self.sockets = sockets and (self._directory / "memory.kmem.tcp.limit_in_bytes").exists()

    def join(self, group: Cgroup, pid: int) -> None:
        """A new worker of a group, before it makes a socket."""
        if self._directory is not None:
            move(pid, self._find(group))

    def limit(self, group: Cgroup, spare: int, killer: bool = False) -> None:
        """Leave a group so many bytes more than it has; with `killer` (version 1) its OOM killer is on."""
        if self._directory is None:
            used = int((group.path / "memory.current").read_text())
            (group.path / "memory.high").write_text(str(used + spare))
            return
        directory = self._find(group)
        (directory / "memory.oom_control").write_text("0" if killer else "1")
        _limit(directory, "memory", spare)

    def free(self, group: Cgroup) -> None:
        if self._directory is None:
            (group.path / "memory.high").write_text("max")
        else:
            (self._find(group) / "memory.limit_in_bytes").write_text(NO_LIMIT)

    def limit_sockets(self, group: Cgroup, spare: int) -> None:
        """Leave a group's TCP sockets so many bytes more than they hold."""
        _limit(self._find(group), "memory.kmem.tcp", spare)

    def free_sockets(self, group: Cgroup) -> None:
        (self._find(group) / "memory.kmem.tcp.limit_in_bytes").write_text(str(PLENTY))

    def count_refused(self) -> int:
        """Allocations that did not find memory at once, so far."""
        return sum(int((each / "memory.failcnt").read_text()) for each in self._groups.values())

    def count_killed(self, group: Cgroup) -> int:
        """Processes that the OOM killer has ended, so far."""
        if self.by == "v2":
            return read_field(group.path / "memory.events", "oom_kill")
        return read_field(self._find(group) / "memory.oom_control", "oom_kill") if self.by else 0

    def remove(self) -> None:
        for directory in (*self._groups.values(), self._directory):
            if directory is not None:
                remove_empty(directory)

    def _find(self, group: Cgroup) -> Path:
        assert self._directory is not None
        directory = self._directory / group.path.name
        if group.path.name not in self._groups:
            directory.mkdir()
            self._groups[group.path.name] = directory
            if self.sockets:
                (directory / "memory.kmem.tcp.limit_in_bytes").write_text(str(PLENTY))
        return directory


def is_limited(directory: Path, mount: Path) -> bool:
    """True if a version 1 memory cgroup or one above it has a limit."""
    while directory != mount and mount in directory.parents:
        if int((directory / "memory.limit_in_bytes").read_text()) < UNLIMITED:
            return True
        directory = directory.parent
    return False


def read_field(path: Path, name: str) -> int:
    """A number out of a file with a name and a number on each line; 0 if it is not there."""
    fields = dict(line.split() for line in path.read_text().splitlines())
    return int(fields.get(name, 0))


def _limit(directory: Path, what: str, spare: int) -> None:
    """A limit below what is used is refused (EBUSY), and what is used changes all the time."""
    for number in range(TRIES):
        used = int((directory / f"{what}.usage_in_bytes").read_text())
        wanted = (used + spare + number * 16 * PAGE) // PAGE * PAGE
        with contextlib.suppress(OSError):
            (directory / f"{what}.limit_in_bytes").write_text(str(wanted))
            return
