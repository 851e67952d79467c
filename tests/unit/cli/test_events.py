# SPDX-License-Identifier: Apache-2.0
"""`splicer events` against a control server in this process."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from splicer.cli import events
from splicer.daemon.control import Rows, Server
from splicer.errors import SplicerError
from splicer.model import Owner

from ..conftest import Invoke, Log


def event(number: int, type_: str, **fields: Any) -> dict[str, Any]:
    whole = {
        "number": number,
        "time": 1_000_000_000.5,
        "type": type_,
        "reason": "",
        "count": 1,
        "local": "",
        "remote": "",
        "client": None,
        "server": None,
        "detail": {},
    }
    return whole | fields


def owner(name: str) -> dict[str, Any]:
    return dict(vars(Owner(container=name)))


ALL = [
    event(
        1,
        "draining",
        reason="backpressure",
        local="10.0.0.1:4000",
        remote="10.0.0.2:80",
        client=owner("web-1"),
        server=owner("db-1"),
    ),
    event(2, "refused", reason="blocking_reader", count=12),
    event(3, "override", detail={"subjects": ["web"], "mode": "off"}),
    event(4, "missed", count=5),
    event(5, "reload_failed", detail={"error": "bad\x1b[31m value"}),
]


class Daemon:
    """Answers once, then is what comes next in `lives`: another daemon's events, or None for silence."""

    def __init__(self, *lives: list[dict[str, Any]]) -> None:
        self.lives = list(lives)
        self.asked: list[dict[str, Any]] = []
        self.number = 0

    def answer(self, request: dict[str, Any]) -> Rows:
        self.asked.append(request)
        self.number += 1
        if self.number > len(self.lives):
            raise SplicerError("gone")
        head = {"schema": 1, "daemon": str(self.number), "since": 0.0}
        return Rows(head, "events", iter([self.lives[self.number - 1]]), waits=True)


def serve(run_dir: str, log: Log, daemon: Daemon) -> Server:
    return Server(run_dir, {"events": daemon.answer}, log, allowed_uid=os.getuid())


@pytest.fixture
def daemon(run_dir: str, log: Log) -> Iterator[Daemon]:
    made = Daemon(ALL)
    with serve(run_dir, log, made):
        yield made


def test_lines(invoke: Invoke, run_dir: str, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("events", "--run-dir", run_dir)
    assert done.code == 0
    lines = [line[21:] for line in done.stdout.splitlines()]
    assert lines == [
        "draining           web-1 -> db-1 (10.0.0.1:4000 -> 10.0.0.2:80)  backpressure",
        "refused            blocking_reader  12 connections",
        "override           subjects=web  mode=off",
        "missed             5 events",
        "reload_failed      error=bad?[31m value",
    ]
    assert daemon.asked[0]["limit"] == 100


def test_json(invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
    done = invoke("events", "--json", "--limit", "0", "--run-dir", run_dir)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"schema": 1, **each} for each in ALL]
    assert daemon.asked[0]["limit"] == 0


def test_nothing(invoke: Invoke, run_dir: str, log: Log) -> None:
    with serve(run_dir, log, Daemon([])):
        assert invoke("events", "--run-dir", run_dir).stdout == "Nothing has happened yet.\n"


def test_following_a_daemon_that_goes_and_comes_back(run_dir: str, log: Log) -> None:
    first, second = [event(1, "started"), event(2, "paused")], [event(1, "started")]
    made = Daemon(first, second)
    with serve(run_dir, log, made):
        found = list(itertools.islice(events.follow(run_dir, 7, 1.0, retry=0.01), 5))
    assert [each["type"] for each in found] == [
        "started",
        "paused",
        "daemon_restarted",
        "started",
        "daemon_gone",
    ]
    assert made.asked[0]["limit"] == 7
    assert (made.asked[1]["after"], made.asked[1]["daemon"]) == (2, "1")


def test_following_nobody(run_dir: str) -> None:
    with pytest.raises(SplicerError, match="not running"):
        next(events.follow(run_dir, 7, 1.0))
