# SPDX-License-Identifier: Apache-2.0
"""A cgroup v2 directory of the tests' own."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

_numbers = itertools.count()


def find_v2_root() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted, or None."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4].encode().decode("unicode_escape"))
    return None


class Cgroup:
    """A directory below the v2 root, removed again by `remove`."""

    def __init__(self) -> None:
        root = find_v2_root()
        if root is None:
            raise RuntimeError("no cgroup v2 hierarchy is mounted")
        self.path = root / f"splicer-test-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()

    @classmethod
    def adopt(cls, path: Path) -> Cgroup:
        """A directory that is there already."""
        made = cls.__new__(cls)
        made.path = path
        return made

    def add(self, pid: int) -> None:
        """Move a process in; sockets it makes from now on belong to this cgroup."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> list[int]:
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def remove(self, timeout: float = 5.0) -> None:
        """Kill what is still inside and remove the directory.

        Raises OSError if it is still busy after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                self.path.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
