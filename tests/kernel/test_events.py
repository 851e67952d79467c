# SPDX-License-Identifier: Apache-2.0
"""`splicer events`: what happens to real connections is told, with whose they are and why; and a follower is
nobody's hindrance, whatever it does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import schemas
from support.daemon import ask, call, command_line, environment, wait_until
from support.engine import FakeEngine, name_id
from support.host import EAGER, Host
from support.lab import Lab
from support.players import Pair

from splicer.daemon.events import FOLLOWERS


def read_events(host: Host, *arguments: str) -> list[dict[str, Any]]:
    done = call("events", "--json", *arguments, f"--run-dir={host.run_dir}")
    assert (done.code, done.stderr) == (0, ""), done
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for event in events:
        schemas.check("events", event)
    return events


def find(host: Host, pair: Pair, type_: str) -> list[dict[str, Any]]:
    """Events of a connection; whichever end is meant, the client's port is in it."""
    port = f":{pair.client.local[1]}"
    return [
        event
        for event in read_events(host, "--limit", "0")
        if event["type"] == type_ and event["local"].endswith(port)
    ]


def wait_for(host: Host, pair: Pair, type_: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = wait_until(f"{pair.label} {type_}", lambda: find(host, pair, type_))
    return found[-1]


class Follower:
    """`splicer events --follow`, and what it has said so far."""

    def __init__(self, host: Host, *arguments: str, json_lines: bool = True) -> None:
        self.out = host.directory / f"followed-{id(self):x}"
        self._is_json = json_lines
        asked = ["--json"] if json_lines else []
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                command_line("events", "--follow", *asked, *arguments, f"--run-dir={host.run_dir}"),
                stdout=out,
                stderr=subprocess.PIPE,
                cwd="/",
                env=environment(),
            )

    def read(self) -> list[dict[str, Any]]:
        whole = self.out.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def types(self) -> list[str]:
        return [event["type"] for event in self.read()]

    def wait(self, type_: str, timeout: float = 10.0) -> None:
        wait_until(f"the follower hears of {type_}", lambda: type_ in self.types(), timeout)

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        code = self.process.wait(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def following(host: Host, *arguments: str) -> Iterator[Follower]:
    follower = Follower(host, *arguments)
    try:
        yield follower
    finally:
        if follower.process.poll() is None:
            follower.process.kill()
            follower.end()


def test_the_life_of_a_connection(host: Host, lab: Lab) -> None:
    """It is spliced, goes back since it was asked for, and each time it is said whose it is."""
    pair = host.hot_pair(lab)
    flow = host.flow(pair)
    spliced = wait_for(host, pair, "spliced")
    assert (spliced["local"], spliced["remote"]) == (flow["local"], flow["remote"])
    assert (spliced["client"], spliced["server"]) == (flow["client"], flow["server"])
    assert spliced["client"]["pid"] == pair.client.peer.pid
    host.daemon.drain()
    assert wait_for(host, pair, "draining")["reason"] == "request"
    host.wait_flow(pair, "spliced", rounds=20)
    wait_until("it is told again", lambda: len(find(host, pair, "spliced")) == 2)
    assert len(find(host, pair, "draining")) == 1, "what the programs say twice is said once"
    host.daemon.drain()
    wait_until("it is told again", lambda: len(find(host, pair, "draining")) == 2)
    pair.verify()


def test_who_has_gone_is_known(host: Host, lab: Lab) -> None:
    pair = host.hot_pair(lab)
    pid, before = pair.client.peer.pid, len(read_events(host, "--limit", "0"))
    assert before
    wait_for(host, pair, "spliced")
    wait_until("the loop has looked whose it is", lambda: host.daemon.status() and True)
    host.stop_peers()
    told = find(host, pair, "spliced")[-1]
    assert told["client"]["pid"] == pid


def test_a_refusal(host: Host, lab: Lab) -> None:
    """By name where enlist found it out, with the connection."""
    pair = host.pair(lab)
    pair.client.peer.call("setsockopt", conn=pair.client.conn, level=1, option=47, value=1_000_000)
    host.talk_until(pair, "paired", "pacing")
    assert wait_for(host, pair, "refused")["reason"] == "pacing"


def test_a_refusal_that_the_programs_make(host: Host, lab: Lab) -> None:
    """By number, since they tell of no connection."""

    def count() -> int:
        events = read_events(host, "--limit", "0")
        return sum(e["count"] for e in events if e["reason"] == "blocking_reader" and e["type"] == "refused")

    before = count()
    pair = host.pair(lab, blocking=(True, True))
    host.talk_until(pair, "paired", "blocking_reader")
    wait_until("it is counted", lambda: count() > before)


def test_eager_connections_are_counted(host: Host, lab: Lab) -> None:
    def count() -> int:
        return sum(
            event["count"]
            for event in read_events(host, "--limit", "0")
            if event["type"] == "spliced" and not event["local"]
        )

    before = count()
    pairs = [host.connect(host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b"), port=EAGER)]
    pairs[0].pingpong(2)
    wait_until("it is counted", lambda: count() == before + 1)


def test_what_concerns_all(lab: Lab) -> None:
    """In the order in which it was done, by whatever door it comes in."""
    with tempfile.TemporaryDirectory(prefix="splicer-test-engine-") as directory:
        address = str(Path(directory) / "engine.sock")
        engine = FakeEngine(address)
        try:
            with Host(f"--docker={engine.url}", start=False) as host:
                server = host.peer(lab, "b", cgroup=host.cgroup.child(f"docker-{name_id(7)}.scope"))
                engine.run(7, name="web", labels={}, pid=server.pid)
                host.start()
                with following(host) as follower:
                    follower.wait("started")
                    follower.wait("census_taken")
                    place = f"--run-dir={host.run_dir}"
                    assert call("set", "web", "off", place).code == 0
                    assert call("pause", place).code == 0
                    assert call("resume", place).code == 0
                    host.daemon.drain()
                    follower.wait("drain_requested")
                    host.reload("mode = 'sometimes'\n")
                    host.reload("")
                    follower.wait("reloaded")
                    engine.stop()
                    follower.wait("docker_lost")
                    engine = FakeEngine(address)
                    wait_until("it is back", lambda: follower.types().count("docker_connected") == 2, 20.0)
                    types = follower.types()
                    told = [
                        ("docker_connected", "started", "override", "paused", "resumed"),
                        ("resumed", "drain_requested", "reload_failed", "reloaded", "docker_lost"),
                    ]
                    for order in told:
                        assert [types.index(each) for each in order] == sorted(map(types.index, order)), types
                    assert types[types.index("override") + 1] == "policy_changed"
                    override = next(event for event in follower.read() if event["type"] == "override")
                    assert override["detail"] == {"subjects": ["web"], "mode": "off"}
                    assert host.daemon.stop() == 0
                    follower.wait("drained")
                    follower.wait("daemon_gone")
                    host.start()
                    follower.wait("daemon_restarted")
                    types = follower.types()
                    assert "started" in types[types.index("daemon_restarted") :]
                    assert follower.end() == 130
        finally:
            engine.stop()


def test_a_crowd_does_not_push_out_the_rest(host: Host, lab: Lab) -> None:
    """Nor does it take room: see tests/unit/daemon/test_journal.py for numbers."""
    host.hot_pair(lab)
    everything = read_events(host, "--limit", "0")
    assert [event["type"] for event in everything].count("started") >= 1
    assert len(read_events(host, "--limit", "1")) == 1
    assert read_events(host, "--limit", "1")[0]["number"] >= everything[-1]["number"]


def test_followers_that_do_not_read(host: Host, lab: Lab) -> None:
    """As many as may are asleep: everybody else is answered, and connections are spliced meanwhile. One more
    is refused."""
    asleep = []
    try:
        for _ in range(FOLLOWERS):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.connect(str(host.run_dir / "control.sock"))
            peer.sendall(b'{"command":"events","follow":true,"stream":true}\n')
            assert json.loads(peer.recv(1 << 16).partition(b"\n")[0])["ok"]
            asleep.append(peer)
        refused = call("events", "--follow", f"--run-dir={host.run_dir}")
        assert refused.code == 1
        assert "follow the events already" in refused.stderr
        pair = host.hot_pair(lab)
        wait_for(host, pair, "spliced")
        assert ask(host.run_dir, "status")["healthy"]
    finally:
        for peer in asleep:
            peer.close()
    # Who has gone is noticed, and makes room.
    wait_until("there is room again", lambda: _can_follow(host))


def _can_follow(host: Host) -> bool:
    with following(host) as follower:
        wait_until("it hears or is refused", lambda: follower.read() or follower.process.poll() is not None)
        return bool(follower.read())


def test_a_follower_that_was_stopped(host: Host, lab: Lab) -> None:
    """It hears what it has missed when it goes on, with the same numbers as everybody."""
    with following(host) as follower:
        follower.wait("started")
        follower.process.send_signal(signal.SIGSTOP)
        pair = host.hot_pair(lab)
        number = wait_for(host, pair, "spliced")["number"]
        follower.process.send_signal(signal.SIGCONT)
        wait_until("it hears of it", lambda: number in [event["number"] for event in follower.read()])
        assert follower.end() == 130


def test_interrupted(host: Host) -> None:
    with following(host) as follower:
        follower.wait("started")
        assert follower.end(signal.SIGINT) == 130


def test_into_a_pipe(host: Host) -> None:
    """Whoever reads has seen enough, and nothing happens that would be written."""
    line = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$@" | head -n 1',
            "sh",
            *command_line("events", "--follow", "--limit=1", f"--run-dir={host.run_dir}"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd="/",
        env=environment(),
    )
    assert line.stdout.count("\n") == 1
    assert line.stderr == ""


def test_no_daemon(tmp_path: Path) -> None:
    for arguments in ((), ("--follow",)):
        done = call("events", *arguments, f"--run-dir={tmp_path}")
        assert done.code == 3
        assert done.stderr.startswith("splicer: not running")


@pytest.mark.parametrize("given", ["-1", "many"])
def test_a_bad_limit(given: str) -> None:
    done = call("events", f"--limit={given}")
    assert (done.code, done.stdout) == (2, "")
