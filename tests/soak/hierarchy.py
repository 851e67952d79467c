# SPDX-License-Identifier: Apache-2.0
"""Version 1 cgroup hierarchies, which hybrid hosts have beside version 2."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


def find_v1(controller: str) -> Path | None:
    """Where a controller of version 1 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        if kind == "cgroup" and controller in options.split(","):
            return Path(before.split()[4])
    return None


def find_home(controller: str, mount: Path) -> Path:
    """The directory that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return mount / path.lstrip("/")
    return mount


def move(pid: int, directory: Path) -> None:
    """Put a process in a directory's group, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        (directory / "cgroup.procs").write_text(str(pid))


def remove_empty(directory: Path, timeout: float = 5.0) -> None:
    """Remove a group whose processes are ending. Raises OSError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            directory.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
