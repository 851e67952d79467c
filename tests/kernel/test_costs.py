# SPDX-License-Identifier: Apache-2.0
"""What splicer runs for a connection, by what has become of it: counted, and never timed."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from support.bpf import counting_runs, read_counter, read_runs
from support.daemon import wait_until
from support.host import OFF, Host
from support.hostile import read_map, read_seeds
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import Pair

ROUNDS = 500
SEGMENTS = 20
# Of observe: a look at each of 25 jiffies, which are 25 ms or more (CONFIG_HZ is at most 1000).
LOOKS_PER_SECOND = 40


@pytest.fixture(autouse=True)
def _counting(host: Host) -> Iterator[None]:
    with counting_runs():
        yield


def _remote(host: Host, lab: Lab, outside: str) -> Pair:
    client = host.peer(lab, "a", inside=outside != "client")
    server = host.peer(lab, "b", inside=outside != "server")
    return host.connect(client, server, lab.address("b"))


def _refused(host: Host, lab: Lab) -> Pair:
    pair = host.pair(lab, blocking=(False, True))
    host.watch_cold(pair, "blocking_reader")
    return pair


def _off(host: Host, lab: Lab) -> Pair:
    pair = host.pair(lab, port=OFF)
    pair.pingpong(40)
    host.wait_flow(pair, "paired", "policy_off")
    return pair


def _cooling_down(host: Host, lab: Lab) -> Pair:
    """Taken back to TCP by an option, which is taken away again."""
    pair = host.hot_pair(lab)
    for value in (1000, 1):
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, value)
    host.wait_flow(pair, "paired", "rcvlowat")
    return pair


PLAIN: dict[str, Callable[[Host, Lab], Pair]] = {
    "refused": _refused,
    "off": _off,
    "cooling-down": _cooling_down,
    "remote-server": lambda host, lab: _remote(host, lab, "server"),
    "remote-client": lambda host, lab: _remote(host, lab, "client"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_looks_do_not_depend_on_the_traffic(host: Host, lab: Lab, kind: str) -> None:
    """What is decided is looked at again now and then, however often it is read. Of many segments the best
    counts: in others a connection may just have been tried again."""
    pair = PLAIN[kind](host, lab)
    seen = []
    for _ in range(SEGMENTS):
        before = read_counter(host.pin_dir, "looks")
        with Stopwatch() as watch:
            pair.pingpong(ROUNDS)
            looks = read_counter(host.pin_dir, "looks") - before
        allowed = 2 + 2 * int(watch.seconds * LOOKS_PER_SECOND + 1)
        if looks <= min(allowed, ROUNDS // 4):
            break
        seen.append((looks, allowed))
    else:
        pytest.fail(f"of {2 * ROUNDS} reads so many were looked into (allowed): {seen}")
    pair.verify()


@pytest.mark.parametrize("kind", PLAIN)
def test_sends_of_what_stays_plain_run_nothing(host: Host, lab: Lab, kind: str) -> None:
    pair = PLAIN[kind](host, lab)
    before = read_runs(host.pin_dir, "verdict")
    pair.pingpong(10)
    assert read_runs(host.pin_dir, "verdict") == before
    pair.verify()


def _fewest(host: Host, program: str, pair: Pair, rounds: int) -> int:
    """Runs of a program in the best of some segments: others on this host read, too."""
    found = []
    for _ in range(SEGMENTS):
        before = read_runs(host.pin_dir, program)
        pair.pingpong(rounds)
        found.append(read_runs(host.pin_dir, program) - before)
    return min(found)


def test_a_read_runs_observe_once(host: Host, lab: Lab) -> None:
    """Each read of a message through TCP comes by observe once."""
    pair = _off(host, lab)
    assert _fewest(host, "observe", pair, 20) == 2 * 20
    pair.verify()


def test_a_redirected_message_runs_verdict_once_and_nothing_else(host: Host, lab: Lab) -> None:
    pair = host.hot_pair(lab)
    pair.pingpong(20)
    assert _fewest(host, "verdict", pair, 20) == 2 * 20
    assert _fewest(host, "observe", pair, 20) == 0
    before = {name: read_runs(host.pin_dir, name) for name in ("register", "guard")}
    pair.pingpong(20)
    assert {name: read_runs(host.pin_dir, name) for name in before} == before
    pair.verify()


def test_splice_is_noticed_on_a_connection_that_is_not_looked_at(host: Host, lab: Lab) -> None:
    """One splice(2), on a connection that is refused for another reason, takes the process's others back."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    refused = host.connect(client, server, lab.address("b"), blocking=(True, False))
    host.watch_cold(refused, "blocking_reader")
    other = host.connect(client, server, lab.address("b"))
    host.make_hot(other)
    refused.pingpong(100)
    refused.client.send(64)
    assert refused.server.splice_in(count=64) == 64
    host.wait_flow(other, "paired", "splice_reader")
    refused.verify()
    other.verify()


def test_client_that_reads_before_its_server_is_known_with_its_pair(host: Host, lab: Lab) -> None:
    """It found no pair while its server only talked. It is looked at all the same once there is one."""
    pair = host.pair(lab)
    for _ in range(10):
        pair.server.send(64)
        assert pair.client.recv(64) == 64
    pair.pingpong(5)
    assert host.flow(pair)["reason"] in ("cold", "pending")
    pair.verify()


def test_short_connection_is_in_no_table(host: Host, lab: Lab) -> None:
    """A young connection has a place that stays in the cache, and one that is used again a pair in its stead.
    Nothing of either is left in the end."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    pair = host.pair(lab)
    pair.pingpong(1)
    assert [flow["reason"] for flow in host.daemon.flows()] == ["cold"]
    assert len(read_seeds(host)) == 1
    assert not read_map(host, "seeds")
    pair.pingpong(3)
    assert len(read_map(host, "pairs")) == 1
    assert not read_seeds(host)
    pair.verify()
    other = host.connect(pair.client.peer, pair.server.peer, lab.address("b"))
    assert len(read_seeds(host)) == 1
    assert not read_map(host, "seeds")
    for each in (pair, other):
        each.close()
    wait_until("nothing is left", lambda: not read_seeds(host) and not read_map(host, "pairs"))
