# SPDX-License-Identifier: Apache-2.0
"""The soak's checker finds what is planted: damage, stalls, hangs, ends before their time; nothing else."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from support.daemon import wait_until
from support.pauses import Stopwatch

from soak.crew import Crew, Hand
from soak.relay import DAMAGES, Relay
from soak.tally import percentile, pick

CONNECTIONS = 6
# Orderly ends only, for judging each one that is not.
QUIET = ("rpc", "pipeline", "burst")


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(nonce=0x1234, seed=7)
    yield made
    made.stop()


def begin(
    crew: Crew,
    relay: Callable[[int], Relay] | None,
    patience: float = 12.0,
    patterns: Sequence[str] = QUIET,
    connections: int = CONNECTIONS,
) -> Hand:
    """A server and its clients, with the relay in between; the client."""
    server, client = crew.spawn("server", 0), crew.spawn("client", 0)
    crew.tell(server, "listen", listeners=[{"host": "127.0.0.1", "port": 0}])
    (port,) = crew.wait(server, "listening", 5.0)
    between = port if relay is None else relay(port).port
    crew.tell_all("settings", pace=0.05, patience=patience, patterns=patterns, reads=[])
    targets = [{"family": 4, "host": "127.0.0.1", "port": between, "weight": 1}]
    crew.tell(client, "dial", connections=connections, targets=targets)
    return client


def wait_for(crew: Crew, kind: str, seconds: float = 10.0) -> list[dict[str, object]]:
    deadline = time.monotonic() + seconds
    while True:
        found = [each for each in crew.complaints if each["kind"] == kind]
        if found:
            return found
        assert time.monotonic() < deadline, f"no {kind} was found: {crew.complaints}"
        time.sleep(0.05)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(crew: Crew, name: str) -> None:
    """A byte or a whole piece lost, repeated, misordered, changed, or of another connection."""
    relays: list[Relay] = []

    def spoil(port: int) -> Relay:
        relays.append(Relay(port, DAMAGES[name]))
        return relays[0]

    begin(crew, spoil)
    try:
        faults = wait_for(crew, "fault")
    finally:
        relays[0].close()
    expected = {
        "drop": {"lost", "corrupt", "foreign"},
        "drop_all": {"lost", "corrupt", "foreign"},
        "repeat": {"repeated", "corrupt", "foreign"},
        "repeat_all": {"repeated", "corrupt", "foreign"},
    }
    kinds = {str(each["fault"]) for each in faults}
    assert kinds <= expected.get(name, {"lost", "repeated", "misordered", "corrupt", "foreign"})


def test_a_pause_on_the_way_is_a_stall(crew: Crew) -> None:
    """Bytes that are on their way for 0.6 s are a stall of about that length."""
    relays: list[Relay] = []

    def hold(port: int) -> Relay:
        relays.append(Relay(port, hold=0.6))
        return relays[0]

    begin(crew, hold)
    try:
        deadline = time.monotonic() + 10.0
        worst = 0.0
        with Stopwatch() as watch:
            while worst < 0.45 and time.monotonic() < deadline:
                time.sleep(0.2)
                worst = max((each["seconds"] for each in crew.sum_tallies().worst["plain"]), default=0.0)
    finally:
        relays[0].close()
    assert 0.45 < worst < 1.5 + watch.paused
    assert not [each for each in crew.complaints if each["kind"] == "fault"]


def test_time_in_which_a_reader_is_stopped_is_no_stall(crew: Crew) -> None:
    """Of 2 s for which bytes are on their way, the ends are stopped for 1.2 s: 0.8 s were waited for them."""
    relays: list[Relay] = []

    def hold(port: int) -> Relay:
        relays.append(Relay(port, hold=2.0))
        return relays[0]

    begin(crew, hold, patterns=("rpc",), connections=1)
    try:
        with Stopwatch() as watch:
            wait_until("bytes are held", lambda: relays[0].done, timeout=10.0)
            for number, pause in ((signal.SIGSTOP, 1.2), (signal.SIGCONT, 0.0)):
                for hand in crew.hands:
                    hand.process.send_signal(number)
                time.sleep(pause)

            def find_stalls() -> list[float]:
                # Shorter ones are the machine's.
                return [each["seconds"] for each in crew.stalls if each["seconds"] > 0.4 - watch.paused]

            seen = wait_until("a stall", find_stalls, timeout=10.0)
    finally:
        relays[0].close()
    assert max(seen) < 1.3 + watch.paused
    assert not [each for each in crew.complaints if each["kind"] != "quiet"]


def test_a_hang_is_found(crew: Crew) -> None:
    """Bytes that never arrive: the connection is reported as stuck."""
    relays: list[Relay] = []

    def hold(port: int) -> Relay:
        relays.append(Relay(port, hold=-1.0))
        return relays[0]

    begin(crew, hold, patience=1.5)
    try:
        (*_, stuck) = wait_for(crew, "stuck")
    finally:
        relays[0].close()
    assert stuck["pattern"] in QUIET


def test_an_orderly_end_in_the_middle_is_found(crew: Crew) -> None:
    """An end of stream without the last frame is not taken for an end."""
    relays: list[Relay] = []

    def cut(port: int) -> Relay:
        relays.append(Relay(port, cut=True))
        return relays[0]

    begin(crew, cut)
    try:
        wait_for(crew, "cut")
    finally:
        relays[0].close()


def test_plain_connections_are_found_right(crew: Crew) -> None:
    """Without a relay: many messages, every pattern, and no complaint."""
    client = begin(crew, None)
    crew.tell(client, "settings", pace=0.1, patience=12.0, patterns=[], reads=[])
    crew.tell(client, "phase", number=1, spliced=False, renew=True)
    crew.tell(client, "dial", connections=60, targets=_targets(crew))
    time.sleep(6.0)
    crew.tell_all("finish")
    deadline = time.monotonic() + 15.0
    while crew.count_open() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert crew.count_open() == 0
    assert crew.complaints == []
    total = crew.sum_tallies()
    assert sum(pick(total.counters["messages"], "plain").values()) > 3000
    assert len(pick(total.counters["connections"], "plain")) > 8
    assert percentile(pick(total.counters["stalls"], "plain"), 0.5) < 0.05


def _targets(crew: Crew) -> list[dict[str, object]]:
    """Another listener, so that this test says where."""
    server = next(hand for hand in crew.hands if hand.role == "server")
    crew.tell(server, "listen", listeners=[{"host": "::", "port": 0, "dual": True}])
    (port,) = crew.wait(server, "listening", 5.0)
    hosts = ((4, "127.0.0.1"), (6, "::1"), (6, "::ffff:127.0.0.1"))
    return [{"family": family, "host": host, "port": port, "weight": 1} for family, host in hosts]
