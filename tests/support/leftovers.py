# SPDX-License-Identifier: Apache-2.0
"""What test runs that were killed outright could not take away: found by the process id in its name."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path

from support.cgroup import Cgroup, find_v2_root, remove_v1_directories

_NAMED = re.compile(r"(?:spltest|splicer-test)-(\d+)-")
NETNS = Path("/run/netns")


def _is_orphan(name: str) -> bool:
    found = _NAMED.match(name)
    return found is not None and not Path(f"/proc/{found[1]}").exists()


def _children(directory: Path | None) -> list[Path]:
    return sorted(directory.iterdir()) if directory is not None and directory.is_dir() else []


def remove_orphans(temporary: Path) -> list[str]:
    """Remove cgroups, namespaces, mounts and directories of runs that are gone; what was removed."""
    removed = []
    for path in _children(find_v2_root()):
        if path.is_dir() and _is_orphan(path.name):
            Cgroup.adopt(path).remove()
            remove_v1_directories(path.name)
            removed.append(str(path))
    for path in _children(NETNS):
        if _is_orphan(path.name):
            subprocess.run(["ip", "netns", "del", path.name], check=False)
            removed.append(path.name)
    for path in _children(temporary):
        if path.is_dir() and _is_orphan(path.name):
            with contextlib.suppress(OSError):
                subprocess.run(["umount", str(path / "bpffs")], check=False, stderr=subprocess.DEVNULL)
                shutil.rmtree(path)
                removed.append(str(path))
    return removed
