# SPDX-License-Identifier: Apache-2.0
"""Sockets that have a second life, and ends whose connection is over: nothing of the old reaches the new, and
nobody waits for bytes that are there (promises 1 and 5 of HAZARDS.md)."""

from __future__ import annotations

import socket

from support.daemon import wait_until
from support.host import Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.wire import Wire


def test_disconnected_and_connected_again(wire: Wire) -> None:
    """connect(AF_UNSPEC) throws away what was unread; the next connection begins with nothing."""
    pair = wire.hot_pair()
    pair.server.say("of the old connection")
    assert pair.client.wait_fionread(count=21) == 21
    address = wire.lab.address("b")
    port = pair.server.peer.call("listen", name="second", family=socket.AF_INET, host=address)
    pair.client.reconnect(host=address, port=port)
    pair.server.peer.call("accept", listener="second", conn="second")
    assert pair.client.fionread() == 0
    assert pair.client.attempt("hear_once", count=64) == "EAGAIN"
    pair.server.peer.call("say", conn="second", text="new")
    assert pair.client.hear(3) == "new"
    pair.server.peer.call("say", conn="second", text="x" * 100)
    assert pair.client.wait_fionread(count=100) == 100


def test_socket_in_its_second_life_is_not_in_the_sockhash(host: Host, lab: Lab) -> None:
    """A reused socket starts as a stranger: its old key is gone, and it can be spliced again."""
    wire = Wire(host, lab, spliced=True)
    pair = wire.hot_pair()
    address = lab.address("b")
    port = pair.server.peer.call("listen", name="second", family=socket.AF_INET, host=address)
    pair.client.reconnect(host=address, port=port)
    pair.server.close()
    wait_until("it is out of the SOCKHASH", lambda: host.count_spliced() == 0, timeout=3.0)


def test_last_bytes_through_tcp_behind_redirected_ones(wire: Wire) -> None:
    """The server's last words go through TCP because its connection drains, and it closes. An edge-triggered
    client that has read the redirected part is woken for the rest."""
    pair = wire.hot_pair()
    pair.client.watch(edge=True)
    pair.client.wakeup(timeout=0)
    pair.server.say("A" * 100)
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    pair.server.say("B" * 100)
    pair.server.close()
    assert "IN" in pair.client.wakeup()
    heard = pair.client.hear_once(count=4096)
    with Stopwatch() as watch:
        while len(heard) < 200 and watch.seconds < 3:
            # A reader may trust a short read: nothing more until the next edge.
            if "IN" in pair.client.wakeup():
                heard += pair.client.hear_once(count=4096)
    assert heard == "A" * 100 + "B" * 100
    assert pair.client.expect_eof()


def test_option_asked_for_between_the_two_insertions_is_seen(host: Host, lab: Lab) -> None:
    """An option set while the connection is hot and pending keeps it plain, whenever it comes."""
    wire = Wire(host, lab, spliced=True)
    for attempt in range(5):
        pair = wire.pair()
        pair.pingpong(14 + attempt)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        host.talk_until(pair, "paired", "rcvlowat")
        pair.verify()
        pair.close()


def test_discarding_reader_stays_plain(host: Host, lab: Lab) -> None:
    """recv(MSG_TRUNC) discards without a buffer, which a spliced socket refuses: such readers stay plain."""
    wire = Wire(host, lab, spliced=True)
    pair = wire.pair()
    for _ in range(4):
        pair.client.say("12345678")
        assert pair.server.wait_fionread(count=8) == 8
        pair.server.recv_once(count=8, flags=socket.MSG_TRUNC)
    pair.pingpong(40)
    host.watch_cold(pair, "unknown_reader")
