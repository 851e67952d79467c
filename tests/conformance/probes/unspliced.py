# SPDX-License-Identifier: Apache-2.0
"""Probes on connections that are never spliced, each for the reason that it names: there nothing may differ
at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from support.pauses import Stopwatch

from conformance.probes import probe
from conformance.probes.options import await_stamps, expect_filtered
from conformance.probes.uring import ASYNC, IS_THERE, OP_RECV, Buffer, Uring, name_result
from conformance.scene import Scene, error_name, pattern

SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
BLOCKING = {"blocking": (False, True), "reason": "blocking_reader"}
MSG_ZEROCOPY = 0x4000000


@contextlib.contextmanager
def _asleep(s: Scene, work: Callable[[], Any]) -> Iterator[None]:
    """A thread is asleep in `work`; what that says in the end goes into the transcript."""
    got: list[Any] = []

    def carry_out() -> None:
        try:
            got.append(work())
        except OSError as error:
            got.append(error_name(error))

    thread = threading.Thread(target=carry_out)
    thread.start()
    time.sleep(0.03)
    s.note(f"asleep: {not got}")
    yield
    thread.join(3)
    s.note(f"got {got}")


@probe(**BLOCKING)
def blocking_recv(s: Scene) -> None:
    """A blocking read sleeps until something comes."""
    for word in (b"one", b"two"):
        with _asleep(s, lambda: s.server.sock.recv(100)):
            s.client.send(word)


@probe(**BLOCKING)
def blocking_wait_all(s: Scene) -> None:
    """MSG_WAITALL: all that was asked for in one read, fewer only at the end."""
    with _asleep(s, lambda: len(s.server.sock.recv(900, socket.MSG_WAITALL))):
        for number in range(3):
            s.client.send(pattern(300, number))
            time.sleep(0.01)
    with _asleep(s, lambda: len(s.server.sock.recv(900, socket.MSG_WAITALL))):
        s.client.send(pattern(300))
        s.client.shutdown(socket.SHUT_WR)


@probe(**BLOCKING)
def blocking_peek_wait_all(s: Scene) -> None:
    """MSG_PEEK with MSG_WAITALL waits for all and takes nothing."""
    flags = socket.MSG_PEEK | socket.MSG_WAITALL
    with _asleep(s, lambda: s.server.sock.recv(6, flags)):
        s.client.send(b"abc")
        time.sleep(0.01)
        s.client.send(b"def")
    s.server.recv(100)


@probe(**BLOCKING)
def blocking_receive_timeout(s: Scene) -> None:
    """SO_RCVTIMEO: EAGAIN after that time, not earlier; a later read gets what came."""
    s.server.set("RCVTIMEO", SOL, socket.SO_RCVTIMEO, struct.pack("ll", 0, 200_000))
    started = time.monotonic()
    with Stopwatch() as watch:
        s.server.recv(10)
    s.note(f"in time: {time.monotonic() - started > 0.18 and watch.seconds < 0.6}")
    s.client.send(b"x")
    s.server.recv(10)


@probe(**BLOCKING)
def blocking_recv_interrupted(s: Scene) -> None:
    """A signal interrupts a blocking read: EINTR without SA_RESTART, asleep again with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(100)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGALRM, True)
    # Again and again: the first may come before it sleeps.
    signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
    got = libc.recv(s.server.fd, buffer, 100, 0)
    s.note(f"recv = {got}, EINTR: {ctypes.get_errno() == 4}")
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    threading.Timer(0.1, lambda: s.client.sock.send(b"at last")).start()
    got = libc.recv(s.server.fd, buffer, 100, 0)
    s.note(f"recv = {got}, {buffer.raw[:7]!r}")


@probe(**BLOCKING)
def blocking_recv_reset(s: Scene) -> None:
    """A RST wakes a sleeping reader with ECONNRESET."""
    with _asleep(s, lambda: s.server.sock.recv(100)):
        s.client.reset()


@probe(**BLOCKING)
def blocking_recv_ends(s: Scene) -> None:
    """The end of the stream wakes a sleeping reader."""
    with _asleep(s, lambda: s.server.sock.recv(100)):
        s.client.shutdown(socket.SHUT_WR)


@probe(**BLOCKING)
def blocking_shutdown_wakes(s: Scene) -> None:
    """shutdown(SHUT_RD) by another thread wakes a sleeping reader with the end."""
    with _asleep(s, lambda: s.server.sock.recv(100)):
        s.server.sock.shutdown(socket.SHUT_RD)


@probe(blocking=(True, False), reason="blocking_reader")
def blocking_sender(s: Scene) -> None:
    """A blocking sender sleeps until its reader makes room; all of it is taken in one call."""
    data = pattern(12_000_000)
    with _asleep(s, lambda: s.client.sock.send(data)):
        with s.quiet():
            right = s.server.take(len(data)) == data
    s.note(f"right: {right}")


@probe(blocking=(True, True), reason="blocking_reader")
def blocking_both(s: Scene) -> None:
    """Blocking sockets at both ends, as most programs have them."""
    for number in range(30):
        s.client.sock.sendall(pattern(500, number))
        right = s.server.sock.recv(500, socket.MSG_WAITALL) == pattern(500, number)
        s.server.sock.sendall(pattern(700, number))
        right = right and s.client.sock.recv(700, socket.MSG_WAITALL) == pattern(700, number)
        if not right:
            s.note(f"wrong in round {number}")
    s.note("thirty rounds")


@probe(**BLOCKING)
def blocking_readv_and_read(s: Scene) -> None:
    """read(2) and readv(2) on a blocking socket return what is there."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.read(4)
    s.server.readv(2, 2)
    s.server.read(100)


@probe(options=((), ((SOL, socket.SO_RCVLOWAT, 40),)), reason="rcvlowat")
def low_water_from_the_start(s: Scene) -> None:
    """SO_RCVLOWAT: not readable below the mark."""
    s.client.send(pattern(39))
    s.settle()
    s.server.poll(0.02)
    s.client.send(b"x")
    s.settle()
    s.server.poll(1.0)
    s.server.rest()


@probe(options=(((SOL, 60, 1),), ()), reason="zerocopy")
def zero_copy_from_the_start(s: Scene) -> None:
    """SO_ZEROCOPY: every MSG_ZEROCOPY send gets its completion."""
    for number in range(3):
        s.client.send(pattern(20_000, number), MSG_ZEROCOPY)
        s.server.take(20_000)
        s.client.wait(select.POLLERR)
        s.client.recvmsg(1, flags=socket.MSG_ERRQUEUE, ancillary=128)


@probe(options=((), ((SOL, 42, 0),)), reason="peek_offset")
def peek_offset_from_the_start(s: Scene) -> None:
    """SO_PEEK_OFF: each peek goes on where the last ended."""
    s.server.sock.setsockopt(SOL, 42, 0)
    s.client.send(b"0123456789")
    s.settle()
    s.server.recv(3, socket.MSG_PEEK)
    s.server.recv(3, socket.MSG_PEEK)
    s.server.recv(2)
    s.server.recv(100, socket.MSG_PEEK)
    s.server.rest()


@probe(options=(((SOL, 35, 1),), ()), reason="control_messages")
def timestamps_from_the_start(s: Scene) -> None:
    """SO_TIMESTAMPNS: every recvmsg(2) carries a time."""
    await_stamps(s, s.server, s.client)
    for word in (b"a", b"b"):
        s.server.send(word)
        s.settle()
        s.client.call("recvmsg", lambda: len(s.client.sock.recvmsg(4, 256)[1]))


# A program that lets everything through: struct sock_fprog of <linux/filter.h>.
_CODE = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF))
_EVERYTHING = struct.pack("HxxxxxxQ", 1, ctypes.addressof(_CODE))


@probe(options=((), ((SOL, 26, _EVERYTHING),)), reason="socket_filter")
def socket_filter_from_the_start(s: Scene) -> None:
    """SO_ATTACH_FILTER: another filter, put in its place later, holds at once."""
    s.client.send(b"passed on")
    s.settle()
    s.server.rest()
    expect_filtered(s)


@probe(options=(((SOL, 47, 50_000_000),), ()), reason="pacing")
def pacing_from_the_start(s: Scene) -> None:
    """SO_MAX_PACING_RATE: the sender is as slow as it asked to be."""
    started = time.monotonic()
    reader = threading.Thread(target=lambda: s.server.take(10_000_000))
    with s.quiet():
        reader.start()
        s.client.push(pattern(10_000_000))
        reader.join(10)
    s.note(f"slow: {time.monotonic() - started > 0.1}")


def _splice_round(client: socket.socket, server: socket.socket) -> None:
    """The server reads by splice(2) and writes by splice(2), as io.Copy and HAProxy do."""
    out, into = os.pipe()
    client.sendall(bytes(64))
    left = 64
    while left:
        select.select([server], [], [], 5)
        moved = os.splice(server.fileno(), into, left, flags=2)
        left -= moved
        os.splice(out, server.fileno(), moved)
    got = 0
    while got < 64:
        select.select([client], [], [], 5)
        got += len(client.recv(64))
    os.close(out)
    os.close(into)


@probe(heat=_splice_round, reason="splice_reader")
def splice_reader(s: Scene) -> None:
    """A reader that uses splice(2) from the start gets everything."""
    out, into = os.pipe()
    for size in (10, 5000, 30_000):
        s.client.send(pattern(size, size))
        s.settle()
        s.server.call("splice", os.splice, s.server.fd, into, size)
        s.call("pipe", os.read, out, size)
    s.server.call("splice", os.splice, s.server.fd, into, 10, None, None, 2)
    s.client.shutdown(socket.SHUT_WR)
    s.server.call("splice", os.splice, s.server.fd, into, 10)
    os.close(out)
    os.close(into)


def _worker_round(client: socket.socket, server: socket.socket) -> None:
    """A kernel worker reads for the server (IOSQE_ASYNC)."""
    ring, buffer = Uring(), Buffer(64)
    client.sendall(bytes(64))
    ring.submit(OP_RECV, server.fileno(), buffer.address, 64, sqe_flags=ASYNC)
    assert ring.wait() == 64
    ring.close()
    server.sendall(bytes(64))
    select.select([client], [], [], 5)
    client.recv(64)


if IS_THERE:

    @probe(heat=_worker_round, reason="kernel_socket")
    def read_by_a_kernel_worker(s: Scene) -> None:
        """A receive that sleeps in a worker of io_uring is woken by each message."""
        ring = s.keep(Uring())
        for number in range(4):
            buffer = Buffer(100)
            ring.submit(OP_RECV, s.server.fd, buffer.address, 100, sqe_flags=ASYNC)
            s.client.send(pattern(20, number))
            got = ring.wait()
            s.note(f"got {name_result(got)}, right: {buffer.raw.raw[:20] == pattern(20, number)}")


def _discarding_round(client: socket.socket, server: socket.socket) -> None:
    for one, other in ((client, server), (server, client)):
        one.sendall(bytes(64))
        got = 0
        while got < 64:
            select.select([other], [], [], 5)
            flags = socket.MSG_TRUNC if other is server else 0
            got += len(other.recv(64 - got, flags))


@probe(heat=_discarding_round, reason="unknown_reader")
def discarding_reader(s: Scene) -> None:
    """A reader that throws bytes away with MSG_TRUNC from the start."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recv(4, TRUNC)", lambda: len(s.server.sock.recv(4, socket.MSG_TRUNC)))
    s.server.rest()


@probe(port=7102, reason="policy_off")
def service_that_is_off(s: Scene) -> None:
    """A service whose mode is `off` is plain TCP: urgent data, for one, is what it was."""
    s.client.send(b"ab!", socket.MSG_OOB)
    s.settle()
    s.server.poll()
    s.server.recv(10)
    s.server.recv(1, socket.MSG_OOB)
    s.server.close()
    s.until("the end", lambda: s.client.state() not in (1, 4, 5))
    s.client.rest()


@probe(mptcp=True, reason="mptcp")
def multipath(s: Scene) -> None:
    """Multipath TCP."""
    for size in (10, 5000, 100_000):
        s.client.push(pattern(size, size))
        s.server.take(size)
    s.client.call("shutdown", s.client.sock.shutdown, socket.SHUT_WR)
    s.server.take(1)
