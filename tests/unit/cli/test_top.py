# SPDX-License-Identifier: Apache-2.0
"""`splicer top` on a real terminal, against a control server in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.daemon import command_line, wait_until
from support.terminal import Terminal, on_terminal

from splicer.cli import top
from splicer.daemon.control import Server
from splicer.model import TOP_KEYS, Owner

from ..conftest import Invoke, Log

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


def amounts(redirected: float = 0.0, messages: float = 0.0, plain: float = 0.0) -> dict[str, Any]:
    return {
        "redirected_bytes": 1,
        "redirected_messages": 1,
        "plain_bytes": 1,
        "redirected_bytes_per_second": redirected,
        "redirected_messages_per_second": messages,
        "plain_bytes_per_second": plain,
    }


def row(client: str, server: str, **fields: Any) -> dict[str, Any]:
    ends = {"client": dict(vars(Owner(container=client))), "server": dict(vars(Owner(container=server)))}
    return {**ends, "connections": 3, "spliced": 2, **amounts(2048.0, 7.4, 512.0), **fields}


class Daemon:
    """What it says, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.schema = 1
        self.rate = 2048.0
        self.pairs = [row("web-1", "db-1"), row("web-2", "db-1")]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        first = len(self.asked) == 1
        place = {"local": "10.0.0.1:4000", "remote": "10.0.0.2:80", "state": "spliced", "reason": ""}
        return {
            "schema": self.schema,
            "seconds": 0.0 if first else 1.0,
            "total": {"connections": 6, "spliced": 4, **amounts(self.rate, 15.0, 1024.0)},
            "pairs": self.pairs,
            "others": {"connections": 0, "spliced": 0, **amounts()},
            "compared": not first,
            "connections": [row("web-1", "db-1", **place)] if request["connections"] else [],
            "plain_not_looked_up": 0,
        }


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def server(run_dir: str, log: Log, daemon: Daemon) -> Iterator[Server]:
    with Server(run_dir, {"top": daemon.answer}, log, allowed_uid=os.getuid()) as made:
        yield made


def command(run_dir: str, *arguments: str) -> list[str]:
    return command_line("top", "--interval", "0.5", "--run-dir", run_dir, *arguments)


@pytest.fixture
def terminal(run_dir: str, server: Server) -> Iterator[Terminal]:
    with on_terminal(command(run_dir)) as made:
        yield made


# -- ends --------------------------------------------------------------------------------------------------


def quits(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    terminal.press("q")


def interrupts(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    terminal.press("\x03")


def terminates(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    terminal.process.send_signal(signal.SIGTERM)


def hangs_up(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    terminal.process.send_signal(signal.SIGHUP)


def is_gone(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    server.close()


def speaks_otherwise(terminal: Terminal, server: Server, daemon: Daemon) -> None:
    daemon.schema = 2


End = Callable[[Terminal, Server, Daemon], None]
ENDS: list[tuple[End, int, str]] = [
    (quits, 0, ""),
    (interrupts, 130, ""),
    (terminates, -signal.SIGTERM, ""),
    (hangs_up, -signal.SIGHUP, ""),
    (is_gone, 3, "not running"),
    (speaks_otherwise, 1, "another schema"),
]


@pytest.mark.parametrize(("end", "code", "said"), ENDS, ids=lambda each: getattr(each, "__name__", None))
def test_the_terminal_is_as_it_was(
    terminal: Terminal, server: Server, daemon: Daemon, end: End, code: int, said: str
) -> None:
    terminal.wait_for("web-2")
    assert terminal.attributes() != terminal.before, "there is something to be restored"
    end(terminal, server, daemon)
    assert terminal.end() == code
    assert terminal.attributes() == terminal.before
    assert terminal.shown.count(ENTER) == terminal.shown.count(LEAVE) == 1
    after = terminal.shown.partition(LEAVE)[2]
    assert said.encode() in after, "an error is said where it can be read"
    assert b"\x1b[?25l" not in after


def test_an_error_of_ours(run_dir: str, server: Server, daemon: Daemon) -> None:
    """Whatever it is."""
    broken = (
        "import sys, splicer.cli.top as top, splicer.cli.main as main; top.turn = None; sys.exit(main.main())"
    )
    with on_terminal([command_line()[0], "-c", broken, *command(run_dir)[3:]]) as terminal:
        terminal.wait_for("Looking")
        assert terminal.end() == 1
        assert terminal.attributes() == terminal.before
        assert b"internal error" in terminal.shown.partition(LEAVE)[2]


def test_no_daemon_at_first(run_dir: str) -> None:
    with on_terminal(command(run_dir)) as terminal:
        assert terminal.end() == 3
        assert ENTER not in terminal.shown, "nothing to be restored"
        assert terminal.attributes() == terminal.before


# -- what is shown -----------------------------------------------------------------------------------------


def test_keys(terminal: Terminal, daemon: Daemon) -> None:
    terminal.wait_for("web-2")
    terminal.press("c")
    terminal.wait_for(":4000")  # what has not changed is not written again
    assert daemon.asked[-1]["connections"] > 0
    terminal.press("c")
    terminal.wait_for("web-2")
    for key, sort in (("m", "messages"), ("r", "redirected"), ("t", "plain"), ("n", "connections")):
        terminal.press(key)
        wait_until(f"it is asked for {sort}", lambda sort=sort: daemon.asked[-1]["sort"] == sort)
    terminal.press("b")
    terminal.press("x")
    terminal.press("q")
    assert terminal.end() == 0


def test_sizes(terminal: Terminal) -> None:
    """Smaller, much too small, and large again: no error, and what fits is shown."""
    terminal.wait_for("web-2")
    terminal.resize(8, 60)
    terminal.wait_for("quit")
    terminal.resize(3, 20)
    terminal.wait_for("too small")
    terminal.resize(1, 1)
    terminal.read(1.2)
    terminal.resize(30, 120)
    terminal.wait_for("web-2")
    terminal.press("q")
    assert terminal.end() == 0
    assert terminal.attributes() == terminal.before


@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"TERM": "nobody-has-this"}])
def test_a_terminal_without_a_screen(run_dir: str, server: Server, changes: dict[str, str]) -> None:
    with on_terminal(command(run_dir, "-n", "2"), **changes) as terminal:
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.shown
        assert terminal.shown.count(b"CLIENT") == 2


def test_a_number_of_looks_on_a_screen(run_dir: str, server: Server) -> None:
    with on_terminal(command(run_dir, "-n", "1")) as terminal:
        assert terminal.end() == 0
        assert terminal.attributes() == terminal.before


def test_batch_on_a_terminal(run_dir: str, server: Server) -> None:
    with on_terminal(command(run_dir, "--batch", "-n", "1"), columns=60) as terminal:
        assert terminal.end() == 0
        assert ENTER not in terminal.shown


def test_piped(invoke: Invoke, run_dir: str, server: Server, daemon: Daemon) -> None:
    done = invoke("top", "-n", "2", "--interval", "0.5", "--limit", "1", "--run-dir", run_dir)
    assert done.code == 0
    table = [
        "2.00 KiB/s redirected, 1.00 KiB/s through TCP; 6 connections, 4 spliced",
        "over 1.0s, by bytes",
        "CLIENT  SERVER  CONNS  SPLICED  MSG/S  SPLICED/S  TCP/S",
        "web-1   db-1        3        2      7   2.00 KiB  512 B",
        "and 1 more pair",
    ]
    assert done.stdout.splitlines() == [*table, "", *table]
    assert len(daemon.asked) == 3, "the first look has no rates"


def test_connections_piped(invoke: Invoke, run_dir: str, server: Server) -> None:
    done = invoke("top", "-n", "1", "--interval", "0.5", "--connections", "--run-dir", run_dir)
    assert "web-1:4000  db-1:80  spliced" in done.stdout


def test_json(invoke: Invoke, run_dir: str, server: Server) -> None:
    done = invoke("top", "--json", "-n", "2", "--interval", "0.5", "--run-dir", run_dir)
    assert [json.loads(line)["seconds"] for line in done.stdout.splitlines()] == [1.0, 1.0]


def test_every_key_is_said() -> None:
    assert set(top._KEYS.values()) == set(TOP_KEYS)
    assert all(f"{key} " in top._FOOTER for key in (*top._KEYS, "q", "c"))


@pytest.mark.parametrize(
    "arguments", [("--interval", "0"), ("--interval", "x"), ("-n", "0"), ("--limit", "-3"), ("--sort", "x")]
)
def test_mistakes(invoke: Invoke, run_dir: str, arguments: tuple[str, ...]) -> None:
    done = invoke("top", *arguments, "--run-dir", run_dir)
    assert (done.code, done.stdout) == (2, "")
    assert "splicer:" in done.stderr
