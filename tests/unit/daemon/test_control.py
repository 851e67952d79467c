# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.pauses import Stopwatch

from splicer.daemon import control
from splicer.daemon.control import (
    Handler,
    Rows,
    Server,
    remove_stale,
    request,
    request_rows,
    socket_path,
)
from splicer.errors import FAILURE, NOT_RUNNING, SplicerError

from ..conftest import Log


def echo(asked: Mapping[str, object]) -> Mapping[str, object]:
    return {"schema": 1, "asked": dict(asked)}


def refuse(asked: Mapping[str, object]) -> Mapping[str, object]:
    raise SplicerError("no such flow", hint="splicer flows")


def crash(asked: Mapping[str, object]) -> Mapping[str, object]:
    raise KeyError("secret")


def unserialisable(asked: Mapping[str, object]) -> Mapping[str, object]:
    return {"x": object()}


def count(asked: Mapping[str, object]) -> Rows:
    """Numbers, ten at a time; with a mistake in the middle if it is asked for."""
    number = int(str(asked["number"]))

    def parts() -> Iterator[list[dict[str, int]]]:
        for start in range(0, number, 10):
            if asked.get("broken") and start >= number // 2:
                raise KeyError("secret")
            yield [{"n": n} for n in range(start, min(start + 10, number))]

    return Rows({"schema": 1}, "numbers", parts())


INSIDE: list[bool] = []


def dawdle(asked: Mapping[str, object]) -> Rows:
    """Takes its time over each row."""

    def parts() -> Iterator[list[dict[str, int]]]:
        for number in range(20):
            INSIDE.append(True)
            time.sleep(0.005)
            INSIDE.clear()
            yield [{"n": number}]

    return Rows({"schema": 1}, "numbers", parts())


def peep(asked: Mapping[str, object]) -> Mapping[str, object]:
    return {"schema": 1, "inside": bool(INSIDE)}


HANDLERS: dict[str, Handler] = {
    "dawdle": dawdle,
    "peep": peep,
    "count": count,
    "echo": echo,
    "refuse": refuse,
    "crash": crash,
    "unserialisable": unserialisable,
}


@pytest.fixture
def server(run_dir: str, log: Log) -> Iterator[Server]:
    with Server(run_dir, HANDLERS, log, allowed_uid=os.getuid()) as serving:
        yield serving


@pytest.fixture
def impatient(run_dir: str, log: Log) -> Iterator[Server]:
    with Server(run_dir, HANDLERS, log, timeout=0.5, allowed_uid=os.getuid()) as serving:
        yield serving


@contextmanager
def dial(run_dir: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(5)
        peer.connect(socket_path(run_dir))
        yield peer


def receive(peer: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    received = b""
    while chunk := peer.recv(65536):
        received += chunk
    return received


def talk(run_dir: str, sent: bytes) -> list[Any]:
    """Send and hang up; all replies."""
    with dial(run_dir) as peer:
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in receive(peer).splitlines()]


def answering(run_dir: str, reply: bytes, *, when: threading.Event | None = None) -> threading.Thread:
    """Something that listens on the control socket and is no splicer; it replies at once, or `when` told."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(socket_path(run_dir))
    listener.listen()

    def serve() -> None:
        peer, _ = listener.accept()
        with listener, peer:
            peer.recv(65536)
            if when is not None:
                when.wait()
            with suppress(OSError):
                peer.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.usefixtures("server")
class TestRequests:
    def test_a_request_is_answered(self, run_dir: str) -> None:
        result = request(run_dir, "echo", {"port": 80})
        assert result == {"schema": 1, "asked": {"command": "echo", "port": 80}}

    def test_only_the_owner_can_reach_it(self, run_dir: str) -> None:
        assert os.stat(socket_path(run_dir)).st_mode & 0o777 == 0o600

    def test_several_requests_on_one_connection(self, run_dir: str) -> None:
        replies = talk(run_dir, b'{"command":"echo"}\n{"command":"refuse"}\n{"command":"echo"}\n')
        assert [reply["ok"] for reply in replies] == [True, False, True]

    def test_the_wire_format_of_a_refusal(self, run_dir: str) -> None:
        assert talk(run_dir, b'{"command":"refuse"}\n') == [
            {"ok": False, "error": "no such flow", "hint": "splicer flows"}
        ]
        with pytest.raises(SplicerError, match="no such flow") as caught:
            request(run_dir, "refuse")
        assert caught.value.hint == "splicer flows"
        assert caught.value.exit_code == FAILURE

    @pytest.mark.parametrize("command", ["bogus", None, 1, ["echo"], {}])
    def test_unknown_commands(self, run_dir: str, command: object) -> None:
        (reply,) = talk(run_dir, json.dumps({"command": command}).encode() + b"\n")
        assert reply["ok"] is False
        assert "unknown command" in reply["error"]
        assert "echo" in reply["hint"]

    @pytest.mark.parametrize(
        ("sent", "error"),
        [
            (b"nonsense\n", "not valid JSON"),
            (b"\xff\xfe\n", "not valid JSON"),
            (b"\n", "not valid JSON"),
            (b"[" * 50_000 + b"\n", "not valid JSON"),
            (b"[]\n", "not a JSON object"),
            (b'"status"\n', "not a JSON object"),
            (b'{"command":"echo"', "middle of a line"),
        ],
    )
    def test_bad_requests_are_answered_and_end_the_connection(
        self, run_dir: str, sent: bytes, error: str
    ) -> None:
        (reply,) = talk(run_dir, sent)
        assert reply["ok"] is False
        assert error in reply["error"]
        assert request(run_dir, "echo")["schema"] == 1

    def test_a_request_that_is_too_long(self, run_dir: str) -> None:
        with dial(run_dir) as peer:
            peer.sendall(b'{"command":"' + b"x" * control.REQUEST_LIMIT + b'"}\n')
            assert "longer than 65536 bytes" in json.loads(peer.recv(65536))["error"]
        assert request(run_dir, "echo")["schema"] == 1

    def test_a_mistake_in_a_handler_is_logged_and_survived(self, run_dir: str, log: Log) -> None:
        for command in ("crash", "unserialisable"):
            with pytest.raises(SplicerError, match="internal error in the daemon") as caught:
                request(run_dir, command)
            assert "secret" not in caught.value.message
        # That a peer was slow to come or to go is for debugging, and may be true.
        logged = [event for level, event, _ in log.events if level != "debug"]
        assert logged == ["control_request_failed"] * 2
        assert request(run_dir, "echo")["schema"] == 1

    def test_many_at_once(self, run_dir: str) -> None:
        answers: list[object] = []
        threads = [
            threading.Thread(target=lambda: answers.append(request(run_dir, "echo")["schema"]))
            for _ in range(100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [1] * 100


@pytest.mark.usefixtures("impatient")
class TestSlowPeers:
    def test_a_dawdler_is_dropped_and_stops_nobody(self, run_dir: str) -> None:
        with dial(run_dir) as dawdler:
            dawdler.sendall(b'{"comm')
            assert request(run_dir, "echo")["schema"] == 1
            with Stopwatch() as watch:
                assert dawdler.recv(1) == b""
            assert watch.seconds < 3

    def test_the_time_is_for_the_whole_line(self, run_dir: str) -> None:
        with dial(run_dir) as dripping:
            with Stopwatch() as watch, suppress(BrokenPipeError, ConnectionResetError):
                while watch.seconds < 4:
                    dripping.sendall(b" ")
                    time.sleep(0.1)
            assert watch.seconds < 3

    def test_more_silent_peers_than_slots(self, run_dir: str) -> None:
        peers = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(control.PEERS_AT_ONCE)]
        for peer in peers:
            peer.connect(socket_path(run_dir))
        assert request(run_dir, "echo")["schema"] == 1
        for peer in peers:
            peer.close()


def test_handlers_run_one_at_a_time(run_dir: str, log: Log) -> None:
    inside, most = 0, 0

    def count(asked: Mapping[str, object]) -> Mapping[str, object]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1
        return {}

    with Server(run_dir, {"count": count}, log, allowed_uid=os.getuid()):
        threads = [threading.Thread(target=request, args=(run_dir, "count")) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_a_large_answer_arrives_whole(run_dir: str, log: Log) -> None:
    flows = [{"local": f"10.0.0.1:{port}", "reason": "cold"} for port in range(50_000)]
    with Server(run_dir, {"flows": lambda _: {"flows": flows}}, log, allowed_uid=os.getuid()):
        assert request(run_dir, "flows")["flows"] == flows


def test_another_user_is_refused(run_dir: str, log: Log) -> None:
    with (
        Server(run_dir, HANDLERS, log, allowed_uid=os.getuid() + 1),
        pytest.raises(SplicerError, match="only root may use the control socket") as caught,
    ):
        request(run_dir, "echo")
    assert caught.value.hint is not None
    assert log.names() == ["control_peer_refused"]


def test_close_removes_the_socket_and_hangs_up(run_dir: str, log: Log) -> None:
    server = Server(run_dir, HANDLERS, log, allowed_uid=os.getuid())
    server.start()
    with dial(run_dir) as peer:
        peer.sendall(b'{"command":"echo"}\n')
        assert peer.recv(65536)
        with Stopwatch() as watch:
            server.close()
        assert watch.seconds < 2
        assert peer.recv(1) == b""
    assert os.listdir(run_dir) == []
    server.close()


def test_close_without_start(run_dir: str, log: Log) -> None:
    Server(run_dir, HANDLERS, log).close()


def test_close_leaves_the_socket_of_a_successor(run_dir: str, log: Log) -> None:
    first = Server(run_dir, HANDLERS, log, allowed_uid=os.getuid())
    first.start()
    os.unlink(first.path)
    with Server(run_dir, HANDLERS, log, allowed_uid=os.getuid()):
        first.close()
        assert request(run_dir, "echo")["schema"] == 1


def leave_stale(run_dir: str) -> str:
    path = socket_path(run_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
        dead.listen()
    return path


def test_a_stale_socket_is_replaced(run_dir: str, log: Log) -> None:
    leave_stale(run_dir)
    with Server(run_dir, HANDLERS, log, allowed_uid=os.getuid()):
        assert request(run_dir, "echo")["schema"] == 1


def test_remove_stale(run_dir: str) -> None:
    path = leave_stale(run_dir)
    assert remove_stale(path)
    assert not os.path.exists(path)
    assert not remove_stale(path)


@pytest.mark.usefixtures("server")
def test_a_live_socket_is_not_replaced(run_dir: str, log: Log) -> None:
    with pytest.raises(SplicerError, match="another process listens"):
        Server(run_dir, HANDLERS, log, allowed_uid=os.getuid()).start()
    assert request(run_dir, "echo")["schema"] == 1


def test_a_file_in_the_place_of_the_socket(run_dir: str, log: Log) -> None:
    Path(socket_path(run_dir)).write_text("precious")
    with pytest.raises(SplicerError, match="in the place of the control socket"):
        Server(run_dir, HANDLERS, log).start()
    assert Path(socket_path(run_dir)).read_text() == "precious"


def test_a_run_directory_that_is_gone(run_dir: str, log: Log) -> None:
    with pytest.raises(SplicerError, match="cannot listen"):
        Server(run_dir + "/gone", HANDLERS, log).start()


def test_a_path_that_is_too_long(log: Log) -> None:
    long = "/tmp/" + "x" * 100
    with pytest.raises(SplicerError, match="too long") as caught:
        Server(long, HANDLERS, log).start()
    assert caught.value.hint == "choose a --run-dir of at most 94 bytes"
    with pytest.raises(SplicerError, match="too long"):
        request(long, "echo")


class TestNobodyThere:
    def check(self, run_dir: str) -> None:
        with pytest.raises(SplicerError, match="not running") as caught:
            request(run_dir, "status")
        assert caught.value.exit_code == NOT_RUNNING
        assert caught.value.hint is not None
        assert "splicer run" in caught.value.hint

    def test_no_directory(self, run_dir: str) -> None:
        self.check(run_dir + "/missing")

    def test_no_socket(self, run_dir: str) -> None:
        self.check(run_dir)

    def test_a_stale_socket(self, run_dir: str) -> None:
        leave_stale(run_dir)
        self.check(run_dir)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "hung up without an answer"),
        (b'{"ok":true', "cut off"),
        (b"HTTP/1.1 400 Bad Request\r\n", "no splicer"),
        (b"[]\n", "no splicer"),
        (b'{"ok":true}\n', "no splicer"),
        (b'{"ok":false}\n', "no splicer"),
    ],
)
def test_strange_answers(run_dir: str, reply: bytes, message: str) -> None:
    thread = answering(run_dir, reply)
    with pytest.raises(SplicerError, match=message) as caught:
        request(run_dir, "status")
    thread.join()
    assert caught.value.exit_code == FAILURE
    assert caught.value.hint is not None


def test_a_daemon_that_does_not_answer(run_dir: str) -> None:
    given_up = threading.Event()
    thread = answering(run_dir, b"", when=given_up)
    try:
        with pytest.raises(SplicerError, match=r"did not answer within 0\.2 seconds"):
            request(run_dir, "status", timeout=0.2)
    finally:
        given_up.set()
    thread.join()


def test_no_permission(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", deny)
    with pytest.raises(SplicerError, match="no permission") as caught:
        request(run_dir, "status")
    assert caught.value.hint == "run it as root: sudo splicer status"
    assert caught.value.exit_code == FAILURE


@pytest.mark.usefixtures("server")
class TestRows:
    @pytest.mark.parametrize("number", [0, 1, 10, 11, 1000])
    def test_rows_come_in_parts(self, run_dir: str, number: int) -> None:
        head, rows = request_rows(run_dir, "count", "numbers", {"number": number})
        assert head == {"schema": 1}
        assert [row["n"] for row in rows] == list(range(number))

    @pytest.mark.parametrize("number", [0, 1, 10, 11, 1000])
    def test_who_does_not_ask_for_parts_gets_one_line(self, run_dir: str, number: int) -> None:
        result = request(run_dir, "count", {"number": number})
        assert result == {"schema": 1, "numbers": [{"n": n} for n in range(number)]}

    def test_the_wire_format(self, run_dir: str) -> None:
        asked = b'{"command":"count","number":12,"stream":true}\n{"command":"echo"}\n'
        head, first, second, end, other = talk(run_dir, asked)
        assert head == {"ok": True, "result": {"schema": 1}, "rows": "numbers"}
        assert first == {"rows": [{"n": n} for n in range(10)]}
        assert second == {"rows": [{"n": 10}, {"n": 11}]}
        assert end == {"end": 12}
        assert other["ok"] is True

    def test_a_mistake_in_the_middle_is_told(self, run_dir: str, log: Log) -> None:
        _, rows = request_rows(run_dir, "count", "numbers", {"number": 100, "broken": True})
        with pytest.raises(SplicerError, match="internal error"):
            list(rows)
        with pytest.raises(SplicerError, match="cut off"):
            request(run_dir, "count", {"number": 100, "broken": True})
        assert request(run_dir, "echo")["schema"] == 1

    def test_what_knows_nothing_of_parts(self, run_dir: str) -> None:
        head, rows = request_rows(run_dir, "echo", "asked")
        assert head == {"schema": 1}
        assert list(rows) == []

    def test_refusals(self, run_dir: str) -> None:
        with pytest.raises(SplicerError, match="no such flow"):
            request_rows(run_dir, "refuse", "numbers")

    def test_others_are_answered_in_between(self, run_dir: str) -> None:
        _, rows = request_rows(run_dir, "count", "numbers", {"number": 100_000})
        assert next(rows) == {"n": 0}
        assert request(run_dir, "echo")["schema"] == 1
        assert sum(1 for _ in rows) == 99_999

    def test_rows_are_put_together_while_no_handler_is_at_work(self, run_dir: str) -> None:
        _, rows = request_rows(run_dir, "dawdle", "numbers")
        seen = []
        for _ in rows:
            seen.append(request(run_dir, "peep")["inside"])
        assert seen == [False] * 20

    def test_who_hangs_up_in_the_middle(self, run_dir: str) -> None:
        for _ in range(2 * control.PEERS_AT_ONCE):
            with dial(run_dir) as peer:
                peer.sendall(b'{"command":"count","number":100000,"stream":true}\n')
                assert peer.recv(10)
        assert request(run_dir, "echo")["schema"] == 1


def test_an_answer_that_ends_in_the_middle_of_its_rows(run_dir: str) -> None:
    thread = answering(run_dir, b'{"ok":true,"result":{},"rows":"numbers"}\n{"rows":[{"n":1}]}\n')
    _, rows = request_rows(run_dir, "count", "numbers")
    assert next(rows) == {"n": 1}
    with pytest.raises(SplicerError, match="hung up"):
        next(rows)
    thread.join()


@pytest.mark.parametrize("last", [b'{"end":7}\n', b"nonsense\n"])
def test_rows_are_missing(run_dir: str, last: bytes) -> None:
    thread = answering(run_dir, b'{"ok":true,"result":{},"rows":"numbers"}\n{"rows":[{"n":1}]}\n' + last)
    _, rows = request_rows(run_dir, "count", "numbers")
    with pytest.raises(SplicerError, match=r"cut off|no splicer"):
        list(rows)
    thread.join()


SERVE = """
import os, sys, time
from splicer.daemon.control import Server
class Log:
    def __getattr__(self, name): return lambda *_, **__: None
with Server(sys.argv[1], {"status": lambda _: {"schema": 1}}, Log(), allowed_uid=os.getuid()):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(run_dir: str) -> Iterator[subprocess.Popen[str]]:
    """A process that serves."""
    with subprocess.Popen([sys.executable, "-c", SERVE, run_dir], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


def test_a_daemon_that_was_stopped_is_told_from_one_that_is_busy(
    run_dir: str, other: subprocess.Popen[str]
) -> None:
    """Also by who would wait for longer: it would wait in vain."""
    assert request(run_dir, "status") == {"schema": 1}
    other.send_signal(signal.SIGSTOP)
    for patience in (None, 1.5):
        with pytest.raises(
            SplicerError, match=rf"is stopped, by a signal or a debugger \(pid {other.pid}, "
        ) as told:
            request(run_dir, "status", timeout=30.0, patience=patience)
        assert f"kill -CONT {other.pid}" in str(told.value.hint)
    other.send_signal(signal.SIGCONT)
    assert request(run_dir, "status") == {"schema": 1}


@pytest.mark.parametrize("command", ["status", "drain"])
def test_who_shows_something_is_told_how_to_wait_longer(run_dir: str, log: Log, command: str) -> None:
    release = threading.Event()
    with Server(run_dir, {command: lambda _: {"late": release.wait(10)}}, log, allowed_uid=os.getuid()):
        with pytest.raises(SplicerError, match=r"did not answer within 0\.2 seconds \(pid \d+, ") as told:
            request(run_dir, command, timeout=30.0, patience=0.2)
        assert ("--timeout 30" in str(told.value.hint)) == (command == "status")
        release.set()


def test_who_is_more_patient_than_others_waits_for_rows_too(run_dir: str, log: Log) -> None:
    """However long the exchange takes otherwise: `splicer flows --timeout 30`."""

    def answer(_: Mapping[str, Any]) -> Rows:
        time.sleep(0.3)
        return Rows({"schema": 1}, "flows", [[{"n": 1}]])

    with Server(run_dir, {"flows": answer}, log, allowed_uid=os.getuid()):
        head, rows = request_rows(run_dir, "flows", "flows", timeout=0.1, patience=30.0)
        assert (head, list(rows)) == ({"schema": 1}, [{"n": 1}])
