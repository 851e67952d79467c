# SPDX-License-Identifier: Apache-2.0
"""Bounds on CPU time and memory, by whatever cgroup controllers this machine has where we may use them.

The soak's processes are in a version 2 cgroup of its own. Where version 2 has the controllers they are used
there. On a hybrid host the cpu controller belongs to version 1; a directory of the soak's own there serves as
well. Memory is bounded by version 2 only: to be bounded by version 1 a process would have to leave the memory
cgroup that it is in, and with it whatever bound somebody else has put there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from support.cgroup import Cgroup

PERIOD_US = 100_000


def find_v1(controller: str) -> Path | None:
    """Where a controller of version 1 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        if kind == "cgroup" and controller in options.split(","):
            return Path(before.split()[4])
    return None


class Bounds:
    """What can be bounded for groups of processes below `root`, a version 2 cgroup of our own."""

    def __init__(self, root: Cgroup) -> None:
        """`cpu` is "v2", "v1" or empty afterwards, `memory` "v2" or empty."""
        self._v1_directory: Path | None = None
        offered = (root.path / "cgroup.controllers").read_text().split()
        for controller in ("cpu", "memory"):
            if controller in offered:
                with contextlib.suppress(OSError):
                    (root.path / "cgroup.subtree_control").write_text(f"+{controller}")
        enabled = (root.path / "cgroup.subtree_control").read_text().split()
        self.memory = "v2" if "memory" in enabled else ""
        self.cpu = "v2" if "cpu" in enabled else ""
        v1 = None if self.cpu else find_v1("cpu")
        if v1 is not None:
            self._v1_home = v1 / _own_v1_path("cpu").lstrip("/")
            # Of the same name, so that support/leftovers.py finds it.
            directory = v1 / root.path.name
            directory.mkdir()
            self._v1_directory = directory
            self.cpu = "v1" if (directory / "cpu.cfs_quota_us").exists() else ""

    def limit_cpu(self, group: Cgroup, pids: Iterable[int], share: float) -> None:
        """Give a group so much of one CPU."""
        quota = max(1000, int(PERIOD_US * share))
        if self.cpu == "v2":
            (group.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        elif self.cpu == "v1" and self._v1_directory is not None:
            (self._v1_directory / "cpu.cfs_quota_us").write_text(str(quota))
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (self._v1_directory / "cgroup.procs").write_text(str(pid))

    def free_cpu(self, group: Cgroup) -> None:
        if self.cpu == "v2":
            (group.path / "cpu.max").write_text(f"max {PERIOD_US}")
        elif self.cpu == "v1" and self._v1_directory is not None:
            (self._v1_directory / "cpu.cfs_quota_us").write_text("-1")
            for pid in (self._v1_directory / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (self._v1_home / "cgroup.procs").write_text(pid)

    def limit_memory(self, group: Cgroup, spare: int) -> None:
        """Leave a group so many bytes more than it uses; it is throttled and reclaimed from above that."""
        used = int((group.path / "memory.current").read_text())
        (group.path / "memory.high").write_text(str(used + spare))

    def free_memory(self, group: Cgroup) -> None:
        (group.path / "memory.high").write_text("max")

    def remove(self, timeout: float = 5.0) -> None:
        if self._v1_directory is None:
            return
        self.free_cpu(Cgroup.adopt(self._v1_directory))
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._v1_directory.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _own_v1_path(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"
