# SPDX-License-Identifier: Apache-2.0
"""Bounds on memory by cgroups of version 1, which alone can bound what TCP sockets hold and nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from support.cgroup import V1Cgroup

SOCKETS, EVERYTHING = "memory.kmem.tcp", "memory"
# More than any test needs. Any limit does: the kernel counts from the first one that is set.
PLENTY = 1 << 40
UNLIMITED = 1 << 60


def can_bound_sockets(directory: Path) -> bool:
    """Does this kernel count what the sockets of a memory cgroup hold?"""
    return (directory / f"{SOCKETS}.limit_in_bytes").exists()


def is_limited(directory: Path, mount: Path) -> bool:
    """True if a memory cgroup or one above it has a limit."""
    while directory != mount and mount in directory.parents:
        if int((directory / "memory.limit_in_bytes").read_text()) < UNLIMITED:
            return True
        directory = directory.parent
    return False


class Bound(V1Cgroup):
    """A memory cgroup. Sockets that its processes make or accept stay charged to it wherever those go.

    There is room for everything until `leave` says how much.
    """

    def __init__(self, path: Path, home: Path, sockets: bool = True) -> None:
        """`sockets`: theirs are counted, from now on and those that are made from now on."""
        super().__init__(path, home)
        if sockets:
            self.free()

    def leave(self, spare: int = PLENTY, counter: str = SOCKETS, step: int = 0, timeout: float = 3.0) -> None:
        """So many bytes (rounded down to pages) more can be had than are in use now.

        A limit below what is used is refused, and what is used changes all the time. So it is tried again,
        with `step` bytes more each time. Raises OSError if it is still refused after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._write(counter, self.count_used(counter) + spare)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            spare += step

    def free(self, counter: str = SOCKETS) -> None:
        self._write(counter, PLENTY)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What this process makes meanwhile is bound."""
        self.add(os.getpid())
        try:
            yield
        finally:
            self.send_home()

    def count_used(self, counter: str = SOCKETS) -> int:
        """Bytes in use now."""
        return int((self.path / f"{counter}.usage_in_bytes").read_text())

    def _write(self, counter: str, limit: int) -> None:
        (self.path / f"{counter}.limit_in_bytes").write_text(str(limit))
