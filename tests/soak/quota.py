# SPDX-License-Identifier: Apache-2.0
"""Bounds on CPU time, by whatever cgroup controller this machine has where we may use it.

The soak's processes are in a version 2 cgroup of its own. Where version 2 has the controller it is used
there. On a hybrid host it belongs to version 1; a directory of the soak's own there serves as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from support.cgroup import Cgroup

from soak.hierarchy import find_home, find_v1, move, remove_empty

PERIOD_US = 100_000


class Quota:
    """How much of a CPU groups of processes below `root`, a version 2 cgroup of our own, may have."""

    def __init__(self, root: Cgroup) -> None:
        """`by` is "v2", "v1" or empty afterwards."""
        self._directory: Path | None = None
        self.by = ""
        if "cpu" in (root.path / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (root.path / "cgroup.subtree_control").write_text("+cpu")
                self.by = "v2"
        mount = None if self.by else find_v1("cpu")
        if mount is not None:
            self._home = find_home("cpu", mount)
            # Of the same name, so that support/leftovers.py finds it.
            directory = mount / root.path.name
            directory.mkdir()
            self._directory = directory
            self.by = "v1" if (directory / "cpu.cfs_quota_us").exists() else ""

    def limit(self, group: Cgroup, pids: Iterable[int], share: float) -> None:
        """Give a group so much of one CPU."""
        quota = max(1000, int(PERIOD_US * share))
        if self._directory is None:
            (group.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            return
        (self._directory / "cpu.cfs_quota_us").write_text(str(quota))
        for pid in pids:
            move(pid, self._directory)

    def free(self, group: Cgroup) -> None:
        if self._directory is None:
            (group.path / "cpu.max").write_text(f"max {PERIOD_US}")
            return
        (self._directory / "cpu.cfs_quota_us").write_text("-1")
        for pid in (self._directory / "cgroup.procs").read_text().split():
            move(int(pid), self._home)

    def remove(self) -> None:
        if self._directory is not None:
            (self._directory / "cpu.cfs_quota_us").write_text("-1")
            for pid in (self._directory / "cgroup.procs").read_text().split():
                move(int(pid), self._home)
            remove_empty(self._directory)
