# SPDX-License-Identifier: Apache-2.0
"""A reader that stops inside recv, holding its socket's lock, holds up its own peer and nobody else."""

from __future__ import annotations

import time

import pytest
from support.daemon import wait_until
from support.host import Host
from support.lab import Lab

HOLD = 3.0  # seconds


def test_the_daemon_goes_on_beside_a_held_socket(host: Host, lab: Lab) -> None:
    """While a socket's lock is held, the daemon answers, and splices and drains in other namespaces."""
    held = host.connect(host.peer(lab, "a"), host.peer(lab, "a"), "127.0.0.1")
    host.make_hot(held)
    # It needs a sweep of this namespace while the lock is held: another pair there becomes hot.
    young = host.connect(host.peer(lab, "a"), host.peer(lab, "a"), "127.0.0.1")
    other = host.connect(host.peer(lab, "b"), host.peer(lab, "b"), "127.0.0.1")
    held.client.send(100)
    started = time.monotonic()
    held.server.begin("recv_held", count=100, seconds=HOLD)
    time.sleep(0.2)
    if not held.server.peer.is_waiting():
        pytest.fail("recv returned at once")
    young.pingpong(60)
    flow = host.make_hot(other, timeout=2.0)
    assert flow["state"] == "spliced"
    host.daemon.command("drain")
    wait_until("it was drained", lambda: host.daemon.totals()["drained"] >= 1, timeout=2.0)
    assert host.daemon.status()["healthy"]
    assert time.monotonic() - started < HOLD, "the test itself was too slow to show anything"
    assert held.server.finish() == 100
    for pair in (held, young, other):
        host.make_hot(pair, timeout=10.0)
        pair.verify()
