# SPDX-License-Identifier: Apache-2.0
"""What HAZARDS.md says of the way back to plain TCP, where no other test shows it: readers that believe
FIONREAD, stops and crashes at bad moments, and a namespace that nobody can enter."""

from __future__ import annotations

import socket
import time

import pytest
from support.daemon import wait_until
from support.host import SERVICES, Host
from support.lab import Lab
from support.loans import borrow
from support.pauses import Stopwatch
from support.players import JUGGLER, Pair
from support.tiers import spread

# A daemon that gets its CPU time needs milliseconds; the bound is for one that does not.
LONGEST_DENIAL = 1.0  # seconds
TALKS = 5  # of which one is to be going on when an option is asked for


def _juggling_pairs(host: Host, lab: Lab, count: int) -> list[Pair]:
    """Hot connections between two jugglers."""
    client, server = (host.peer(lab, place, program=JUGGLER) for place in "ab")
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(count)]
    for pair in pairs:
        host.make_hot(pair)
    return pairs


def _count_redirected(host: Host, pair: Pair) -> int:
    return int((host.find_flow(pair) or {"redirected_messages": 0})["redirected_messages"])


# readers that believe FIONREAD


def _ask_while_they_talk(host: Host, pairs: list[Pair], sockets: list[socket.socket]) -> set[str]:
    """The connections' reasons as soon as the option was asked for; none if they had finished by then."""
    client, server = pairs[0].client.peer, pairs[0].server.peer
    local = {f"{pair.client.local[0]}:{pair.client.local[1]}" for pair in pairs}
    reasons = set()
    before = host.daemon.totals()["redirected_messages"]

    def is_begun() -> bool:
        return host.daemon.totals()["redirected_messages"] > before + 30 or not client.is_waiting()

    with Stopwatch() as watch:
        for peer, end in ((client, "client"), (server, "server")):
            conns = [getattr(pair, end).conn for pair in pairs]
            peer.begin("talk", conns=conns, rounds=40, size=200_000, opens=peer is client)
        wait_until("they talk", is_begun)
        if client.is_waiting():
            for sock in sockets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            in_time = client.is_waiting()
            flows = [flow for flow in host.daemon.flows() if flow["local"] in local]
            assert len(flows) == len(pairs)
            reasons = {flow["reason"] for flow in flows if in_time}
        seen = [client.finish(), server.finish()]
    assert max(each["longest"] for each in seen) < LONGEST_DENIAL + watch.paused, seen
    return reasons


def test_reader_of_what_is_available_while_an_option_is_asked_for(host: Host, lab: Lab) -> None:
    """Large messages go round while an option takes the connections back at once. Both ends read a byte and
    then what FIONREAD says: it may say 0 while bytes wait, and not for long."""
    pairs = _juggling_pairs(host, lab, 3)
    sockets = [borrow(pair.server.peer.pid, pair.server.fileno()) for pair in pairs]
    try:
        for _ in range(TALKS):
            for pair in pairs:
                host.make_hot(pair, timeout=30.0)
            if reasons := _ask_while_they_talk(host, pairs, sockets):
                break
        else:
            raise AssertionError("each talk was over before the option was asked for")
    finally:
        for sock in sockets:
            sock.close()
    assert reasons == {"rcvlowat"}
    for pair in pairs:
        pair.verify()


# stops


def test_pair_that_is_left_behind_goes_on_redirecting(lab: Lab) -> None:
    """Nothing is read while splicer stops. The connection goes on being redirected when splicer has gone, and
    nobody keeps the promises of guard: SO_RCVLOWAT is not honoured (a known difference)."""
    with Host("--stop-timeout", "1") as host:
        [pair] = _juggling_pairs(host, lab, 1)
        pair.client.send(100)
        assert pair.server.wait_fionread(count=100) == 100
        assert host.daemon.stop() == 0
        assert '"unread_connections": 1' in host.daemon.tail()
        assert host.list_pins() == []
        before = pair.server.count_through_tcp()
        for _ in range(10):
            pair.client.send(100)
        assert pair.server.wait_fionread(count=1100) == 1100
        assert pair.server.recv(1100) == 1100
        pair.pingpong(50)
        assert pair.server.count_through_tcp() == before
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 500)
        pair.client.send(100)
        assert "IN" in pair.server.wait_events(events=["IN"])
        assert pair.server.recv(100) == 100
        pair.verify()


def test_bytes_of_a_server_that_has_closed_before_the_stop(lab: Lab) -> None:
    """The server has closed, its last bytes wait unread at the client as splicer stops: nobody counts that
    connection, and the client gets the bytes and the end all the same."""
    with Host("--stop-timeout", "1") as host:
        [pair] = _juggling_pairs(host, lab, 1)
        for _ in range(5):
            pair.server.send(200)
        pair.server.close()
        wait_until("its record has gone", lambda: host.find_flow(pair) is None)
        assert host.daemon.stop() == 0
        assert '"unread_connections": 0' in host.daemon.tail()
        assert host.list_pins() == []
        # Level-triggered epoll, and no more than FIONREAD says.
        pair.client.peer.call("recv_told", conns=[pair.client.conn], count=1000, edge=False)
        assert pair.client.expect_eof()


def test_reader_far_behind_when_splicer_stops(lab: Lab) -> None:
    """Backpressure has set in, so TCP bytes wait behind redirected ones, and nothing is read while splicer
    stops: who simply reads gets all of them."""
    with Host("--stop-timeout", "1") as host:
        [pair] = _juggling_pairs(host, lab, 1)
        sent = pair.client.send_until_full(chunk=16_384, limit=1 << 26)
        assert sent["stopped"] == "full"
        assert (host.find_flow(pair) or {})["reason"] == "backpressure"
        assert host.daemon.stop() == 0
        assert host.list_pins() == []
        assert pair.server.recv(sent["bytes"]) == sent["bytes"]
        pair.pingpong(50)
        pair.verify()


# crashes


@pytest.mark.parametrize("delay", spread([0.0, 0.003, 0.02], [0.003], "further moments"))
def test_killed_while_a_drain_goes_on_under_an_exact_reader(lab: Lab, delay: float) -> None:
    """The daemon dies at some moment of `splicer drain`, which leaves pairs half out or on their way. A
    reader that reads only what FIONREAD says has got everything soon after the next start."""
    with Host() as host:
        pairs = _juggling_pairs(host, lab, 3)
        reader = pairs[0].server.peer
        total = 300 * 200
        reader.begin(
            "recv_told", conns=[pair.server.conn for pair in pairs], count=total, edge=False, patience=30.0
        )
        for number in range(300):
            if number == 100:
                host.daemon.drain()
                time.sleep(delay)
                host.daemon.kill()
            for pair in pairs:
                pair.client.send(200)
        host.daemon.ready_file.unlink(missing_ok=True)
        host.start()
        wait_until("it got everything", lambda: not reader.is_waiting())
        reader.finish()
        # It was a stream, which is not tried again soon.
        wait_until("no way back", lambda: all(host.flow(pair)["state"] != "draining" for pair in pairs))
        host.forget_cool_downs()
        for pair in pairs:
            host.make_hot(pair, timeout=10.0)
            pair.verify()


# a namespace without process and name


def _stranded_pair(host: Host, lab: Lab) -> Pair:
    """A hot connection in a network namespace that no process is in any more, and that has no name."""
    client, server = host.peer(lab, "a", program=JUGGLER), host.peer(lab, "a", program=JUGGLER)
    server.call("leave_home")
    client.call("follow", pid=server.pid)
    pair = host.connect(client, server, "127.0.0.1")
    host.make_hot(pair)
    for peer in (client, server):
        peer.call("go_home")
    before = _count_redirected(host, pair)
    pair.pingpong(20)
    assert _count_redirected(host, pair) == before + 40, "it is not redirected any more"
    return pair


def _expect_tcp_again(host: Host, pair: Pair) -> None:
    def passes() -> bool:
        before = _count_redirected(host, pair)
        pair.pingpong(10)
        return _count_redirected(host, pair) == before

    wait_until("no message is redirected", passes, timeout=5.0)
    before = _count_redirected(host, pair)
    pair.pingpong(100)
    assert _count_redirected(host, pair) == before
    pair.verify()


def test_off_in_a_namespace_that_nobody_can_enter(host: Host, lab: Lab) -> None:
    """Off means off also there: adopt cannot visit the pair, and the watch ends the redirecting."""
    pair = _stranded_pair(host, lab)
    try:
        host.reload(f'[[policy]]\nports = {pair.server.local[1]}\nmode = "off"\n')
        _expect_tcp_again(host, pair)
    finally:
        host.reload(SERVICES)


def test_drain_in_a_namespace_that_nobody_can_enter(host: Host, lab: Lab) -> None:
    """So does `splicer drain`; the connection stays plain, for nobody can adopt it again."""
    pair = _stranded_pair(host, lab)
    host.daemon.drain()
    _expect_tcp_again(host, pair)
