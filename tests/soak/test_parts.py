# SPDX-License-Identifier: Apache-2.0
"""Small parts: what is read from files of the kernel and of the daemon, and calls that are repeated."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from support.memory import is_limited

from soak.keeper import read_unread
from soak.pressure import read_field
from soak.scarcity import insist

NO_LIMIT = "9223372036854771712\n"


def test_a_limit_of_ones_own_or_of_somebody_above(tmp_path: Path) -> None:
    own = tmp_path / "service" / "job"
    own.mkdir(parents=True)
    for directory in (tmp_path, own.parent, own):
        (directory / "memory.limit_in_bytes").write_text(NO_LIMIT)
    assert not is_limited(own, tmp_path)
    assert not is_limited(tmp_path, tmp_path)
    (own.parent / "memory.limit_in_bytes").write_text("1073741824\n")
    assert is_limited(own, tmp_path)
    (own.parent / "memory.limit_in_bytes").write_text(NO_LIMIT)
    (own / "memory.limit_in_bytes").write_text("1073741824\n")
    assert is_limited(own, tmp_path)


def test_a_field_of_a_file_of_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "memory.oom_control"
    path.write_text("oom_kill_disable 1\nunder_oom 0\noom_kill 3\n")
    assert read_field(path, "oom_kill") == 3
    assert read_field(path, "oom_group_kill") == 0


def test_how_many_a_stop_left_unread(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("")
    assert read_unread(log) == 0
    events = [
        {"event": "ready"},
        {"event": "drained", "unread_connections": 5},
        {"event": "drained", "unread_connections": 2},
        {"event": "stopped"},
    ]
    log.write_text("no JSON\n" + "".join(f"{json.dumps(each)}\n" for each in events))
    assert read_unread(log) == 2


def test_only_want_of_memory_is_tried_again() -> None:
    errors = [OSError(errno.ENOMEM, ""), OSError(errno.ENOBUFS, "")]

    def call(value: int) -> int:
        if errors:
            raise errors.pop()
        return value

    assert insist(call, 7) == 7
    errors.append(PermissionError(errno.EPERM, ""))
    with pytest.raises(PermissionError):
        insist(call, 7)
