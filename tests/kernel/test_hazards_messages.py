# SPDX-License-Identifier: Apache-2.0
"""What HAZARDS.md says of messages, where no other test shows it: known differences, and what is done about
them."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import pytest
from support.daemon import wait_until
from support.firewall import Firewall
from support.host import EAGER, SERVICES, Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import JUGGLER, Pair
from support.wire import Wire

TCP_KEEPALIVE_S = 2  # TCP_KEEPIDLE
PAGE_FRAGMENT = 32768  # sk_page_frag_refill()
COPIED_AT_MOST = 16384  # take_one_element()


def _juggling_pair(wire: Wire) -> Pair:
    """A hot connection between two jugglers."""
    client, server = (wire.host.peer(wire.lab, place, inside=wire.spliced, program=JUGGLER) for place in "ab")
    pair = wire.host.connect(client, server, wire.lab.address("b"))
    wire.heat(pair)
    return pair


# eager


def test_eager_first_message_and_fionread(wire: Wire) -> None:
    """Under `eager` on class B, FIONREAD says 0 for a first message that waits; not for long, and then it
    counts everything."""
    client, server = wire.peers("a", "b")
    pairs = [wire.host.connect(client, server, wire.lab.address("b"), port=EAGER) for _ in range(4)]
    told = []
    for pair in pairs:
        pair.client.send(100)
        assert "IN" in pair.server.wait_events(events=["IN"])
        told.append(pair.server.fionread())
    known = wire.spliced and wire.host.daemon.status()["fionread"] == "nobody"
    assert set(told) <= ({0, 100} if known else {100})
    assert not known or 0 in told, "not a difference any more"
    for pair in pairs:
        assert pair.server.wait_fionread(count=100, timeout=10.0) == 100
        assert pair.server.recv(100) == 100
        pair.verify()


# a reader that holds its socket's lock


def test_sender_waits_for_a_held_reader(wire: Wire) -> None:
    """While a reader stops inside recv, plain TCP takes what its peer sends; spliced, the peer's non-blocking
    send waits for as long, and then succeeds."""
    pair = _juggling_pair(wire)
    pair.client.send(100)
    assert pair.server.wait_fionread(count=100) == 100
    pair.server.hold(count=100)
    pair.client.begin_send(count=200)
    if wire.spliced:
        assert pair.client.attempt("finish_send", timeout=0.5) == "TIMEOUT"
    else:
        assert pair.client.finish_send() == 200
    assert pair.server.release() == 100
    assert pair.client.finish_send() == 200
    assert pair.server.recv(200) == 200
    pair.verify()


# memory that is not there


@pytest.mark.parametrize(("size", "waiting"), [(3000, 12), (16_000, 5), (20_000, 5), (100_000, 1)])
def test_buffer_that_ends_within_a_message(wire: Wire, size: int, waiting: int) -> None:
    """A reader whose memory is not there in the middle of a message gets the rest of it later. (The kernel
    cannot do that for a message of several elements, and frees the pages of the first ones twice.)"""
    pair = wire.hot_pair()
    for _ in range(4):
        before = wire.redirected_messages(pair)
        # More than a page fragment; as long as it is in use the next message begins where the last one ends.
        pair.client.send(size * waiting, chunk=size)
        assert pair.server.wait_fionread(count=size * waiting) == size * waiting
        for _ in range(waiting):
            taken = pair.server.recv_cut_short(count=size, room=size - 1)
            assert pair.server.recv(size - taken) == size - taken
        if wire.spliced:
            # Small ones in one piece wherever they begin, large ones in pieces of one element.
            pieces = wire.redirected_messages(pair) - before
            if size <= COPIED_AT_MOST:
                assert pieces == waiting
            else:
                assert max(size / PAGE_FRAGMENT, 1) * waiting < pieces
    pair.pingpong(20)
    pair.verify()


# streams


def test_stream_goes_back_and_stays_longer_each_time(lab: Lab) -> None:
    """Many small messages without an answer: the connection goes back as a `stream`, and is not tried again
    soon. The time doubles."""
    with Host() as host:
        pair = host.hot_pair(lab)
        for least in (30, 60):
            # More messages than make a stream, and fewer than may wait: a reader may be late.
            pair.server.begin("recv", count=60_000)
            pair.client.send(60_000, chunk=300)
            pair.server.finish()
            host.wait_flow(pair, "paired", "stream")
            pair.pingpong(200)
            assert host.flow(pair)["state"] == "paired"
            assert host.forget_cool_downs() == [least]
            host.make_hot(pair)
        pair.verify()


def test_stream_of_larger_messages_stays(wire: Wire) -> None:
    """It is the size of what is sent that counts, whatever the pieces are that it is redirected in."""
    pair = wire.hot_pair()
    before = wire.redirected_messages(pair)
    # Less than may wait: a reader may be late.
    size = 16_500
    pair.server.begin("recv", count=120 * size)
    pair.client.send(120 * size, chunk=size)
    pair.server.finish()
    if wire.spliced:
        assert wire.redirected_messages(pair) - before > 120, "none was redirected in pieces"
        assert wire.host.flow(pair)["state"] == "spliced"
    pair.pingpong(10)
    pair.verify()


def test_stream_within_a_namespace_goes_back(host: Host, lab: Lab) -> None:
    """Whatever its size: TCP over loopback is faster than a message at a time."""
    pair = host.connect(host.peer(lab, "a"), host.peer(lab, "a"), lab.address("a"))
    host.make_hot(pair)
    size = 20_000
    pair.server.begin("recv", count=100 * size)
    pair.client.send(100 * size, chunk=size)
    pair.server.finish()
    host.wait_flow(pair, "paired", "stream")
    pair.pingpong(10)
    pair.verify()


# what sees packets


def test_rule_added_later_does_not_stop_it(wire: Wire) -> None:
    """A firewall rule that forbids an established connection stops plain TCP. Spliced, messages go on until
    the policy is `off`; then TCP is back, and the rule holds."""
    pair = wire.hot_pair()
    port = pair.server.local[1]
    with Firewall(wire.lab.namespace("b")).dropping(port):
        try:
            if wire.spliced:
                pair.pingpong(50)
                wire.host.reload(f'[[policy]]\nports = {port}\nmode = "off"\n')
                wire.host.wait_flow(pair, "paired", "policy_off")
            pair.client.send(100)
            assert pair.server.attempt("recv", count=100, timeout=0.5) == "TIMEOUT"
        finally:
            if wire.spliced:
                wire.host.reload(SERVICES)
    # TCP sends it again.
    assert pair.server.recv(100) == 100
    pair.pingpong(10)
    pair.verify()


def test_keep_alive_probes_on_a_busy_connection(wire: Wire) -> None:
    """Keep-alive takes a busy spliced connection for an idle one and sends probes; they do no harm."""
    keep_alive = [
        [socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1],
        [socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_KEEPALIVE_S],
        [socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, TCP_KEEPALIVE_S],
    ]
    pair = wire.hot_pair(options=(keep_alive, []))
    before, end = _count_probes(wire), time.monotonic() + 1.5 * TCP_KEEPALIVE_S

    def is_probed() -> bool:
        pair.pingpong(20, pause=0.001)
        return _count_probes(wire) > before

    if wire.spliced:
        wait_until("a keep-alive probe was sent", is_probed, timeout=10.0)
        assert wire.host.find_flow(pair)["state"] == "spliced"
    else:
        with Stopwatch() as watch:
            while time.monotonic() < end:
                # Who stands still is idle.
                assert not is_probed() or watch.paused > 0.5
    pair.pingpong(20)
    pair.verify()


def test_conntrack_entry_of_a_busy_connection(wire: Wire) -> None:
    """Redirected messages do not refresh a connection's conntrack entry: it ages as if nothing came."""
    firewall = Firewall(wire.lab.namespace("b"))
    with firewall.tracking():
        if not Path("/proc/net/nf_conntrack").exists():
            pytest.skip("this kernel does not list its conntrack entries in /proc")
        pair = wire.hot_pair()
        seen, end = [], time.monotonic() + 3.0

        def is_ageing() -> bool:
            pair.pingpong(20, pause=0.001)
            seen.append(firewall.count_seconds_left(pair.client.local[1]))
            # Data that has no ACK yet makes it 300 seconds, the ACK 432 000 again.
            return 2 <= max(seen) - seen[-1] < 100

        if wire.spliced:
            wait_until("the entry ages", is_ageing, timeout=10.0)
            assert wire.host.find_flow(pair)["state"] == "spliced"
        else:
            while time.monotonic() < end:
                # The machine may stand still between a message and a look: new messages make it young again.
                assert not (is_ageing() and is_ageing())
        pair.verify()


def _count_probes(wire: Wire) -> int:
    """Keep-alive probes that the client's host has sent."""
    command = ["nsenter", f"--net=/run/netns/{wire.lab.namespace('a')}", "cat", "/proc/net/netstat"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, values = (line.split() for line in text.splitlines()[:2])
    return int(values[names.index("TCPKeepAlive")])
