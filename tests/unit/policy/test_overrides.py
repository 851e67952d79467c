# SPDX-License-Identifier: Apache-2.0
"""Overrides outlive the daemon, and a file that cannot be read is no reason not to start."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from splicer.policy import overrides

from ..conftest import Log


def test_what_was_stored_is_loaded(tmp_path: Path) -> None:
    log = Log()
    overrides.store(str(tmp_path), {"web": "off", "db": "eager"})
    assert overrides.load(str(tmp_path), log) == {"web": "off", "db": "eager"}
    assert log.events == []
    assert stat.S_IMODE((tmp_path / overrides.FILE_NAME).stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [overrides.FILE_NAME]


def test_no_overrides_leave_no_file(tmp_path: Path) -> None:
    overrides.store(str(tmp_path), {"web": "off"})
    overrides.store(str(tmp_path), {})
    assert os.listdir(tmp_path) == []
    overrides.store(str(tmp_path), {})
    assert overrides.load(str(tmp_path), Log()) == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema":2,"overrides":{}}',
        '{"schema":1,"overrides":{"web":"sometimes"}}',
        '{"schema":1,"overrides":[]}',
        '{"schema":1,"overrides":{"web":1}}',
    ],
)
def test_a_broken_file_is_named_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / overrides.FILE_NAME).write_text(content)
    log = Log()
    assert overrides.load(str(tmp_path), log) == {}
    assert log.names() == ["overrides_unreadable"]
    assert (tmp_path / overrides.FILE_NAME).read_text() == content


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides.store(str(tmp_path), {"web": "off"})

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        overrides.store(str(tmp_path), {"web": "eager"})
    assert overrides.load(str(tmp_path), Log()) == {"web": "off"}
    assert os.listdir(tmp_path) == [overrides.FILE_NAME]
