# SPDX-License-Identifier: Apache-2.0
"""Copies of this source tree: with a change in them, whole, or as it was some commits ago."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from support.daemon import REPOSITORY


def copy_changed(to: Path, path: str, old: str, new: str) -> Path:
    """A copy of what splicer needs to run, in `to`; a text that is once in the file `path` is replaced."""
    for name in ("splicer", "bpf"):
        shutil.copytree(REPOSITORY / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (to / path).read_text()
    assert source.count(old) == 1
    (to / path).write_text(source.replace(old, new))
    return to


def copy_tracked(to: Path) -> Path:
    """What git knows of this tree, as it is now, in the directory `to`. A clone has .git besides."""
    to.mkdir(exist_ok=True)
    files = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, check=True)
    copy = ["xargs", "-0", "cp", "--parents", "--no-dereference", "-t", str(to)]
    subprocess.run(copy, input=files.stdout, cwd=REPOSITORY, check=True)
    return to


def clone(to: Path) -> Path:
    """What whoever clones this repository has, with its last commit, and with what is not committed yet."""
    source = f"file://{REPOSITORY}"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", source, str(to)], check=True)
    return copy_tracked(to)


def list_commits_before(count: int) -> list[str]:
    """Hashes of the `count` commits before this one, the newest first. None in a clone that has but one."""
    command = ["git", "-C", str(REPOSITORY), "rev-list", "--first-parent", "--skip=1", f"--max-count={count}"]
    return subprocess.run([*command, "HEAD"], capture_output=True, text=True, check=True).stdout.split()


def clone_commit(commit: str, to: Path) -> Path:
    """The tree of a commit, with its history, in the new directory `to`; nothing is noted in this one."""
    subprocess.run(
        ["git", "clone", "--quiet", "--shared", "--no-checkout", str(REPOSITORY), str(to)], check=True
    )
    subprocess.run(["git", "-C", str(to), "checkout", "--quiet", "--detach", commit], check=True)
    return to
