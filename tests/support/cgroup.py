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

    def child(self, name: str) -> Cgroup:
        """A directory below this one, removed with it."""
        (self.path / name).mkdir(exist_ok=True)
        return Cgroup.adopt(self.path / name)

    def add(self, pid: int) -> None:
        """Move a process in; sockets it makes from now on belong to this cgroup."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> list[int]:
        """Processes in it and in what is below."""
        return [int(line) for directory in self._tree() for line in _read(directory / "cgroup.procs").split()]

    def _tree(self) -> list[Path]:
        """The directory and those below, the deepest first."""
        return [Path(directory) for directory, _, _ in os.walk(self.path, topdown=False)]

    def remove(self, timeout: float = 5.0) -> None:
        """Kill what is still inside and remove the directory, and those below it.

        Raises OSError if it is still busy after `timeout` seconds.
        """
        for path in [each for each in self.path.iterdir() if each.is_dir()]:
            Cgroup.adopt(path).remove(timeout)
        deadline = time.monotonic() + timeout
        while True:
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                for directory in self._tree():
                    directory.rmdir()
                return
            except FileNotFoundError:
                if not self.path.exists():
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # removed meanwhile
