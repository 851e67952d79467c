# SPDX-License-Identifier: Apache-2.0
"""`splicer explain` for people, and what it asks the daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from splicer.cli import explain
from splicer.daemon.control import Server
from splicer.errors import SplicerError
from splicer.text import Palette

from ..conftest import Invoke, Log

APP = {"container": "shop-app-1", "process": "python3", "pid": 8}
TOLD = {
    "local": "10.0.0.1:40000",
    "remote": "10.99.0.2:80",
    "peer": "10.0.0.2:8080",
    "state": "paired",
    "reason": "rcvlowat",
    "client": APP,
    "server": {},
    "count": 3,
    "verdict": "It is plain TCP: rcvlowat. An end has SO_RCVLOWAT above 1.",
    "checks": [
        {"check": "local", "passed": True, "saw": "both ends are on this host"},
        {"check": "rcvlowat", "passed": False, "saw": "client: SO_RCVLOWAT 3; server: SO_RCVLOWAT 1"},
        {"check": "pending", "passed": None, "saw": "waits for \x1b[2J" + "a moment " * 12},
    ],
    "tried_seconds": 3.0,
    "next": "it is tried again",
    "next_seconds": 65.0,
    "change": ["have the program leave SO_RCVLOWAT at 1", "or not"],
}


class Daemon:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer: Any = {"schema": 1, "asked": "x", "connections": [TOLD], "left_out": 0}

    def explain(self, request: dict[str, Any]) -> Any:
        self.asked.append(dict(request))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def daemon(run_dir: str, log: Log) -> Iterator[Daemon]:
    made = Daemon()
    with Server(run_dir, {"explain": made.explain}, log, allowed_uid=os.getuid()):
        yield made


def test_for_people(invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
    outcome = invoke("explain", "10.0.0.1:40000", "10.0.0.2:80", "--run-dir", run_dir)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines() == [
        "10.0.0.1:40000 -> 10.99.0.2:80 (there 10.0.0.2:8080)",
        "  shop-app-1/python3[8] to ?",
        "  and 2 more of the same kind",
        "",
        "It is plain TCP: rcvlowat. An end has SO_RCVLOWAT above 1.",
        "",
        "ok    local     both ends are on this host",
        "FAIL  rcvlowat  client: SO_RCVLOWAT 3; server: SO_RCVLOWAT 1",
        "?     pending   waits for ?[2Ja moment a moment a moment a moment a moment a",
        "                moment a moment a moment a moment a moment a moment a moment",
        "",
        "tried   last 3.0s ago",
        "next    it is tried again; not before 1m05s from now",
        "change  have the program leave SO_RCVLOWAT at 1",
        "change  or not",
    ]
    assert daemon.asked == [{"command": "explain", "local": "10.0.0.1:40000", "remote": "10.0.0.2:80"}]


def test_json_is_the_answer(invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
    assert invoke("explain", "web", "--json", "--run-dir", run_dir).json() == daemon.answer
    assert daemon.asked == [{"command": "explain", "subject": "web"}]


def test_colours() -> None:
    lines = explain.render({"connections": [TOLD]}, palette=Palette(True))
    assert any(line.startswith("\x1b[31mFAIL\x1b[0m") for line in lines)


@pytest.mark.parametrize("width", [60, 79, 80, 200])
def test_it_fits(width: int) -> None:
    assert max(map(len, explain.render({"connections": [TOLD]}, width=width))) <= width


def test_many_and_none(invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
    daemon.answer = {"schema": 1, "asked": "web", "connections": [TOLD, TOLD], "left_out": 7}
    lines = invoke("explain", "web", "--run-dir", run_dir).stdout.splitlines()
    assert sum(line.startswith("10.0.0.1:40000") for line in lines) == 2
    assert lines[-1] == "And 7 connections of other kinds: splicer flows --summary"
    daemon.answer = {"schema": 1, "asked": "web", "connections": []}
    assert invoke("explain", "web", "--run-dir", run_dir).stdout == "No TCP connections: web.\n"


def test_odd_answers() -> None:
    assert explain.render({"connections": [{}, 5, {"checks": [{}], "change": [1], "tried_seconds": "x"}]})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["10.0.0.1:80"], "only one of two addresses (10.0.0.1:80)"),
        (["a:1", "b:2", "c:3"], "too many of two addresses"),
        (["10.0.0.1", "10.0.0.2:80"], "not an address with a port (10.0.0.1)"),
        (["10.0.0.1:80", "web:80"], "not an address with a port (web:80)"),
        (["10.0.0.1:0", "10.0.0.2:80"], "not an address with a port (10.0.0.1:0)"),
        ([], "the following arguments are required: SUBJECT"),
    ],
)
def test_mistakes(invoke: Invoke, run_dir: str, given: list[str], said: str) -> None:
    outcome = invoke("explain", *given, "--run-dir", run_dir)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert said in outcome.stderr
    assert "hint: " in outcome.stderr


def test_what_the_daemon_refuses(invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
    daemon.answer = SplicerError("no such container (x)", hint="splicer policy")
    outcome = invoke("explain", "x", "--run-dir", run_dir)
    assert (outcome.code, outcome.stderr) == (1, "splicer: no such container (x)\nhint: splicer policy\n")
