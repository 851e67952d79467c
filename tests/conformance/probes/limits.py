# SPDX-License-Identifier: Apache-2.0
"""Probes of what runs out or gets in the way: memory, time, a process's life, another sender."""

from __future__ import annotations

import ctypes
import select
import socket
import threading
import time
from collections.abc import Callable
from select import EPOLLET, EPOLLOUT
from typing import Any

from support import pauses
from support.connection import FaultingMemory

from conformance.probes import probe
from conformance.probes.processes import Child
from conformance.scene import Scene, error_name, pattern

SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
TCP_REPAIR = 19
LARGE = 1_000_000
HELD = 0.05  # seconds that a thread is given to get as far as it can
_CLOSED = 7

_libc = ctypes.CDLL(None, use_errno=True)


def _begin(work: Callable[..., Any], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    pauses.sleep(HELD)
    return thread


@probe()
def large_sends_side_by_side(s: Scene) -> None:
    """What a large send(2) has sent stands in one piece, whoever else sends on the same socket meanwhile."""
    reading, sending = FaultingMemory(_libc), FaultingMemory(_libc)
    s.client.send(b"=")
    s.settle()
    s.moment()
    taken: dict[str, int] = {}

    def write(letter: str, size: int) -> None:
        taken[letter] = s.client.sock.send(letter.encode() * size)

    # The reader stops within recv(2), its socket locked. A sender that needs it stops in the middle.
    threads = [_begin(_libc.recv, s.server.fd, ctypes.c_void_p(reading.address), 1, 0)]
    threads += [_begin(write, "A", LARGE), _begin(write, "B", 1000)]
    # When it goes on it finds its own socket locked, by a sender whose memory is not there yet, and has to
    # stand in line behind the others.
    threads.append(_begin(_libc.send, s.client.fd, ctypes.c_void_p(sending.address), 100, 0))
    for memory in (reading, sending):
        memory.provide()
        pauses.sleep(HELD)
    for thread in threads:
        thread.join()
    for memory in (reading, sending):
        memory.close()
    with s.quiet():
        data = s.server.take(sum(taken.values()) + 100)
    pieces = [data[at : at + 1] for at in range(len(data)) if not at or data[at] != data[at - 1]]
    s.note(f"{sorted(set(pieces))}, each in one piece: {len(pieces) == len(set(pieces))}")


# A small send buffer, so that plain TCP need not send much once more of what there was no room for.
@probe(bound="server", options=(((SOL, socket.SO_SNDBUF, 60_000),), ()))
def receiver_out_of_memory(s: Scene) -> None:
    """A reader whose memory cgroup has none left for sockets: its peer is told to wait, and loses nothing."""
    s.note(f"bound: {s.memory is not None}")
    if s.memory:
        s.memory.leave(100_000)
    data, sent, refused = pattern(20_000, 1), 0, set()
    s.moment()
    for _ in range(3):
        try:
            while True:
                sent += s.client.sock.send(data[sent % len(data) :])
        except OSError as error:
            refused.add(error_name(error))
        time.sleep(0.02)
    s.note(f"refused by {sorted(refused)}")
    if s.memory:
        s.memory.free()
    with s.quiet():
        read = s.server.take(sent)
    s.note(f"in order: {read == (data * (sent // len(data) + 1))[:sent]}")
    s.client.push(b"and on")
    s.server.take(6)


# The kernel refuses before anybody is asked where the bytes should go.
@probe(bound="client", redirects=False, cuts=2, drains=1)
def sender_out_of_memory(s: Scene) -> None:
    """A sender whose memory cgroup has none left for sockets: while nothing of it is on its way, TCP takes
    something all the same. Whoever is told to wait is told when that is over, by an edge too."""
    s.note(f"bound: {s.memory is not None}")
    if s.memory:
        s.memory.leave(0)
    epoll = s.keep(select.epoll())
    epoll.register(s.client.sock, EPOLLOUT | EPOLLET)
    epoll.poll(0)
    data = pattern(4500)  # more than a page, which a socket may have in store
    with s.quiet():
        got = s.client.send(data)
    s.note(f"at first: {'taken' if isinstance(got, int) else got}")
    told = True
    # An acknowledgement that is late, of what went before the probe, wakes a sender as well: it tries in vain
    # once more, and waits again.
    while told and not isinstance(got, int):
        told = bool(epoll.poll(8.0))
        with s.quiet():
            got = s.client.send(data)
    count = got if isinstance(got, int) else 0
    s.note(f"told to go on: {told}")
    s.note(f"in the end: {'taken' if count else got}")
    if s.memory:
        s.memory.free()
    with s.quiet():
        right = s.server.take(count) == data[:count]
    s.note(f"right: {right}")
    s.client.push(b"and on")
    s.server.take(6)


@probe()
def time_limit_by_poll(s: Scene) -> None:
    """A read with a time limit as most libraries have it, poll(2) before recv(2): it ends in time with
    nothing there and at once with something."""
    for word in (b"", b"here", b""):
        if word:
            s.client.send(word)
            s.settle()
        limit, started = 5.0 if word else 0.1, time.monotonic()
        s.server.poll(limit)
        s.note(f"waited: {time.monotonic() - started > 0.9 * limit}")
        s.server.recv(10)


@probe(cuts=2, drains=1, storms=0)
def user_timeout_runs_out(s: Scene) -> None:
    """TCP_USER_TIMEOUT: when the reader takes nothing for that long, the connection ends by ETIMEDOUT."""
    s.client.fill(30_000)
    s.client.set("USER_TIMEOUT", TCP, socket.TCP_USER_TIMEOUT, 400)
    s.until("it has run out", lambda: s.client.state() == _CLOSED)
    s.client.poll()
    s.client.error()
    s.client.send(b"x", socket.MSG_NOSIGNAL)


@probe(redirects=False, cuts=1, drains=1, storms=0)
def peer_that_vanished(s: Scene) -> None:
    """Keep-alive finds out that the other end is gone without a word, as after the loss of its host."""
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        s.client.sock.setsockopt(TCP, option, 1)
    s.client.set("KEEPALIVE", SOL, socket.SO_KEEPALIVE, 1)
    # A socket under repair says nothing when it is closed.
    s.server.sock.setsockopt(TCP, TCP_REPAIR, 1)
    s.server.close()
    s.until("it was noticed", lambda: s.client.state() == _CLOSED)
    s.client.poll()
    s.client.recv(10)
    s.client.recv(10)


def _send_for_ever(sock: socket.socket, data: bytes) -> None:
    at = 0
    while True:
        try:
            at = (at + sock.send(data[at : at + 3000])) % len(data)
        except BlockingIOError:
            select.select([], [sock], [], 5)


@probe(cuts=3, storms=2)
def sender_killed_while_sending(s: Scene) -> None:
    """SIGKILL to a process in the middle of sending: its peer gets the beginning of the stream, and its
    end."""
    data = pattern(1 << 20, 2)

    def work() -> None:
        s.server.sock.close()
        _send_for_ever(s.client.sock, data)

    child = Child(work)
    s.client.close()
    s.moment()
    with s.quiet():
        got = s.server.take(400_000)
        s.moment()
        child.kill()
        got += s.server.take(1 << 26)
        got += s.server.take(1)
    s.note(f"the beginning: {got == (data * (len(got) // len(data) + 1))[: len(got)]}")
    s.server.poll()
    s.server.recv(10)


@probe(cuts=3, storms=2)
def reader_killed_while_reading(s: Scene) -> None:
    """SIGKILL to a process in the middle of reading: who sends to it is told so by EPIPE or ECONNRESET, and
    soon."""

    def work() -> None:
        s.client.sock.close()
        while True:
            select.select([s.server.sock], [], [], 5)
            s.server.sock.recv(5000)

    child = Child(work)
    s.server.close()
    s.moment()
    with s.quiet():
        s.client.push(pattern(300_000))
    s.moment()
    child.kill()
    outcome, end = "", time.monotonic() + 8
    while not outcome and time.monotonic() < end:
        try:
            s.client.sock.send(bytes(1000), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            select.select([], [s.client.sock], [], 0.1)
        except OSError as error:
            outcome = error_name(error)
    s.note(f"told so: {outcome in ('EPIPE', 'ECONNRESET')}")
