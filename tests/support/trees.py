# SPDX-License-Identifier: Apache-2.0
"""Copies of this source tree with a change in them."""

from __future__ import annotations

import shutil
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
