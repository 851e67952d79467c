# SPDX-License-Identifier: Apache-2.0
"""A bound on the socket memory of some sockets: a version 1 memory cgroup that they are made in."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

PLENTY = 1 << 30
_COUNTER = "memory.kmem.tcp"


class Bound:
    """A directory below this process's own one; `close` takes it away when nobody is in it any more.

    Sockets made (or accepted) inside stay charged to it wherever their process goes. There is room for
    everything until `leave` says how much. Where the kernel has no such hierarchy nothing is bound, and
    `place` is None.
    """

    def __init__(self, name: str) -> None:
        self.place: Path | None = None
        home = _find_home()
        if home is None:
            return
        self.place = home / name
        self.place.mkdir()
        # Only sockets that are made after a limit was written are charged at all.
        self._write(PLENTY)

    def leave(self, count: int = PLENTY) -> bool:
        """So many bytes (rounded down to pages) more can be had than are in use now; False if nothing is
        bound."""
        if self.place is None:
            return False
        deadline = time.monotonic() + 3.0
        while True:
            used = int((self.place / f"{_COUNTER}.usage_in_bytes").read_text())
            try:
                self._write(used + count)
                return True
            except OSError as error:  # more is in use again
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise

    def _write(self, limit: int) -> None:
        assert self.place is not None
        (self.place / f"{_COUNTER}.limit_in_bytes").write_text(str(limit))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What this process makes meanwhile is bound."""
        if self.place is None:
            yield
            return
        (self.place / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.place.parent / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        if self.place is not None:
            self.place.rmdir()
            self.place = None


def remove_bounds(prefix: str) -> None:
    """Remove what processes that are gone left, by the beginning of its name."""
    home = _find_home()
    for place in home.glob(f"{prefix}*") if home else ():
        place.rmdir()


def _find_home() -> Path | None:
    """This process's directory in the version 1 memory hierarchy."""
    own = ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own = path
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if own and kind == "cgroup" and "memory" in options.split(","):
            root, mounted = before.split()[3:5]
            home = Path(mounted) / os.path.relpath(own, root)
            return home if (home / f"{_COUNTER}.limit_in_bytes").exists() else None
    return None
