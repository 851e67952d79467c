# SPDX-License-Identifier: Apache-2.0
"""The tree of cgroup v2 directories: which one has an id, which one is a container's, whose is a path.

The id of a cgroup, which BPF programs see, is the inode number of its directory (Linux, kernfs_id in
include/linux/kernfs.h). It is never given to another cgroup while the host runs. Engines put the container's
id into the directory's name, and Kubernetes the pod's uid:

    /docker/<id>                                    /system.slice/docker-<id>.scope
    /machine.slice/libpod-<id>.scope                /kubepods.slice/.../cri-containerd-<id>.scope
    /kubepods/burstable/pod<uid>/<id>               /kubepods.slice/.../kubepods-burstable-pod<uid>.slice/...
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Walking costs about 50 us for a directory that has others below it and 3 us for one that has none.
_PAUSE_S = 1.0
_SHARE = 0.05
_MOST = 100_000
_MOST_PATTERNS = 16

_CONTAINER = re.compile(r"(?P<before>|.*[^0-9a-f])(?P<id>[0-9a-f]{64})(?P<after>|\.scope)")
_POD = re.compile(
    r"(?:|.*-)pod([0-9a-f]{8})[-_]?([0-9a-f]{4})[-_]?([0-9a-f]{4})[-_]?([0-9a-f]{4})[-_]?([0-9a-f]{12})(?:\.slice)?"
)
_PATTERNS = (
    ("/docker/", ""),
    ("/system.slice/docker-", ".scope"),
    ("/machine.slice/libpod-", ".scope"),
    ("/libpod_parent/libpod-", ""),
)


@dataclass(frozen=True)
class Scope:
    """What a path says: id of the container, uid of the Kubernetes pod, each empty if there is none.

    `outer` are ids of the containers in which that container runs in turn, the nearest first.
    """

    container: str = ""
    pod: str = ""
    outer: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A cgroup: absolute path of its directory, and its id."""

    path: str
    id: int


def read_path(path: str) -> Scope:
    """Container and pod of a cgroup's path, absolute or below the root."""
    containers: list[str] = []
    pod = ""
    for name in path.split("/"):
        if identifier := _read_container(name):
            containers.insert(0, identifier)
        elif match := _POD.fullmatch(name):
            # Names of slices have underscores, because a dash there means a slice above.
            pod = "-".join(match.groups())
    return Scope(containers[0] if containers else "", pod, tuple(containers[1:]))


def _read_container(name: str) -> str:
    match = _CONTAINER.fullmatch(name)
    # libpod-conmon-<id>.scope is where Podman watches over the container, and not the container's.
    return match["id"] if match and not match["before"].endswith("conmon-") else ""


def cut_path(path: str, container_id: str) -> str | None:
    """`path` down to the container's own directory, without what it made inside. None if it is not in it."""
    parts = path.split("/")
    for end, name in enumerate(parts, start=1):
        if _read_container(name) == container_id:
            return "/".join(parts[:end])
    return None


class Scopes:
    """Looks cgroups up in the hierarchy mounted at `root`. May be used by several threads."""

    def __init__(
        self,
        root: str,
        *,
        proc: str = "/proc",
        most: int = _MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root.rstrip("/")
        self._proc = proc
        self._most = most
        self._clock = clock
        self._guard = threading.Lock()
        self._by_id: dict[int, str] = {}
        self._by_container: dict[str, str] = {}
        # Where containers were found: all that an engine starts are alike.
        self._patterns: dict[tuple[str, str], None] = dict.fromkeys(_PATTERNS)
        self._walk_at = -float("inf")

    read_path = staticmethod(read_path)

    def find_path(self, cgroup_id: int) -> str | None:
        """Path below the root, with a leading slash, of the cgroup with this id.

        None if there is none, or if it is younger than the last walk and the next one has to wait (a second,
        longer in a very large tree).
        """
        with self._guard:
            path = self._by_id.get(cgroup_id)
            if path is None and cgroup_id and self._walk():
                path = self._by_id.get(cgroup_id)
            return path

    def find_container(self, container_id: str, pid: int = 0) -> Place | None:
        """The container's own cgroup. `pid` is one of its processes, if known. None if it is not found."""
        below = cut_path(self._read_own_path(pid), container_id) if pid else None
        # Seen from another cgroup namespace the path starts with "..".
        if below and ".." not in below.split("/") and (place := self._look(below)):
            self._learn(place, below)
            return place
        with self._guard:
            patterns = tuple(self._patterns)
        for before, after in patterns:
            below = f"{before}{container_id}{after}"
            if place := self._look(below):
                self._learn(place, below)
                return place
        with self._guard:
            known = self._by_container.get(container_id)
            if known is None or self._look(known) is None:
                self._walk()
                known = self._by_container.get(container_id)
        if known and (place := self._look(known)):
            self._learn(place, known)
            return place
        return None

    def holds(self, place: Place | None, container_id: str, pid: int) -> bool:
        """Is the process with this pid one of the container's, as far as can be seen from here?

        It is not when the pid has been reused, or belongs to another pid namespace.
        """
        if cut_path(self._read_own_path(pid), container_id) is not None:
            return True
        # A container with a cgroup namespace of its own sees itself at "/".
        return place is not None and any(
            pid in self._read_pids(path) for path in (place.path, f"{place.path}/init.scope")
        )

    def _read_own_path(self, pid: int) -> str:
        try:
            with open(f"{self._proc}/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
                for line in file:
                    if line.startswith("0::"):
                        return line[3:].rstrip("\n").removesuffix(" (deleted)")
        except OSError:
            pass
        return ""

    def _read_pids(self, path: str) -> frozenset[int]:
        try:
            with open(f"{path}/cgroup.procs", encoding="ascii") as file:
                return frozenset(int(line) for line in file)
        except (OSError, ValueError):
            return frozenset()

    def _look(self, below: str) -> Place | None:
        path = self._root + below
        try:
            return Place(path, os.stat(path).st_ino)
        except OSError:
            return None

    def _learn(self, place: Place, below: str) -> None:
        match = _CONTAINER.fullmatch(below)
        with self._guard:
            if match:
                self._patterns[match["before"], match["after"]] = None
            while len(self._patterns) > _MOST_PATTERNS:
                del self._patterns[next(iter(self._patterns))]
            # Containers come and go without a walk between.
            if len(self._by_id) >= self._most:
                self._by_id.clear()
            self._by_id[place.id] = below

    def _walk(self) -> bool:
        """Index the tree anew, unless that was done a moment ago. True if it was done."""
        started = self._clock()
        if started < self._walk_at:
            return False
        by_id: dict[int, str] = {}
        by_container: dict[str, str] = {}
        for identifier, below in list_tree(self._root, self._most):
            by_id[identifier] = below
            if container := _read_container(below.rpartition("/")[2]):
                by_container.setdefault(container, below)
        self._by_id, self._by_container = by_id, by_container
        ended = self._clock()
        self._walk_at = ended + max(_PAUSE_S, (ended - started) / _SHARE)
        return True


def list_processes(path: str) -> list[int]:
    """The processes in a cgroup, by its absolute path, and in those below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(path):
        try:
            with open(f"{directory}/cgroup.procs", encoding="ascii") as file:
                found += [int(line) for line in file]
        except (OSError, ValueError):
            continue  # removed meanwhile, or one of threads only
    return found


def list_tree(root: str, most: int) -> Iterator[tuple[int, str]]:
    """Ids and paths below `root` of the cgroups there, at most so many, those further up first. That of
    `root` itself is "/"."""
    try:
        waiting = [""]
        yield os.stat(root or "/").st_ino, "/"
    except OSError:
        return
    count = 1
    for above in waiting:  # grows meanwhile
        try:
            with os.scandir(root + above or "/") as entries:
                found = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # removed meanwhile
        for entry in found:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            below = f"{above}/{entry.name}"
            yield status.st_ino, below
            count += 1
            if count >= most:
                return
            # kernfs counts subdirectories (kernfs_refresh_inode() in fs/kernfs/inode.c).
            if status.st_nlink != 2:
                waiting.append(below)
