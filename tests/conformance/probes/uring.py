# SPDX-License-Identifier: Apache-2.0
"""Probes through io_uring(7), by the bare system calls: liburing is not needed. Where the kernel has none or
has it switched off they say so, on plain TCP as well."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import threading
import time
from typing import Any

from conformance.probes import probe
from conformance.scene import Scene, names, pattern

_SETUP, _ENTER = 425, 426  # the same on every architecture
_OP_POLL_ADD, _OP_READ, _OP_SEND, OP_RECV = 6, 22, 26, 27
_GETEVENTS, _EXT_ARG = 1, 8
ASYNC = 1 << 4  # IOSQE_ASYNC
_POLL_FIRST = 1  # IORING_RECVSEND_POLL_FIRST
NOWHERE = (1 << 64) - 1  # the offset of what has none
_libc = ctypes.CDLL(None, use_errno=True)


class Uring:
    """A ring of eight, for one operation at a time."""

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(120)
        self.fd = _libc.syscall(ctypes.c_long(_SETUP), ctypes.c_long(8), params)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        words = struct.unpack("<10I", params.raw[:40])
        self.entries, self.cq_entries = words[0], words[1]
        self.sq = dict(
            zip(
                ("head", "tail", "mask", "entries", "flags", "dropped", "array"),
                struct.unpack("<7I", params.raw[40:68]),
                strict=True,
            )
        )
        self.cq = dict(
            zip(
                ("head", "tail", "mask", "entries", "overflow", "cqes"),
                struct.unpack("<6I", params.raw[80:104]),
                strict=True,
            )
        )
        self.rings = mmap.mmap(
            self.fd,
            max(self.sq["array"] + 4 * self.entries, self.cq["cqes"] + 16 * self.cq_entries),
            offset=0,
        )
        self.sqes = mmap.mmap(self.fd, 64 * self.entries, offset=0x10000000)
        # IORING_CQE_F_... of what `wait` returned last.
        self.flags = 0

    def submit(
        self,
        op: int,
        fd: int,
        address: int = 0,
        length: int = 0,
        flags: int = 0,
        prio: int = 0,
        sqe_flags: int = 0,
        offset: int = 0,
        group: int = 0,
        fd_in: int = 0,
    ) -> None:
        """Hand one operation to the kernel; what it left is got by `wait`."""
        tail = self._word(self.sq["tail"])
        index = tail & self._word(self.sq["mask"])
        self.sqes[index * 64 : index * 64 + 64] = struct.pack(
            "<BBHiQQIIQHHi16x", op, sqe_flags, prio, fd, offset, address, length, flags, 7, group, 0, fd_in
        )
        self._put(self.sq["array"] + 4 * index, index)
        self._put(self.sq["tail"], tail + 1)
        self._enter(1, 0, None)

    def wait(self, timeout: float = 8.0) -> int | None:
        """The result of what completed; None if nothing did in time."""
        if self._word(self.cq["head"]) == self._word(self.cq["tail"]):
            self._enter(0, 1, timeout)
        head = self._word(self.cq["head"])
        if head == self._word(self.cq["tail"]):
            return None
        at = self.cq["cqes"] + 16 * (head & self._word(self.cq["mask"]))
        _, result, self.flags = struct.unpack("<QiI", self.rings[at : at + 16])
        self._put(self.cq["head"], head + 1)
        return int(result)

    def close(self) -> None:
        self.rings.close()
        self.sqes.close()
        os.close(self.fd)

    def _enter(self, submit: int, complete: int, timeout: float | None) -> None:
        flags, argument, size = 0, None, 0
        if complete:
            flags = _GETEVENTS | _EXT_ARG
            moment = ctypes.create_string_buffer(
                struct.pack("<qq", int(timeout or 0), int((timeout or 0) % 1 * 1e9))
            )
            argument = ctypes.create_string_buffer(struct.pack("<QIIQ", 0, 8, 0, ctypes.addressof(moment)))
            size = 24
        done = _libc.syscall(
            *(ctypes.c_long(each) for each in (_ENTER, self.fd, submit, complete, flags)),
            argument,
            ctypes.c_size_t(size),
        )
        if done < 0 and ctypes.get_errno() not in (errno.ETIME, errno.EINTR):
            raise OSError(ctypes.get_errno(), "io_uring_enter")

    def _word(self, at: int) -> int:
        return int(struct.unpack("<I", self.rings[at : at + 4])[0])

    def _put(self, at: int, value: int) -> None:
        self.rings[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)


def make_ring(s: Scene) -> Uring | None:
    try:
        return s.keep(Uring())
    except OSError as error:
        s.note(f"no io_uring: {errno.errorcode[error.errno or 0]}")
        return None


def _is_there() -> bool:
    with contextlib.suppress(OSError):
        Uring().close()
        return True
    return False


# Without io_uring there is nothing to send, and so nothing to redirect.
IS_THERE = _is_there()


def name_result(number: int | None) -> Any:
    if number is None:
        return "nothing yet"
    return errno.errorcode[-number] if number < 0 else number


class Buffer:
    def __init__(self, size: int) -> None:
        self.raw = ctypes.create_string_buffer(size)
        self.address = ctypes.addressof(self.raw)


def _recv(s: Scene, ring: Uring, size: int, op: int = OP_RECV) -> bytes:
    buffer = Buffer(size)
    s.moment()
    # Without MSG_DONTWAIT a ring waits even where the socket does not block.
    flags = socket.MSG_DONTWAIT if op == OP_RECV else 0
    ring.submit(op, s.server.fd, buffer.address, size, flags, offset=NOWHERE if op == _OP_READ else 0)
    got = ring.wait()
    data = buffer.raw.raw[: max(got or 0, 0)]
    s.note(f"io_uring op {op} ({size}) = {name_result(got)} {data[:48]!r}")
    return data


@probe(redirects=IS_THERE)
def uring_recv(s: Scene) -> None:
    """IORING_OP_RECV gets what waits; with nothing there and MSG_DONTWAIT it is EAGAIN."""
    ring = make_ring(s)
    if ring is None:
        return
    _recv(s, ring, 10)
    s.client.send(b"0123456789")
    s.settle()
    _recv(s, ring, 4)
    _recv(s, ring, 100)
    _recv(s, ring, 1)
    s.client.shutdown(socket.SHUT_WR)
    _recv(s, ring, 1)


@probe(redirects=IS_THERE)
def uring_read(s: Scene) -> None:
    """IORING_OP_READ is the same."""
    ring = make_ring(s)
    if ring is None:
        return
    s.client.send(b"0123456789")
    s.settle()
    _recv(s, ring, 4, _OP_READ)
    _recv(s, ring, 100, _OP_READ)


@probe(redirects=IS_THERE)
def uring_poll(s: Scene) -> None:
    """IORING_OP_POLL_ADD completes when something arrives, and not before."""
    ring = make_ring(s)
    if ring is None:
        return
    for number in range(4):
        s.moment()
        ring.submit(_OP_POLL_ADD, s.server.fd, flags=1)
        early = ring.wait(0.02)
        s.client.send(pattern(10, number))
        s.settle()
        got = ring.wait()
        s.note(f"early {name_result(early)}, then {'nothing' if got is None else names(got)}")
        s.server.rest()


@probe(redirects=IS_THERE)
def uring_poll_first(s: Scene) -> None:
    """A receive with IORING_RECVSEND_POLL_FIRST sleeps until something arrives and gets it."""
    _wait_for_each(s, prio=_POLL_FIRST)


@probe(redirects=IS_THERE)
def uring_recv_waits(s: Scene) -> None:
    """A receive that finds nothing sleeps until something arrives and gets it."""
    _wait_for_each(s)


@probe(redirects=IS_THERE)
def uring_recv_in_a_worker(s: Scene) -> None:
    """The same with IOSQE_ASYNC: a kernel worker sleeps in the receive."""
    _wait_for_each(s, sqe_flags=ASYNC)


def _wait_for_each(s: Scene, prio: int = 0, sqe_flags: int = 0) -> None:
    ring = make_ring(s)
    if ring is None:
        return
    for number in range(4):
        buffer = Buffer(100)
        s.moment()
        ring.submit(OP_RECV, s.server.fd, buffer.address, 100, 0, prio, sqe_flags)
        early = ring.wait(0.02)
        s.client.send(pattern(20, number))
        got = ring.wait() if early is None else early
        right = got == 20 and buffer.raw.raw[:20] == pattern(20, number)
        s.note(f"early: {early is not None}, got {name_result(got)}, right: {right}")


@probe(redirects=IS_THERE)
def uring_send(s: Scene) -> None:
    """IORING_OP_SEND sends like send(2)."""
    ring = make_ring(s)
    if ring is None:
        return
    for size in (10, 5000, 100_000):
        data = ctypes.create_string_buffer(pattern(size, size), size)
        s.moment()
        ring.submit(_OP_SEND, s.client.fd, ctypes.addressof(data), size)
        got = ring.wait()
        s.note(f"io_uring send = {name_result(got)}")
        s.server.take(size)


@probe(redirects=IS_THERE)
def uring_waiter_in_a_thread(s: Scene) -> None:
    """A thread asleep in io_uring_enter is woken by what arrives at the socket it polls."""
    ring = make_ring(s)
    if ring is None:
        return
    for number in range(3):
        ring.submit(_OP_POLL_ADD, s.server.fd, flags=1)
        seen: list[int | None] = []
        thread = threading.Thread(target=lambda seen=seen: seen.append(ring.wait(5.0)))
        thread.start()
        time.sleep(0.01)
        s.client.send(b"wake %d" % number)
        thread.join(6)
        s.note(f"woken by {[each and names(each) for each in seen]}")
        s.server.rest()


@probe(redirects=False, cuts=1, drains=1)
def uring_worker_asleep_while_it_gets_hot(s: Scene) -> None:
    """A kernel worker sleeps in a receive (IOSQE_ASYNC) on a non-blocking socket while traffic the other way
    makes the connection hot; the next message wakes it."""
    ring = make_ring(s)
    if ring is None:
        return
    door = s.keep(socket.create_server(("127.0.0.1", 0)))
    client = s.keep(socket.create_connection(door.getsockname()))
    server = s.keep(door.accept()[0])
    for each in (client, server):
        each.setblocking(False)
    for one, other in [(client, server)] * 30:
        one.send(b"x")
        select.select([other], [], [], 3)
        other.recv(10)
    buffer = Buffer(100)
    ring.submit(OP_RECV, server.fileno(), buffer.address, 100, sqe_flags=ASYNC)
    time.sleep(0.02)
    for _ in range(30):
        server.send(b"y")
        select.select([client], [], [], 3)
        client.recv(10)
        time.sleep(0.01)
    for number in range(4):
        client.send(b"wake %d" % number)
        got = ring.wait()
        s.note(f"woken: {name_result(got)} {buffer.raw.raw[: max(got or 0, 0)]!r}")
        if got is None:
            break
        ring.submit(OP_RECV, server.fileno(), buffer.address, 100, sqe_flags=ASYNC)
        time.sleep(0.02)
