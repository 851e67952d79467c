# SPDX-License-Identifier: Apache-2.0
"""Overrides outlive the daemon, and a file that cannot be read is no reason not to start."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from splicer.errors import USAGE, SplicerError
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


@pytest.mark.parametrize(
    ("kind", "text", "key", "words"),
    [
        ("container", "web", "web", "web"),
        ("cgroup", "system.slice/redis.service", "cgroup=system.slice/redis.service", "cgroup system.slice/"),
        ("process", "php-fpm*", "process=php-fpm*", "process php-fpm*"),
        ("port", "8001, 80,8000", "port=80, 8000-8001", "port 80, 8000-8001"),
        ("address", "fd00::/8", "address=fd00::/8", "address fd00::/8"),
    ],
)
def test_subjects(kind: str, text: str, key: str, words: str) -> None:
    subject = overrides.read_subject(kind, text)
    assert subject.key == key
    assert subject.words.startswith(words)
    assert overrides.read_key(key) == subject
    if kind == "port":
        assert subject.rule is not None
        assert subject.rule.ports == (80, 8000, 8001)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("port", "0"),
        ("port", ""),
        ("address", "10.0.0.1/8"),
        ("cgroup", "a/../b"),
        ("process", ""),
        ("x", "y"),
    ],
)
def test_bad_subjects(kind: str, text: str) -> None:
    with pytest.raises(SplicerError) as refusal:
        overrides.read_subject(kind, text)
    assert refusal.value.exit_code == USAGE
    assert refusal.value.hint


def test_a_name_with_an_equals_sign_is_a_name() -> None:
    assert overrides.read_key("a=b") == overrides.Subject("container", "a=b")


def test_a_bad_subject_in_the_file(tmp_path: Path) -> None:
    (tmp_path / overrides.FILE_NAME).write_text('{"schema":1,"overrides":{"port=http":"off"}}')
    log = Log()
    assert overrides.load(str(tmp_path), log) == {}
    assert log.names() == ["overrides_unreadable"]


def test_a_pause_outlives_the_daemon(tmp_path: Path) -> None:
    assert overrides.read_pause(str(tmp_path)) is None
    overrides.store_pause(str(tmp_path), 12.5)
    assert overrides.read_pause(str(tmp_path)) == 12.5
    (tmp_path / overrides.PAUSE_NAME).write_text("?")
    assert overrides.read_pause(str(tmp_path)) is not None, "that it is there is what counts"
    for _ in range(2):
        overrides.store_pause(str(tmp_path), None)
        assert overrides.read_pause(str(tmp_path)) is None
    assert os.listdir(tmp_path) == []
