# SPDX-License-Identifier: Apache-2.0
"""The differences that KNOWN_ISSUES.md lists: each is shown, beside what plain TCP does.

A test here that fails because the spliced connection behaves as plain TCP is good news: then the entry goes.
"""

from __future__ import annotations

import socket
import subprocess
import time

from support.host import EAGER
from support.players import Pair, PeerError
from support.wire import Wire


def test_close_with_unread_data(wire: Wire) -> None:
    """Plain TCP answers a close with unread data by a RST; spliced, the peer sees an orderly end."""
    pair = wire.hot_pair()
    pair.client.say("never read")
    assert pair.server.wait_fionread(count=10) == 10
    pair.server.close()
    if wire.spliced:
        assert pair.client.expect_eof()
    else:
        assert pair.client.attempt("expect_eof") == "ECONNRESET"


def test_urgent_data(wire: Wire) -> None:
    """Plain TCP keeps an urgent byte out of the stream; spliced, it is a byte like any other."""
    pair = wire.hot_pair()
    pair.client.say("ab!", flags=socket.MSG_OOB)
    if wire.spliced:
        assert pair.server.hear(3) == "ab!"
        assert "PRI" not in pair.server.poll()
    else:
        assert "PRI" in pair.server.wait_events(events=["PRI"])
        assert pair.server.hear(2) == "ab"
        assert pair.server.hear_once(count=1, flags=socket.MSG_OOB) == "!"


def test_splice_while_redirected_bytes_wait(wire: Wire) -> None:
    """splice(2) by a reader that never used it before does not see redirected bytes that wait; recv(2) does,
    and what is sent afterwards is seen by both."""
    pair = wire.hot_pair()
    pair.client.send(1000)
    assert pair.server.wait_fionread(count=1000) == 1000
    if wire.spliced:
        assert pair.server.attempt("splice_nothing") == "EAGAIN"
        assert pair.server.recv(1000) == 1000
        wire.host.wait_flow(pair, "paired", "splice_reader")
    else:
        assert pair.server.splice_in(count=1000) == 1000
    pair.client.send(1000)
    assert pair.server.splice_in(count=1000) == 1000
    pair.verify()


def test_nonblocking_cleared_and_reset(wire: Wire) -> None:
    """O_NONBLOCK cleared on a spliced socket: a recv(2) asleep may be woken with EAGAIN, here by a RST."""
    pair = wire.hot_pair()
    pair.server.setblocking(blocking=True)
    pair.server.begin("recv_once", count=10)
    time.sleep(0.05)
    pair.client.reset()
    expected = {"ECONNRESET", "EAGAIN"} if wire.spliced else {"ECONNRESET"}
    assert _finish(pair) in expected


def test_nonblocking_cleared_is_noticed(wire: Wire) -> None:
    """O_NONBLOCK cleared on a spliced socket is noticed within seconds; then the connection is plain."""
    pair = wire.hot_pair()
    pair.server.setblocking(blocking=True)
    if wire.spliced:
        wire.host.wait_flow(pair, "paired", "blocking_reader")
    pair.server.begin("recv_once", count=900, flags=socket.MSG_WAITALL)
    for _ in range(3):
        pair.client.send(300)
        time.sleep(0.02)
    assert pair.server.finish() == 900
    pair.verify()


def test_waitall_after_nonblocking_was_cleared(wire: Wire) -> None:
    """MSG_WAITALL on such a socket, not noticed yet: plain TCP waits for all, spliced may return less."""
    pair = wire.hot_pair()
    pair.server.setblocking(blocking=True)
    pair.server.begin("recv_once", count=900, flags=socket.MSG_WAITALL)
    for _ in range(3):
        pair.client.send(300)
        time.sleep(0.02)
    got = pair.server.finish()
    assert got in ((300, 600, 900) if wire.spliced else (900,))
    assert pair.server.recv(900 - got) == 900 - got
    pair.verify()


def test_eager_blocking_reader_reset_before_any_message(wire: Wire) -> None:
    """Under `eager` a blocking server has a psock until the first message: a RST before that may be EAGAIN
    once, and the error comes with the next read."""
    pair = wire.pair(port=EAGER, blocking=(False, True))
    pair.server.begin("recv", count=10)
    time.sleep(0.05)
    pair.client.reset()
    assert _finish(pair) == "ECONNRESET"
    assert pair.server.report()["spurious"] <= int(wire.spliced)


def test_interface_counters(wire: Wire) -> None:
    """Redirected bytes are not seen by interfaces, captures and netfilter; `splicer flows` counts them."""
    pair = wire.hot_pair()
    before, counted = _received_bytes(wire), wire.redirected_bytes(pair)
    pair.pingpong(200, size=1000, answer=1000)
    seen = _received_bytes(wire) - before
    if wire.spliced:
        assert seen < 10_000
        assert wire.redirected_bytes(pair) - counted == 400_000
    else:
        assert seen > 200_000


def _finish(pair: Pair) -> str:
    try:
        return str(pair.server.finish())
    except PeerError as error:
        return error.name


def _received_bytes(wire: Wire) -> int:
    """What eth0 of the server's host has received."""
    command = ["nsenter", f"--net=/run/netns/{wire.lab.namespace('b')}", "cat", "/proc/net/dev"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in listing.splitlines() if line.strip().startswith("eth0:")]
    return int(line.split()[1])
