# SPDX-License-Identifier: Apache-2.0
"""Bounds on CPU time, by whatever cgroup controller this machine has where we may use it.

The soak's processes are in a version 2 cgroup of its own. Where version 2 has the controller it is used
there. On a hybrid host it belongs to version 1; a directory of the soak's own there serves as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from support.cgroup import Cgroup, V1Cgroup, find_v1

PERIOD_US = 100_000


class Quota:
    """How much of a CPU groups of processes below `root`, a version 2 cgroup of our own, may have."""

    def __init__(self, root: Cgroup) -> None:
        """`by` is "v2", "v1" or empty afterwards."""
        self._v1: V1Cgroup | None = None
        self.by = ""
        if "cpu" in (root.path / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                (root.path / "cgroup.subtree_control").write_text("+cpu")
                self.by = "v2"
        found = None if self.by else find_v1("cpu")
        if found is not None:
            mount, home = found
            # Of the same name, so that support/leftovers.py finds it.
            self._v1 = V1Cgroup(mount / root.path.name, home)
            self.by = "v1" if (self._v1.path / "cpu.cfs_quota_us").exists() else ""

    def limit(self, group: Cgroup, pids: Iterable[int], share: float) -> None:
        """Give a group so much of one CPU."""
        quota = max(1000, int(PERIOD_US * share))
        if self._v1 is None:
            (group.path / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            return
        (self._v1.path / "cpu.cfs_quota_us").write_text(str(quota))
        for pid in pids:
            self._v1.add(pid)

    def free(self, group: Cgroup) -> None:
        if self._v1 is None:
            (group.path / "cpu.max").write_text(f"max {PERIOD_US}")
            return
        (self._v1.path / "cpu.cfs_quota_us").write_text("-1")
        self._v1.send_home()

    def remove(self) -> None:
        if self._v1 is not None:
            (self._v1.path / "cpu.cfs_quota_us").write_text("-1")
            self._v1.remove()
