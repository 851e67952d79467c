# SPDX-License-Identifier: Apache-2.0
"""Order and completeness while connections are adopted and drained again and again."""

from __future__ import annotations

import random
import time
from socket import AF_INET

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab
from support.pauses import SLOWNESS

CONNECTIONS = 3
LONGEST = 40.0 * SLOWNESS  # seconds for what takes a fraction of that
CASES = [
    ("b", 0, False, 20_000),
    ("b", 0, True, 2_000),
    ("lo", 0, False, 70_000),
    ("b", EAGER, False, 20_000),
]


def _wait_adopted(host: Host) -> None:
    """Until something is spliced again, or for half a second: the load may have ended."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end and not host.daemon.status()["connections"]["spliced"]:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("to", "port", "edge", "largest"), CASES, ids=["bridge", "bridge-edge", "loopback", "bridge-eager"]
)
def test_bursts_while_adopting_and_draining(
    host: Host, lab: Lab, to: str, port: int, edge: bool, largest: int, request: pytest.FixtureRequest
) -> None:
    """Non-blocking peers, both sides bursting messages of random sizes, while every pair is drained and
    adopted again many times: byte-exact in both directions."""
    seconds = request.config.getoption("--order-seconds") / len(CASES)
    chance = random.Random(largest)
    client, server = host.peer(lab, "a"), host.peer(lab, "a" if to == "lo" else to)
    pairs = [host.connect(client, server, lab.address(to), port=port) for _ in range(CONNECTIONS)]
    for pair in pairs:
        host.make_hot(pair)
    before = host.daemon.totals()
    for ends in ([pair.client for pair in pairs], [pair.server for pair in pairs]):
        conns = [end.conn for end in ends]
        arguments = {"seconds": LONGEST, "seed": largest, "largest": largest, "edge": edge}
        ends[0].peer.begin("exchange", conns=conns, **arguments)
    # The test is worth something only if it makes connections change their state many times.
    end, after = time.monotonic() + seconds, before
    while time.monotonic() < end or min(after[name] - before[name] for name in ("drained", "spliced")) < 6:
        assert client.is_waiting(chance.uniform(0.0, 0.04)) and server.is_waiting()
        host.daemon.drain()
        _wait_adopted(host)
        after = host.daemon.totals()
    for peer in (client, server):
        peer.tell_to_end()
    for peer in (client, server):
        peer.finish()
    for pair in pairs:
        pair.verify()
    sent = sum(end.report()["sent"] for pair in pairs for end in (pair.client, pair.server))
    after = host.daemon.totals()
    # Some of it went through TCP, and hardly any of that by a verdict: both ends go in and come out at once.
    assert 0 < after["redirected_bytes"] - before["redirected_bytes"] < sent


@pytest.mark.parametrize("port", [7400, EAGER], ids=["adaptive", "eager"])
def test_coming_and_going_while_adopting_and_draining(host: Host, lab: Lab, port: int) -> None:
    """Connections that come and go by the hundred, ended in every way, while all are drained again and again:
    every echo is right."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    address = lab.address("b")
    server.call("listen", name="door", family=AF_INET, host=address, port=port)
    before = host.daemon.totals()
    # Long enough to become hot, and not so many together that no quiet moment is left for adoption.
    size = {"together": 12, "rounds": 80} if port == EAGER else {"together": 3, "rounds": 1500}
    chance = random.Random(port)
    connections = spliced = 0
    # Whether enough of them are adopted between two drains in one go is a matter of luck.
    for seed in range(15):
        server.begin("serve", listener="door", seconds=LONGEST)
        client.begin(
            "churn", family=AF_INET, host=address, port=port, seconds=2.0 * SLOWNESS, seed=seed, **size
        )
        while client.is_waiting(chance.uniform(0.02, 0.1)):
            host.daemon.drain()
            _wait_adopted(host)
        done = client.finish()
        server.tell_to_end()
        assert server.finish() == done["connections"]
        assert (done["wrong"], done["broken"]) == (0, 0)
        connections += done["connections"]
        after = host.daemon.totals()
        spliced = after["spliced"] - before["spliced"]
        if spliced >= 10:
            break
    print(f"{spliced} spliced of {connections}")
    assert spliced >= 10
    assert connections > 10
    assert after["paired"] - before["paired"] == connections
    wait_until("closed connections are gone", lambda: not host.daemon.flows())
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)


def test_requests_while_adopting_and_draining(host: Host, lab: Lab) -> None:
    """Request and response go on, exactly, while the connection is drained between any two of them."""
    pair = host.hot_pair(lab)
    before = host.daemon.totals()["drained"]
    drained = number = 0
    # Drains that come too fast for the daemon are one.
    while number < 40 or (drained < 10 and number < 400):
        pair.server.begin("echo", rounds=50, size=700, answer=3000)
        pair.client.begin("pingpong", rounds=50, size=700, answer=3000)
        host.daemon.drain()
        pair.client.finish()
        pair.server.finish()
        if number % 4 == 0:
            host.make_hot(pair)
            drained = host.daemon.totals()["drained"] - before
        number += 1
    pair.verify()
    assert drained >= 10


def test_draining_does_not_lose_what_waits_unread(host: Host, lab: Lab) -> None:
    """Bytes that were redirected and not yet read survive draining; those sent during it come after them, and
    an edge-triggered reader is woken for them."""
    pair = host.hot_pair(lab)
    pair.server.watch()
    pair.server.wakeup(timeout=0)
    pair.client.send(3000)
    host.daemon.drain()
    pair.client.send(2000)
    assert pair.server.wakeup() == ["IN"]
    host.wait_flow(pair, "draining")
    assert pair.server.recv(3000) == 3000
    assert pair.server.recv(2000) == 2000
    host.wait_flow(pair, "paired")
    pair.client.send(100)
    assert "IN" in pair.server.wakeup(timeout=2.0)
    assert pair.server.recv(100) == 100
    pair.verify()
