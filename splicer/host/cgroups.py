# SPDX-License-Identifier: Apache-2.0
"""Finds the cgroup v2 directory that a path given by the operator stands for.

Whether a directory belongs to a cgroup filesystem is told by its device number: /proc/self/mountinfo names
the filesystem type of every device number, and that holds through bind mounts and symbolic links alike
(proc_pid_mountinfo(5)).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from splicer.errors import FAILURE, UNSUPPORTED, SplicerError

CONVENTIONAL_ROOT = "/sys/fs/cgroup"
# The first inode of a kernfs (Linux, kernfs_create_root in fs/kernfs/dir.c).
_ROOT_ID = 1
HINT_HOST_ROOT = "mount the host's /sys/fs/cgroup into this container"
MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Cgroup:
    """A cgroup v2 directory.

    `requested` is the operator's text. `id` is the kernel's cgroup id, which on 64-bit hosts is the
    directory's inode number (Linux, kernfs_id in include/linux/kernfs.h).
    """

    path: str
    requested: str
    id: int

    @property
    def substituted(self) -> bool:
        """True when `path` is not the directory that was asked for, but the v2 mount found in its place."""
        return os.path.abspath(self.requested) != self.path

    @property
    def is_root(self) -> bool:
        """True for the root of the host's hierarchy, and not for that of a cgroup namespace."""
        return self.id == _ROOT_ID

    @property
    def is_a_namespaces_root(self) -> bool:
        """True if the host's root was asked for, and what is there is that of a cgroup namespace."""
        return self.requested == CONVENTIONAL_ROOT and not self.is_root


@dataclass(frozen=True)
class Above:
    """Paths from the topmost cgroup that can be seen down to one; `is_whole` if the topmost is the root of
    the host's hierarchy."""

    paths: tuple[str, ...]
    is_whole: bool


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: the device number, what is mounted on where, and the filesystem type."""

    device: int
    root: str
    point: str
    kind: str


def read_mounts(source: Path = MOUNTINFO) -> list[Mount]:
    """The mounts of this process's mount namespace, in mount order."""
    try:
        lines = source.read_bytes().splitlines()
    except OSError as error:
        raise SplicerError(
            f"cannot read the mount table ({source}: {error.strerror})", hint="mount -t proc proc /proc"
        ) from error
    return [mount for line in lines if (mount := parse_mount(os.fsdecode(line))) is not None]


def parse_mount(line: str) -> Mount | None:
    """One line of mountinfo, or None for a line that is not one."""
    # 41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
    head, dash, tail = line.partition(" - ")
    fields = head.split(" ")
    if not dash or len(fields) < 6:
        return None
    major, colon, minor = fields[2].partition(":")
    if not (colon and major.isdigit() and minor.isdigit()):
        return None
    return Mount(
        os.makedev(int(major), int(minor)), _unescape(fields[3]), _unescape(fields[4]), tail.split(" ")[0]
    )


def _unescape(field: str) -> str:
    # The kernel writes blanks, tabs, newlines and backslashes as three octal digits (mangle() in
    # fs/seq_file.c).
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def find(
    requested: str, *, mountinfo: Path = MOUNTINFO, conventional_root: str = CONVENTIONAL_ROOT
) -> Cgroup:
    """Resolve `requested` to a cgroup v2 directory.

    Raises SplicerError when it is missing, is no directory, or lies in no cgroup v2 hierarchy. Only
    `conventional_root` is ever answered with another directory: everywhere else the operator meant what was
    written.
    """
    path = os.path.abspath(requested)
    mounts = read_mounts(mountinfo)
    unified = find_v2_mount(mounts, conventional_root)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SplicerError(
            f"no such cgroup ({requested})",
            hint=_suggest(path, unified, conventional_root),
            exit_code=FAILURE,
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SplicerError(f"cannot use the cgroup ({requested}: {reason})") from error
    if not stat.S_ISDIR(status.st_mode):
        raise SplicerError(
            f"not a cgroup directory ({requested} is a file)",
            hint=f"name the directory: --cgroup {os.path.dirname(path)}",
        )
    kinds = {mount.kind for mount in mounts if mount.device == status.st_dev}
    if "cgroup2" in kinds:
        return Cgroup(path, requested, status.st_ino)
    if os.path.realpath(path) == os.path.realpath(conventional_root) and unified is not None:
        return Cgroup(unified, requested, os.stat(unified).st_ino)
    if unified is None:
        raise SplicerError(
            f"this host has no cgroup v2 hierarchy mounted ({requested})",
            hint="mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
            exit_code=UNSUPPORTED,
        )
    what = "a cgroup v1 directory" if "cgroup" in kinds else "not in a cgroup filesystem"
    raise SplicerError(
        f"not a cgroup v2 directory ({requested} is {what})", hint=_suggest(path, unified, conventional_root)
    )


def list_above(cgroup: Cgroup) -> Above:
    """The cgroup and those above it, as far as this mount shows them."""
    paths = [cgroup.path]
    top = cgroup.id
    try:
        device = os.stat(cgroup.path).st_dev
        while top != _ROOT_ID and (parent := os.path.dirname(paths[0])) != paths[0]:
            status = os.stat(parent)
            if status.st_dev != device:
                break
            paths.insert(0, parent)
            top = status.st_ino
    except OSError:
        pass  # it has gone
    return Above(tuple(paths), top == _ROOT_ID)


def find_v2_mount(mounts: list[Mount], conventional_root: str = CONVENTIONAL_ROOT) -> str | None:
    """The best cgroup v2 mount point: shows the whole hierarchy, in the usual place, mounted first."""

    def rank(mount: Mount) -> tuple[bool, bool]:
        usual = mount.point == conventional_root or mount.point.startswith(
            conventional_root.rstrip("/") + "/"
        )
        return mount.root != "/", not usual

    for mount in sorted((mount for mount in mounts if mount.kind == "cgroup2"), key=rank):
        # A mount point may be hidden below a later mount, or lie outside a chroot.
        try:
            if os.stat(mount.point).st_dev == mount.device:
                return mount.point
        except OSError:
            continue
    return None


def _suggest(path: str, unified: str | None, conventional_root: str) -> str:
    if unified is None:
        return "list the cgroup v2 mounts with: findmnt -t cgroup2"
    # /sys/fs/cgroup/docker and /sys/fs/cgroup/memory/docker are /sys/fs/cgroup/unified/docker on a hybrid
    # host.
    parts = Path(os.path.relpath(path, conventional_root)).parts
    for start in range(min(2, len(parts))):
        candidate = os.path.join(unified, *parts[start:])
        if parts[0] != os.pardir and candidate != path and os.path.isdir(candidate):
            return f"the cgroup v2 directory of that name is: --cgroup {candidate}"
    return f"the cgroup v2 hierarchy is at {unified}; list it with: find {unified} -type d"
