# SPDX-License-Identifier: Apache-2.0
"""A reader that stops inside recv, holding its socket's lock, holds up its own peer and nobody else."""

from __future__ import annotations

from support.daemon import wait_until
from support.host import Host
from support.lab import Lab
from support.players import JUGGLER


def test_the_daemon_goes_on_beside_a_held_socket(host: Host, lab: Lab) -> None:
    """While a socket's lock is held, the daemon answers, and splices and drains in other namespaces."""
    holder = host.peer(lab, "a", program=JUGGLER)
    held = host.connect(host.peer(lab, "a"), holder, "127.0.0.1")
    host.make_hot(held)
    young = host.connect(host.peer(lab, "a"), host.peer(lab, "a"), "127.0.0.1")
    other = host.connect(host.peer(lab, "b"), host.peer(lab, "b"), "127.0.0.1")
    host.make_hot(other)
    held.client.send(100)
    assert held.server.wait_fionread(count=100) == 100
    held.server.hold(count=100)
    # Nobody's lock is waited for by what puts connections in.
    assert host.make_hot(young)["state"] == "spliced"
    # A drain needs a sweep of this namespace.
    host.daemon.command("drain")
    wait_until("a sweep is held up", lambda: "sweeps_held_up" in host.daemon.log.read_text())
    wait_until("it was drained", lambda: host.flow(other)["state"] == "paired")
    fresh = host.connect(host.peer(lab, "b"), host.peer(lab, "b"), "127.0.0.1")
    assert host.make_hot(fresh)["state"] == "spliced"
    assert host.daemon.status()["healthy"]
    assert held.server.release() == 100
    for pair in (held, young, other, fresh):
        host.make_hot(pair, timeout=10.0)
        pair.verify()
