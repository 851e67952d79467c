# SPDX-License-Identifier: Apache-2.0
"""The ready file is there inside the block only, and leads nobody to write elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splicer.daemon.ready import ready_file
from splicer.errors import SplicerError


def test_there_inside_the_block(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.write_text("of a daemon that was killed")
    with ready_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert os.listdir(tmp_path) == ["ready"]
    assert os.listdir(tmp_path) == []


def test_removed_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ready_file(str(tmp_path / "ready")):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_not_wanted() -> None:
    with ready_file(None):
        pass


def test_gone_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    with ready_file(str(path)):
        path.unlink()


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "ready", tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("ready", f"ready.{os.getpid()}"):
        (tmp_path / name).symlink_to(victim)
    with ready_file(str(path)):
        assert not path.is_symlink()
    assert victim.read_text() == "untouched"


def test_no_such_directory(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "ready"
    with pytest.raises(SplicerError, match="cannot write the ready file") as raised, ready_file(str(path)):
        pass
    assert "--ready-file" in (raised.value.hint or "")
