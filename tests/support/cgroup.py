# SPDX-License-Identifier: Apache-2.0
"""cgroup directories of the tests' own: of version 2, and of version 1, which hybrid hosts have beside it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_numbers = itertools.count()


def _list_mounts(kind: str) -> Iterator[tuple[list[str], str, Path]]:
    """Options, root and place of what is mounted of this kind."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        mounted, _, options = after.split()[:3]
        if mounted == kind:
            yield options.split(","), root, Path(place.encode().decode("unicode_escape"))


def find_v2_root() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted, or None."""
    return next((place for _, _, place in _list_mounts("cgroup2")), None)


def find_v1(controller: str) -> tuple[Path, Path] | None:
    """Where a controller of version 1 is mounted, and the directory there that this process is in."""
    mounts = [(root, place) for options, root, place in _list_mounts("cgroup") if controller in options]
    if not mounts:
        return None
    root, mount = mounts[0]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controller in controllers.split(","):
            return mount, mount / os.path.relpath(own, root)
    return mount, mount


def list_v1_mounts() -> list[Path]:
    """Where hierarchies of version 1 are mounted; none on a host that has version 2 only."""
    return sorted({place for _, _, place in _list_mounts("cgroup")} - {find_v2_root()})


def make_v1_directories(name: str) -> dict[Path, Path]:
    """Make a directory in each version 1 hierarchy, fit for processes; its path by where that is mounted."""
    made = {mount: mount / name for mount in list_v1_mounts()}
    for mount, path in made.items():
        path.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (mount / setting).exists():  # a new one has none, and takes no process
                (path / setting).write_text((mount / setting).read_text())
    return made


def remove_v1_directories(name: str) -> None:
    """Remove what is under `name` in version 1 hierarchies, of ours or made by others, as dockerd."""
    for place in list_v1_mounts():
        remove_tree(place / name)


def remove_tree(path: Path, empty: Callable[[], None] = lambda: None, timeout: float = 5.0) -> None:
    """Remove a cgroup and those below it, whose processes are ending or made to by `empty`.

    Raises OSError if it is still busy after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while path.exists():
        empty()
        with contextlib.suppress(OSError):
            for directory in _walk(path):
                directory.rmdir()
            return
        if time.monotonic() > deadline:
            raise OSError(f"still busy: {path}")
        time.sleep(0.02)


def _walk(path: Path) -> list[Path]:
    """The directory and those below, the deepest first."""
    return [Path(directory) for directory, _, _ in os.walk(path, topdown=False)]


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
        return [int(line) for each in _walk(self.path) for line in _read(each / "cgroup.procs").split()]

    def remove(self, timeout: float = 5.0) -> None:
        """Kill what is still inside and remove the directory, and those below it.

        Raises OSError if it is still busy after `timeout` seconds.
        """
        for path in [each for each in self.path.iterdir() if each.is_dir()]:
            Cgroup.adopt(path).remove(timeout)
        remove_tree(self.path, self._kill, timeout)

    def _kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class V1Cgroup:
    """A directory of version 1. Who is in it when it is removed goes `home`."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self._home = home
        self.path.mkdir()

    def add(self, pid: int) -> None:
        """Move a process in, if it is still there."""
        _move(pid, self.path)

    def send_home(self) -> None:
        """Move everybody out."""
        for pid in _read(self.path / "cgroup.procs").split():
            _move(int(pid), self._home)

    def remove(self) -> None:
        """Raises OSError if it is still busy after some seconds."""
        remove_tree(self.path, self.send_home)


def _move(pid: int, directory: Path) -> None:
    with contextlib.suppress(ProcessLookupError):
        (directory / "cgroup.procs").write_text(str(pid))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # removed meanwhile
