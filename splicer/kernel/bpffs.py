# SPDX-License-Identifier: Apache-2.0
"""The BPF file system, where programs, maps and attachments outlive the daemon."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
from collections.abc import Collection

from splicer.errors import SplicerError

STANDARD = "/sys/fs/bpf"
_BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h
_MNT_DETACH = 2
# What CONFIG_BPF_PRELOAD puts into every new mount.
_PRELOADED = frozenset({"maps.debug", "progs.debug"})
_libc = ct.CDLL(None, use_errno=True)


class _StatFs(ct.Structure):
    """First field of struct statfs on 64-bit Linux, and room for the rest."""

    _fields_ = [("f_type", ct.c_long), ("rest", ct.c_char * 248)]


def is_bpffs(path: str) -> bool:
    result = _StatFs()
    failed: int = _libc.statfs(path.encode(), ct.byref(result))
    return not failed and bool(result.f_type == _BPF_FS_MAGIC)


def _nearest_directory(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def find_missing(pin_dir: str) -> str | None:
    """Where a bpffs is to be mounted, so that `pin_dir` can be made on one; None if there is one already.

    Raises SplicerError if it is no place for one."""
    path = os.path.abspath(pin_dir)
    if is_bpffs(_nearest_directory(path)):
        return None
    if os.path.commonpath([path, STANDARD]) == STANDARD and os.path.isdir(STANDARD):
        return STANDARD
    raise SplicerError(
        f"the pin directory is not on a BPF file system ({path})",
        hint=f"use one below {STANDARD}, or: mount -t bpf bpf {os.path.dirname(path)}",
    )


def prepare(pin_dir: str) -> str | None:
    """Make sure that `pin_dir` can be made on a bpffs. Returns the mount point if this had to mount one.

    A host without systemd may have /sys/fs/bpf empty; then it is mounted there, as systemd would.
    """
    missing = find_missing(pin_dir)
    if missing and _libc.mount(b"bpf", missing.encode(), b"bpf", 0, b"mode=0700") != 0:
        raise SplicerError(
            f"cannot mount the BPF file system on {missing}: {os.strerror(ct.get_errno())}",
            hint=f"in a container, mount it from the host: -v {missing}:{missing}",
        )
    return missing


def release(mount_point: str | None) -> None:
    """Unmount what `prepare` mounted, if nobody else has put anything there."""
    if mount_point and is_bpffs(mount_point) and _PRELOADED.issuperset(os.listdir(mount_point)):
        _libc.umount2(mount_point.encode(), _MNT_DETACH)


def remove_tree(pin_dir: str, *, keep_root: bool = False, keep: Collection[str] = ()) -> list[str]:
    """Unpin everything below, and the directory itself unless told; returns the paths removed. Idempotent.

    What is in the directories `keep`, by name, stays, and the directory with it.
    """
    removed = []
    kept = {os.path.join(pin_dir, name) for name in keep}
    for directory, _, names in os.walk(pin_dir, topdown=False):
        if directory in kept:
            continue
        for name in names:
            path = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
                removed.append(path)
        if not (keep_root and directory == pin_dir):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    return removed
