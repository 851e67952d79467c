# SPDX-License-Identifier: Apache-2.0
"""What an application can observe: each script runs on plain TCP and spliced, and expects the same."""

from __future__ import annotations

import socket
import time
from socket import MSG_DONTWAIT, MSG_MORE, MSG_PEEK, MSG_TRUNC
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import EAGER
from support.pauses import Stopwatch
from support.players import Pair, PeerError
from support.wire import Wire

TCP_FASTOPEN = 23
ADAPTIVE_AND_EAGER = pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])


def _dial(wire: Wire, **arguments: Any) -> Pair:
    """A connection whose server has not accepted yet."""
    return wire.host.dial(*wire.peers("a", "b"), wire.lab.address("b"), **arguments)


# beginnings


@ADAPTIVE_AND_EAGER
def test_order_under_defer_accept(wire: Wire, port: int) -> None:
    """TCP_DEFER_ACCEPT: what the client sent before the server's end existed is read first."""
    pair = _dial(wire, port=port, defer_accept=5)
    pair.client.say("1111")
    time.sleep(0.05)
    pair.client.say("2222")
    wire.host.accept(pair)
    pair.client.say("3333")
    assert pair.server.hear(12) == "111122223333"
    pair.server.say("yes")
    assert pair.client.hear(3) == "yes"
    wire.heat(pair)
    pair.verify()


@ADAPTIVE_AND_EAGER
def test_data_sent_before_accept(wire: Wire, port: int) -> None:
    """What waits in the receive queue before accept(2) comes before what is sent afterwards."""
    pair = _dial(wire, port=port)
    for word in ("one ", "two ", "three "):
        pair.client.say(word)
    wire.host.accept(pair)
    pair.client.say("four")
    assert pair.server.hear(18) == "one two three four"
    wire.heat(pair)
    pair.verify()


@ADAPTIVE_AND_EAGER
def test_server_speaks_first(wire: Wire, port: int) -> None:
    """A greeting sent by the server before anything else, read late, is in its place."""
    pair = wire.pair(port=port)
    pair.server.say("220 ready\n")
    time.sleep(0.05)
    pair.server.say("still here\n")
    pair.client.say("hello")
    assert pair.server.hear(5) == "hello"
    pair.server.say("250 ok\n")
    assert pair.client.hear(28) == "220 ready\nstill here\n250 ok\n"
    wire.heat(pair)
    pair.verify()


@ADAPTIVE_AND_EAGER
def test_backlog_that_is_never_quite_read(wire: Wire, port: int) -> None:
    """A reader that is always some bytes behind while its connection gets hot reads everything in order."""
    pair = wire.pair(port=port)
    pair.server.send(5000)
    for _ in range(60):
        pair.client.send(64)
        pair.server.recv(64)
        pair.server.send(64)
        pair.client.recv(64)
    time.sleep(0.1)
    pair.server.send(1000)
    assert pair.client.recv(6000) == 6000
    wire.heat(pair)
    pair.verify()


@ADAPTIVE_AND_EAGER
def test_fast_open(wire: Wire, port: int) -> None:
    """Data in the SYN (TCP Fast Open) is the first that is read."""
    wire.lab.set_sysctl("a", "net.ipv4.tcp_fastopen", "3")
    wire.lab.set_sysctl("b", "net.ipv4.tcp_fastopen", "3")
    for text in ("to get a cookie", "in the SYN"):
        pair = _dial(wire, port=port, fast_open=text, options=[[socket.IPPROTO_TCP, TCP_FASTOPEN, 5]])
        wire.host.accept(pair)
        pair.client.say(" and on")
        assert pair.server.hear(len(text) + 7) == f"{text} and on"
        for _ in range(5):
            pair.pingpong(40)
        pair.verify()
        pair.server.peer.call("unlisten", listener=pair.label)
        pair.close()


# reading


def test_reads_are_a_byte_stream(wire: Wire) -> None:
    """Message boundaries are not preserved: a read takes part of a message, or several at once."""
    pair = wire.hot_pair()
    pair.client.say("abcdefgh")
    assert pair.server.hear(3) == "abc"
    assert pair.server.hear(5) == "defgh"
    for word in ("ab", "cd", "ef"):
        pair.client.say(word)
    assert pair.server.wait_fionread(count=6) == 6
    assert pair.server.hear_once(count=100) == "abcdef"
    assert pair.server.attempt("hear_once", count=1) == "EAGAIN"
    pair.verify()


def test_fionread_counts_what_waits(wire: Wire) -> None:
    """ioctl(FIONREAD) is the number of bytes waiting, before, between and after reads."""
    pair = wire.hot_pair()
    assert pair.server.fionread() == 0
    pair.client.send(100)
    assert pair.server.wait_fionread(count=100) == 100
    pair.client.send(5000)
    assert pair.server.wait_fionread(count=5100) == 5100
    pair.server.recv(1100)
    assert pair.server.fionread() == 4000
    pair.server.recv(4000)
    assert pair.server.fionread() == 0
    pair.verify()


def test_fionread_never_lies_to_a_waiting_reader(wire: Wire) -> None:
    """A reader that reads exactly what FIONREAD says, as nginx does, is never told 0 while it is readable."""
    pair = wire.hot_pair()
    for number in range(200):
        size = 1 + number * 37 % 3000
        pair.client.send(size)
        got = 0
        while got < size:
            assert "IN" in pair.server.wait_events(events=["IN"])
            waiting = pair.server.fionread()
            assert waiting > 0
            got += pair.server.recv_once(count=waiting)
        if number % 5 == 0:
            pair.server.send(64)
            pair.client.recv(64)
    pair.verify()


def test_peek_does_not_consume(wire: Wire) -> None:
    """MSG_PEEK shows what the next reads will return, across messages, and takes nothing."""
    pair = wire.hot_pair()
    pair.client.say("abc")
    pair.client.say("defg")
    assert pair.server.wait_fionread(count=7) == 7
    assert pair.server.hear(2, flags=MSG_PEEK) == "ab"
    assert pair.server.hear(7, flags=MSG_PEEK) == "abcdefg"
    assert pair.server.fionread() == 7
    assert pair.server.hear(1) == "a"
    assert pair.server.hear(3, flags=MSG_PEEK) == "bcd"
    assert pair.server.hear(6) == "bcdefg"
    assert pair.server.attempt("hear_once", count=1, flags=MSG_PEEK) == "EAGAIN"
    pair.verify()


def test_discarding_read(wire: Wire) -> None:
    """MSG_TRUNC throws bytes away and counts them; what comes next is in its place."""
    pair = wire.hot_pair()
    pair.client.say("0123456789")
    assert pair.server.wait_fionread(count=10) == 10
    assert len(pair.server.hear_once(count=4, flags=MSG_TRUNC)) == 4
    assert pair.server.hear_once(count=100) == "456789"


def test_dontwait(wire: Wire) -> None:
    """MSG_DONTWAIT with nothing there is EAGAIN."""
    pair = wire.hot_pair()
    assert pair.server.attempt("hear_once", count=1, flags=MSG_DONTWAIT) == "EAGAIN"
    pair.client.say("x")
    assert pair.server.hear(1) == "x"


# readiness


def test_poll_events(wire: Wire) -> None:
    """poll(2): readable when bytes wait and only then, writable all along."""
    pair = wire.hot_pair()
    assert pair.server.poll() == ["OUT"]
    pair.client.say("ab")
    assert pair.server.wait_events(events=["IN"]) == ["IN", "OUT"]
    pair.server.hear(1)
    assert pair.server.poll() == ["IN", "OUT"]
    pair.server.hear(1)
    assert pair.server.poll() == ["OUT"]


def test_edge_triggered_wakeups(wire: Wire) -> None:
    """EPOLLET: one wake-up for each arrival, none without, whatever has been read."""
    pair = wire.hot_pair()
    pair.server.watch()
    pair.server.wakeup(timeout=0)
    pair.client.say("a")
    assert pair.server.wakeup() == ["IN"]
    assert pair.server.wakeup(timeout=0.1) == []
    pair.client.say("b")
    assert pair.server.wakeup() == ["IN"]
    assert pair.server.hear(2) == "ab"
    assert pair.server.attempt("hear_once", count=1) == "EAGAIN"
    pair.client.say("c")
    assert pair.server.wakeup() == ["IN"]
    assert pair.server.hear(1) == "c"
    pair.client.shutdown(how=socket.SHUT_WR)
    assert pair.server.wakeup() == ["IN", "RDHUP"]
    assert pair.server.expect_eof()
    pair.verify()


def test_level_triggered_wakeups(wire: Wire) -> None:
    """Level-triggered epoll keeps reporting what waits until it has been read."""
    pair = wire.hot_pair()
    pair.server.watch(edge=False)
    pair.client.say("abc")
    for left in ("abc", "bc", "c"):
        assert pair.server.wakeup() == ["IN"], left
        assert pair.server.wakeup() == ["IN"], left
        assert pair.server.hear(1) == left[0]
    assert pair.server.wakeup(timeout=0.1) == []
    pair.verify()


def test_every_arrival_wakes_an_edge_triggered_reader(wire: Wire) -> None:
    """An edge-triggered reader that always reads to EAGAIN is woken for every later message."""
    pair = wire.hot_pair()
    pair.server.watch()
    pair.server.wakeup(timeout=0)
    for _ in range(150):
        pair.client.send(33)
        assert pair.server.wakeup(timeout=2.0) == ["IN"]
        assert pair.server.recv_once(count=1000) == 33
        assert pair.server.attempt("recv_once", count=1) == "EAGAIN"
    pair.verify()


# sending


def test_gathered_and_large_sends(wire: Wire) -> None:
    """sendmsg(2) with many buffers and single sends of up to a megabyte are byte-exact."""
    pair = wire.hot_pair()
    for sizes in ([1] * 60, [5, 0, 7, 100], [4096] * 40, [65_536] * 8, [1_000_000]):
        pair.server.begin("recv", count=sum(sizes))
        pair.client.gather(sizes=sizes)
        assert pair.server.finish() == sum(sizes)
    pair.pingpong(5)
    pair.verify()


def test_sendfile(wire: Wire) -> None:
    """sendfile(2) is byte-exact, for one page and for many."""
    pair = wire.hot_pair()
    for count in (10, 4096, 100_000, 900_000):
        pair.server.begin("recv", count=count)
        pair.client.sendfile(count=count)
        assert pair.server.finish() == count
        pair.pingpong(3)
    pair.verify()


def test_more_to_come(wire: Wire) -> None:
    """MSG_MORE delays at most; order is kept."""
    pair = wire.hot_pair()
    pair.client.say("a", flags=MSG_MORE)
    pair.client.say("b")
    assert pair.server.hear(2) == "ab"
    pair.client.say("c", flags=MSG_MORE)
    assert pair.server.hear(1) == "c"
    pair.verify()


def test_idle_connection(wire: Wire) -> None:
    """A connection that was silent for a while goes on as before."""
    pair = wire.hot_pair()
    time.sleep(1.0)
    pair.pingpong(10)
    pair.client.say("x")
    time.sleep(0.5)
    assert pair.server.hear(1) == "x"
    pair.verify()


# endings


def test_end_of_stream_comes_last(wire: Wire) -> None:
    """close(2) right after many sends: the reader gets all bytes, then the end of the stream."""
    pair = wire.hot_pair()
    pair.client.send(30_000, chunk=60)
    pair.client.shutdown(how=socket.SHUT_WR)
    assert "RDHUP" in pair.server.wait_events(events=["RDHUP"])
    assert pair.server.recv_to_eof() == 30_000
    pair.verify()
    pair.close()


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_close_after_sending(wire: Wire, pause: float) -> None:
    """The same with close(2), read at once or only when the closed socket is long gone."""
    pair = wire.hot_pair()
    pair.client.send(20_000, chunk=500)
    sent = pair.client.report()
    pair.client.close()
    time.sleep(pause)
    assert pair.server.recv_to_eof() == 20_000
    received = pair.server.report()
    assert received["received_sum"] == sent["sent_sum"]
    assert received["first_wrong"] is None


def test_half_close(wire: Wire) -> None:
    """After shutdown(SHUT_WR) the other side may go on answering, and its answer is complete."""
    pair = wire.hot_pair()
    pair.client.send(1000)
    pair.client.shutdown(how=socket.SHUT_WR)
    assert pair.server.recv(1000) == 1000
    assert pair.server.expect_eof()
    pair.client.begin("recv", count=150_000)
    pair.server.send(150_000, chunk=10_000)
    assert pair.client.finish() == 150_000
    pair.server.send(5000)
    pair.server.shutdown(how=socket.SHUT_WR)
    time.sleep(0.1)
    assert pair.client.recv(5000) == 5000
    assert pair.client.expect_eof()
    pair.verify()


def test_answer_waits_while_both_ends_close(wire: Wire) -> None:
    """A half-closed response that is read only after the server has closed is complete."""
    pair = wire.hot_pair()
    pair.client.say("request")
    pair.client.shutdown(how=socket.SHUT_WR)
    assert pair.server.hear(7) == "request"
    assert pair.server.expect_eof()
    for _ in range(10):
        pair.server.send(300)
    sent = pair.server.report()
    pair.server.close()
    time.sleep(0.3)
    assert pair.client.recv(3000) == 3000
    assert pair.client.expect_eof()
    assert pair.client.report()["received_sum"] == sent["sent_sum"]


def test_send_after_shutdown(wire: Wire) -> None:
    """send(2) after shutdown(SHUT_WR) is EPIPE, and nothing of it arrives."""
    pair = wire.hot_pair()
    pair.client.shutdown(how=socket.SHUT_WR)
    assert pair.client.attempt("say", text="too late") == "EPIPE"
    assert pair.server.expect_eof()
    pair.server.say("still open")
    assert pair.client.hear(10) == "still open"
    pair.server.shutdown(how=socket.SHUT_WR)
    assert pair.server.attempt("say", text="too late") == "EPIPE"
    assert pair.client.expect_eof()
    pair.verify()


def test_shutdown_of_reading(wire: Wire) -> None:
    """After shutdown(SHUT_RD) an empty queue reads as the end of the stream; what still comes can be read."""
    pair = wire.hot_pair()
    # The byte below comes through TCP, and the kernel's FIONREAD may not count it before the rescue.
    wire.host.expected_rescues = 1
    pair.client.shutdown(how=socket.SHUT_RD)
    assert pair.client.hear_once(count=10) == ""
    assert pair.server.say("x") == 1
    assert pair.client.wait_fionread(count=1, timeout=10.0) == 1
    assert pair.client.hear_once(count=10) == "x"
    assert pair.client.hear_once(count=10) == ""


def test_send_to_a_closed_peer(wire: Wire) -> None:
    """Sending to a peer that has closed is answered by a RST: the first send succeeds, then it is EPIPE."""
    pair = wire.hot_pair()
    pair.server.close()
    assert pair.client.expect_eof()
    assert pair.client.say("anyone?") == 7
    assert "HUP" in pair.client.wait_events(events=["HUP"])
    assert pair.client.attempt("say", text="no?") == "EPIPE"


def test_send_to_a_peer_that_is_closing(wire: Wire) -> None:
    """Sending at the moment the peer closes gives EPIPE or ECONNRESET in the end and no other error."""
    for _ in range(8):
        pair = wire.hot_pair()
        pair.server.begin("close")
        outcomes = set()
        with Stopwatch() as watch:
            while watch.seconds < 3:
                outcome = pair.client.attempt("say", text="x" * 100)
                if outcome == "EAGAIN":
                    time.sleep(0.01)  # the peer is not let run, and there is no more room
                    continue
                outcomes.add(outcome if isinstance(outcome, str) else "sent")
                if isinstance(outcome, str):
                    break
        pair.server.finish()
        assert outcomes - {"sent"}, "the closing of the peer went unnoticed"
        assert outcomes <= {"sent", "EPIPE", "ECONNRESET"}
        wire.host.stop_peers()


def test_reset(wire: Wire) -> None:
    """A RST (SO_LINGER 0) is ECONNRESET at the other end."""
    pair = wire.hot_pair()
    pair.client.reset()
    assert pair.server.wait_events(events=["HUP"]) == ["IN", "OUT", "ERR", "HUP", "RDHUP"]
    assert pair.server.attempt("hear_once", count=10) == "ECONNRESET"
    assert pair.server.attempt("hear_once", count=10) == ""
    assert pair.server.attempt("say", text="x") == "EPIPE"


def test_reset_behind_unread_bytes(wire: Wire) -> None:
    """Bytes that arrived before a RST: the same outcome as on plain TCP, in the same order."""
    pair = wire.hot_pair()
    pair.client.say("last words")
    assert pair.server.wait_fionread(count=10) == 10
    pair.client.reset()
    assert "HUP" in pair.server.wait_events(events=["HUP"])
    assert pair.server.attempt("hear_once", count=20) == "last words"
    assert pair.server.attempt("hear_once", count=20) == "ECONNRESET"


def test_reset_while_the_other_end_sends(wire: Wire) -> None:
    """A RST in the middle of a transfer ends the sender with ECONNRESET or EPIPE."""
    pair = wire.hot_pair()
    pair.server.begin("send", count=100_000_000, chunk=20_000, timeout=8.0)
    pair.client.recv(200_000)
    pair.client.reset()
    with pytest.raises(PeerError, match=r"ECONNRESET|EPIPE"):
        pair.server.finish()


def test_process_killed(wire: Wire) -> None:
    """A process that is killed closes its connection: its peer reads all it sent, then the end."""
    pair = wire.hot_pair()
    pair.client.send(4000)
    pair.client.peer.kill()
    assert pair.server.recv_to_eof() == 4000
    assert pair.server.report()["first_wrong"] is None


def test_many_short_connections(wire: Wire) -> None:
    """A connection for each request, some long enough to be spliced: all complete, none is left behind."""
    client, server = wire.peers("a", "b")
    for number in range(60):
        pair = wire.host.connect(client, server, wire.lab.address("b"), port=0)
        pair.pingpong(1 + number % 40, size=100, answer=2000)
        pair.server.shutdown(how=socket.SHUT_WR)
        assert pair.client.expect_eof()
        pair.client.close()
        assert pair.server.expect_eof()
        pair.server.close()
    if wire.spliced:
        wait_until("closed connections are gone", lambda: not wire.host.daemon.flows())
