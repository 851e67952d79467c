# SPDX-License-Identifier: Apache-2.0
"""Some thousand connections at a time: nothing is kept of all of them at once, nobody is missed, and the stop
says what it leaves. How long it takes is for the benchmark."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.bpf import counting_runs, read_counter, read_runs
from support.daemon import REPOSITORY, call, wait_until
from support.enlisting import sweeping
from support.host import Host
from support.lab import Lab

from splicer.kernel import libbpf
from splicer.kernel.layout import PAIR, STATE_SPLICED, WATCH_PAIRS

THRONG = REPOSITORY / "splicer" / "bench" / "loads" / "throng.py"
PORT = 900
NUMBER = 3000
# One client may take the place of another at the rendezvous; then it is plain.
NEARLY = 0.97
LEFT = 40
AMOUNTS = ("redirected_bytes", "redirected_messages")


class Throng:
    """A process with many connections to itself, below the attached cgroup."""

    def __init__(self, host: Host, lab: Lab, number: int) -> None:
        inside = f'echo $$ > {host.cgroup.path}/cgroup.procs && exec "$@"'
        program = [sys.executable, "-I", str(THRONG), "127.0.0.1", str(PORT), str(number)]
        self._process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{lab.namespace('a')}", "sh", "-c", inside, "sh", *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = number
        assert self.listen() == ["connected"]

    def listen(self) -> list[str]:
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def tell(self, command: str) -> list[str]:
        """What it says when it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.listen()

    def close(self) -> None:
        """Let it end, in peace."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(timeout=30)
        assert self._process.stdout is not None
        self._process.stdout.close()
        assert code == 0


@contextmanager
def _throng(host: Host, lab: Lab, number: int = NUMBER) -> Iterator[Throng]:
    """Nearly all of them spliced."""
    throng = Throng(host, lab, number)
    try:
        before = read_counter(host.pin_dir, "drained") - read_counter(host.pin_dir, "spliced")

        def enough() -> bool:
            assert throng.tell("talk 10") == ["talked"]
            now = read_counter(host.pin_dir, "spliced") - read_counter(host.pin_dir, "drained")
            return now + before + spliced >= NEARLY * number

        spliced = host.count_spliced() // 2
        wait_until("nearly all are spliced", enough, timeout=30.0)
        # Many may have been spliced with the last message of these, which had none redirected then.
        assert throng.tell("talk 1") == ["talked"]
        yield throng
    finally:
        throng.close()


@pytest.fixture
def host() -> Iterator[Host]:
    """One of its own: of others' connections some may still be on their way out, for minutes."""
    with Host() as made:
        yield made


def _sum_traffic(status: dict[str, Any]) -> list[int]:
    """Connections, and what was redirected, whoever it was; those that are closed are among them."""
    return [sum(row[key] for row in status["traffic"]) for key in ("connections", *AMOUNTS)]


def _ask_for_stream(host: Host) -> list[dict[str, Any]]:
    """The lines of an answer."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(30)
        control.connect(str(host.run_dir / "control.sock"))
        control.sendall(b'{"command":"flows","stream":true,"unread":true}\n')
        control.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in control.makefile("rb")]


def test_status_and_flows_of_many(host: Host, lab: Lab) -> None:
    """Each is counted once and shown once, and flows come in parts."""
    before = _sum_traffic(host.daemon.status())
    with _throng(host, lab) as throng:
        status = host.daemon.status()
        connections = status["connections"]
        known = sum(connections.values())
        assert NEARLY * throng.number <= connections["spliced"] <= known <= throng.number
        traffic = [now - then for now, then in zip(_sum_traffic(status), before, strict=True)]
        # One that was spliced with its very last message has had none redirected.
        assert NEARLY * connections["spliced"] <= traffic[0] <= known
        head, *parts, end = _ask_for_stream(host)
        assert head == {"ok": True, "result": {"schema": 1}, "rows": "flows"}
        rows = [row for part in parts for row in part["rows"]]
        assert end == {"end": known}
        assert max(len(part["rows"]) for part in parts) <= 256
        assert len({row["local"] for row in rows}) == len(rows) == known
        spliced = [row for row in rows if row["state"] == "spliced"]
        assert len(spliced) == connections["spliced"]
        assert all(row["client_unread"] == {"redirected_bytes": 0, "tcp_bytes": 0} for row in spliced)
        assert traffic[1:] == [sum(row[key] for row in rows) for key in AMOUNTS]
        shown = json.loads(call("flows", "--json", f"--run-dir={host.run_dir}", timeout=60).stdout)
        assert sorted(row["local"] for row in shown["flows"]) == sorted(row["local"] for row in rows)


def test_records_are_read_some_at_a_time(host: Host, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """For status, for flows, and to find out what is left at a stop: never all of them."""
    with _throng(host, lab), sweeping(host) as sweeper:
        monkeypatch.setattr(libbpf, "BATCH", 256)
        sizes: list[int] = []
        step = libbpf.Walk.step

        def watched(self: libbpf.Walk, wanted: int) -> Any:
            found = step(self, wanted)
            if found is not None and len(found[1]) % PAIR.size == 0:
                sizes.append(len(found[1]) // PAIR.size)
            return found

        monkeypatch.setattr(libbpf.Walk, "step", watched)
        tally = sweeper.tally()
        numbers = [sum(tally.states.values())]
        numbers.append(sum(len(some) for some in sweeper.walk_connections()))
        assert tally.states[STATE_SPLICED] >= NEARLY * NUMBER
        assert sum(amount.connections for amount in tally.amounts.values()) >= tally.states[STATE_SPLICED]
        left, namespaces = sweeper.find_left()
        assert left == tally.states[STATE_SPLICED]
        assert len(namespaces) == 1
        assert numbers[0] == numbers[1]
        assert max(sizes) <= 512
        assert len(sizes) >= 3 * tally.states[STATE_SPLICED] // 512


def test_a_look_at_all_takes_a_run_for_eight(lab: Lab) -> None:
    with Host() as host, _throng(host, lab):
        host.daemon.kill()
        with sweeping(host) as sweeper, counting_runs():
            spliced = sweeper.tally().states[STATE_SPLICED]
            before = read_runs(host.pin_dir, "watch")
            assert sweeper.watch_all().looked == spliced
            assert read_runs(host.pin_dir, "watch") - before == math.ceil(spliced / WATCH_PAIRS)
        host.start()


def test_rounds_find_each_of_them(host: Host, lab: Lab) -> None:
    """A round of the daemon's: no more runs than that, and some for its steps."""
    with _throng(host, lab) as throng, counting_runs():
        before = read_runs(host.pin_dir, "watch")
        wanted = throng.number * NEARLY / WATCH_PAIRS
        wait_until("all were looked at", lambda: read_runs(host.pin_dir, "watch") - before >= wanted)


def test_stop_says_what_it_leaves(lab: Lab) -> None:
    """Those whose readers take nothing stay as they are, and are counted: all others are out. Nobody loses a
    byte of it."""
    with Host("--stop-timeout=3") as host, _throng(host, lab) as throng:
        assert throng.tell(f"leave {LEFT}") == ["left"]
        spliced = {end["local"] for end in host.daemon.flows() if end["state"] == "spliced"}
        assert host.daemon.stop() == 0
        [said] = [
            json.loads(line) for line in host.daemon.log.read_text().splitlines() if '"drained"' in line
        ]
        assert said["connections"] >= NEARLY * throng.number
        assert LEFT - len(spliced) <= said["unread_connections"] <= LEFT
        assert said["unread_connections"] >= NEARLY * LEFT - 1
        assert throng.tell(f"take {LEFT}") == ["taken"]
        assert throng.tell("talk 2") == ["talked"]
