# SPDX-License-Identifier: Apache-2.0
"""A service as it is: what is asked of the daemon, of wrk and of the user's command, and what is made of it.
That it switches anything is tests/kernel/test_bench.py."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from splicer.bench import children, live
from splicer.bench.progress import Progress
from splicer.bench.suite import Options, Workshop
from splicer.daemon.control import Server
from splicer.errors import SplicerError

from ..conftest import Log, Terminal

WRK = (
    '{"requests":%d,"duration":1000000,"p50":50,"p99":90,"max":300,"bytes":1,'
    '"connect":0,"read":0,"write":0,"status":%d,"timeout":0}'
)


class Daemon:
    """Answers as one does that splices whatever it may. `hold` is what it was last told."""

    def __init__(self) -> None:
        self.hold: dict[str, Any] = {}
        self.calls: list[str] = []
        self.reason = ""
        self.redirected = 0
        self.paused: dict[str, Any] = {}

    def handlers(self) -> dict[str, Any]:
        return {name: getattr(self, f"answer_{name}") for name in ("status", "flows", "hold", "release")}

    def answer_hold(self, request: dict[str, Any]) -> dict[str, Any]:
        self.calls.append("hold")
        self.hold = request
        return {}

    def answer_release(self, request: dict[str, Any]) -> dict[str, Any]:
        self.calls.append("release")
        assert request["holder"] == self.hold["holder"]
        self.hold = {}
        return {}

    def answer_status(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self.hold and not self.reason:
            self.redirected += 100
        totals = dict.fromkeys(("spliced", "redirected_bytes", "passed_messages", "rescued"), 0)
        return {
            "connections": {"spliced": 0, "draining": 0},
            "totals": {**totals, "redirected_messages": self.redirected, "refused": {}},
            "paused": self.paused,
            "usage": {"cpu_seconds": 1.0, "rss_bytes": 1 << 20},
        }

    def answer_flows(self, _: dict[str, Any]) -> dict[str, Any]:
        self.calls.append("flows")
        flow = {"remote": "127.0.0.1:80", "peer": "127.0.0.1:8080", "state": "paired", "reason": self.reason}
        return {"flows": [flow, {**flow, "remote": "127.0.0.1:81", "peer": "127.0.0.1:81"}]}


@pytest.fixture
def daemon(run_dir: str, log: Log) -> Iterator[Daemon]:
    answering = Daemon()
    with Server(run_dir, answering.handlers(), log, allowed_uid=os.getuid()):
        yield answering


@pytest.fixture
def workshop() -> Workshop:
    return Workshop(Options(pairs=2), Progress(Terminal()), lambda _: None)


@pytest.fixture(autouse=True)
def _as_root_in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(children, "GLANCE", 0.1)
    monkeypatch.setattr(children, "PATIENCE", 0.5)


def test_plain_and_spliced_by_turns(daemon: Daemon, run_dir: str, workshop: Workshop, tmp_path: Any) -> None:
    """The command runs once to see that it works, and then in each leg; nothing is held at the end."""
    log = tmp_path / "runs"
    found = live.measure_command(workshop, run_dir, f"echo x >> {log}; echo result: 1,5{'0'}0", (), True)
    assert daemon.calls == ["hold", "release"] * 2 + ["hold", "release"]
    assert daemon.hold == {}
    assert log.read_text().count("x") == 1 + 5
    (document,) = found.document
    assert document["metrics"]["number"]["plain_samples"] == [1500.0] * 3
    assert not found.failures and not found.notes


def test_what_fails_in_the_middle_leaves_no_hold(
    daemon: Daemon, run_dir: str, workshop: Workshop, tmp_path: Any
) -> None:
    command = f"test ! -e {tmp_path}/second || exit 7; touch {tmp_path}/second; echo 5"
    with pytest.raises(SplicerError, match="sh failed with 7"):
        live.measure_command(workshop, run_dir, command, (), True)
    assert daemon.calls == ["hold", "release"]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("blocking_reader", "2 of 2 connections: blocking_reader. An end sleeps in reads"),
        ("policy_off", "2 of 2 connections: policy_off. The policy of an end is off, or splicer is paused"),
    ],
)
def test_why_nothing_was_spliced(
    daemon: Daemon, run_dir: str, workshop: Workshop, reason: str, text: str
) -> None:
    daemon.reason = reason
    found = live.measure_command(workshop, run_dir, "sleep 0.3; echo 5", (), True)
    assert found.notes[0].startswith(text)
    assert found.comparisons[0].redirected == 0


def test_nothing_is_explained_that_nobody_could_see(daemon: Daemon, run_dir: str, workshop: Workshop) -> None:
    daemon.reason = "cold"
    found = live.measure_command(workshop, run_dir, "echo 5", (), True)
    assert found.notes[0].startswith("the runs are too short")


def test_who_is_spliced_is_not_looked_at(daemon: Daemon, run_dir: str, workshop: Workshop) -> None:
    """A list of all connections costs a busy host something."""
    live.measure_command(workshop, run_dir, "sleep 0.3; echo 5", (), True)
    assert "flows" not in daemon.calls


def test_what_is_paused_is_not_measured(
    daemon: Daemon, run_dir: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "paused", {"since_seconds": 3.0})
    with pytest.raises(SplicerError, match="paused"):
        live.measure_command(workshop, run_dir, "echo 1", (), True)
    assert daemon.calls == []


def test_only_the_flows_of_the_service_count(daemon: Daemon) -> None:
    flows = daemon.answer_flows({})["flows"]
    assert [live.is_at(flow, 8080) for flow in flows] == [True, False]
    assert [live.is_at(flow, 80) for flow in flows] == [True, False]
    assert [live.is_at(flow, 0) for flow in flows] == [True, True]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://web/", "http://", "http://web:0/", "http://web:x/", "/"]
)
def test_bad_urls(url: str) -> None:
    with pytest.raises(SplicerError, match="bad URL") as raised:
        live.split_url(url)
    assert raised.value.exit_code == 2


def test_ports_of_urls() -> None:
    assert live._find_port(live.split_url("https://web/x")) == 443
    assert live._find_port(live.split_url("http://[::1]:8080/")) == 8080


def test_who_may_and_what_must_be_there(
    run_dir: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SplicerError, match="not running") as raised:
        live.measure_command(workshop, run_dir, "echo 1", (), True)
    assert raised.value.exit_code == 3
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SplicerError, match="only root"):
        live.measure_command(workshop, run_dir, "echo 1", (), True)
    monkeypatch.setenv("PATH", run_dir)
    with pytest.raises(SplicerError, match="wrk is not installed") as raised:
        live.measure_url(workshop, run_dir, "http://127.0.0.1/", ())
    assert raised.value.hint == "apt-get install wrk"


def test_what_wrk_says() -> None:
    sample = live.read_wrk(f"Running 1s test\n{WRK % (1000, 3)}\n", 0.5)
    assert (sample.requests, sample.errors) == (1000, {"status": 3})
    assert sample.metrics["rate"] == 1000 and sample.metrics["cpu_us"] == 500
    for said, message in (
        (WRK % (0, 0), "did not answer"),
        ("oops", "something else"),
        ("", "something else"),
    ):
        with pytest.raises(SplicerError, match=message):
            live.read_wrk(said, 0.5)


# -- programs of the user's ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17", 17),
        ("first 3\nRequests/sec: 1234.5", 1234.5),
        ("12,345.6 requests", 12345.6),
        ("2.5e3", 2500),
        ("took .5 s", 0.5),
        ("99 % below 7ms", 7),
    ],
)
def test_the_last_number_of_the_last_line(text: str, number: float) -> None:
    assert children.find_number(text, "x") == number


@pytest.mark.parametrize("text", ["", "none\n", "1\nnone", "0", "-3"])
def test_no_number_that_ratios_can_be_made_of(text: str) -> None:
    with pytest.raises(SplicerError):
        children.find_number(text, "x")


def test_a_signal_that_comes_while_a_program_is_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it runs already, and nobody knows it yet. And it has no signals blocked."""
    start, before = children._start, signal.getsignal(signal.SIGTERM)

    def start_and_be_told(*arguments: Any) -> subprocess.Popen[bytes]:
        child = start(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(children, "_start", start_and_be_told)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with _marked() as mark, pytest.raises(KeyboardInterrupt):
            children.run_child(["sh", "-c", f"sleep {mark} & sleep {mark}"], lambda: None)
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    said = children.run_child(["grep", "SigBlk", "/proc/self/status"], lambda: None)
    assert int(said.split()[1], 16) == 0
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_it_needs_no_directory_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file system is read-only. Nothing of what is printed is lost."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("there is none"))
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: pytest.fail("there is none"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    said = children.run_child(["sh", "-c", "seq 100000; echo oops >&2"], lambda: None)
    assert said.splitlines() == [str(number) for number in range(1, 100001)]


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(SplicerError, match="cannot run nothing-like-it"):
        children.run_child(["nothing-like-it"], lambda: None)


@contextmanager
def _marked() -> Iterator[str]:
    """A duration that only this test sleeps for; nobody does when it is over."""
    mark = f"88{os.getpid()}"
    yield mark
    deadline = time.monotonic() + 10
    # What is killed is gone a moment later.
    find = ["pgrep", "-f", f"sleep {mark}$"]
    while left := subprocess.run(find, stdout=subprocess.PIPE, check=False).stdout.split():
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            raise AssertionError(f"they run on: {left}")
        time.sleep(0.02)


def test_what_interrupts_a_program_ends_all_of_it() -> None:
    """Whatever it has started, and also if it does not listen."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with _marked() as mark:
        with pytest.raises(KeyboardInterrupt):
            children.run_child(["sh", "-c", f"trap '' TERM; sleep {mark} & sleep {mark}; wait"], interrupt)
