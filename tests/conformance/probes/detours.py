# SPDX-License-Identifier: Apache-2.0
"""Probes of the less usual ways to read and to send: the same bytes by other calls than recv(2) and
send(2)."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Any

from conformance.probes import probe
from conformance.probes.reading import _Iovec
from conformance.probes.uring import IS_THERE, NOWHERE, OP_RECV, Buffer, make_ring, name_result
from conformance.scene import Scene, pattern

_OP_SPLICE, _OP_PROVIDE, _OP_SEND_ZC = 30, 31, 47
_BUFFER_SELECT, _MULTISHOT, _MORE = 1 << 5, 1 << 1, 1 << 1
_RWF_NOWAIT = 8
_TCP_ZEROCOPY_RECEIVE = 35
# io_setup, io_submit, io_getevents.
_AIO = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
_PREAD, _PWRITE = 0, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def _check(got: int) -> int:
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return got


@probe()
def preadv2_and_pwritev2(s: Scene) -> None:
    """preadv2(2) and pwritev2(2) without an offset are readv(2) and writev(2); RWF_NOWAIT changes nothing."""
    s.client.call("pwritev2(10)", _vector, "pwritev2", s.client.fd, bytearray(b"0123456789"), 0)
    s.settle()
    for size in (4, 100, 10):
        buffer = bytearray(size)
        s.server.call(f"preadv2({size})", _vector, "preadv2", s.server.fd, buffer, _RWF_NOWAIT)
        s.note(f"{bytes(buffer[:10])!r}")


def _vector(name: str, fd: int, buffer: bytearray, flags: int) -> int:
    area = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    vector = _Iovec(ctypes.addressof(area), len(buffer))
    offset = ctypes.c_long(-1)
    return _check(getattr(_libc, name)(fd, ctypes.byref(vector), 1, offset, flags))


class _Aio:
    """A context of io_setup(2) for one operation at a time."""

    def __init__(self) -> None:
        self.setup, self.submit, self.events = map(ctypes.c_long, _AIO[os.uname().machine])
        self.context = ctypes.c_ulong(0)
        _check(_libc.syscall(self.setup, ctypes.c_long(1), ctypes.byref(self.context)))

    def __call__(self, operation: int, fd: int, buffer: ctypes.Array[Any]) -> int:
        block = ctypes.create_string_buffer(
            struct.pack("<QIIHhIQQq24x", 0, 0, 0, operation, 0, fd, ctypes.addressof(buffer), len(buffer), 0)
        )
        blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        _check(_libc.syscall(self.submit, self.context, ctypes.c_long(1), blocks))
        event = ctypes.create_string_buffer(32)
        one = ctypes.c_long(1)
        _check(_libc.syscall(self.events, self.context, one, one, event, None))
        result = int(struct.unpack("<QQqq", event.raw)[2])
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


@probe()
def io_submit(s: Scene) -> None:
    """Linux's older asynchronous calls (libaio) read and write a socket like any file."""
    aio = _Aio()
    data = ctypes.create_string_buffer(b"0123456789", 10)
    s.client.call("io_submit(write)", aio, _PWRITE, s.client.fd, data)
    s.settle()
    for size in (4, 100, 10):
        buffer = ctypes.create_string_buffer(size)
        s.server.call(f"io_submit(read, {size})", aio, _PREAD, s.server.fd, buffer)
        s.note(f"{buffer.raw[:10]!r}")


@probe(redirects=IS_THERE)
def uring_multishot(s: Scene) -> None:
    """One receive (IORING_RECV_MULTISHOT) that takes each message as it comes, into buffers that the kernel
    chooses, until the end of the stream."""
    ring = make_ring(s)
    if ring is None:
        return
    size, count = 64, 8
    buffers = Buffer(size * count)
    ring.submit(_OP_PROVIDE, count, buffers.address, size)
    s.note(f"buffers: {name_result(ring.wait())}")
    s.moment()
    ring.submit(OP_RECV, s.server.fd, prio=_MULTISHOT, sqe_flags=_BUFFER_SELECT)
    for number in range(5):
        s.client.send(pattern(20, number))
        got = ring.wait()
        at = (ring.flags >> 16) * size
        right = buffers.raw.raw[at : at + 20] == pattern(20, number)
        s.note(f"got {name_result(got)}, right: {right}, goes on: {bool(ring.flags & _MORE)}")
    s.client.shutdown(socket.SHUT_WR)
    s.note(f"got {name_result(ring.wait())}, goes on: {bool(ring.flags & _MORE)}")


# What it sends is never redirected: the kernel takes it from no socket that was spliced.
@probe(redirects=False)
def uring_zero_copy_send(s: Scene) -> None:
    """IORING_OP_SEND_ZC takes the message, and tells when its memory may be used again."""
    ring = make_ring(s)
    if ring is None:
        return
    for size in (10, 20_000):
        data = ctypes.create_string_buffer(pattern(size, size), size)
        s.moment()
        ring.submit(_OP_SEND_ZC, s.client.fd, ctypes.addressof(data), size)
        result, more = name_result(ring.wait()), bool(ring.flags & _MORE)
        s.note(f"io_uring zero-copy send = {result}, notice follows: {more}")
        s.server.rest()
        if more:
            s.note(f"notice {name_result(ring.wait())}")


# The process is remembered, as in options.py.
@probe(redirects=False, cuts=3, drains=1, storms=0)
def uring_splice_from_now_on(s: Scene) -> None:
    """IORING_OP_SPLICE from a socket that was read by recv(2) until now, with nothing there and then with
    bytes: a kernel worker reads."""
    ring = make_ring(s)
    if ring is None:
        return
    out, into = os.pipe()
    for word in (b"", b"0123456789", b"more"):
        if word:
            s.client.send(word)
            s.settle()
        s.moment()
        # SPLICE_F_NONBLOCK
        ring.submit(_OP_SPLICE, into, NOWHERE, 4096, 2, offset=NOWHERE, fd_in=s.server.fd)
        got = ring.wait()
        s.note(f"io_uring splice = {name_result(got)} {os.read(out, 100) if got and got > 0 else b''!r}")
    os.close(out)
    os.close(into)


@probe()
def zero_copy_receive(s: Scene) -> None:
    """getsockopt(TCP_ZEROCOPY_RECEIVE) maps whole pages and says how many bytes beside them a reader has to
    fetch by recv(2)."""
    # PROT_READ, MAP_SHARED
    area = _libc.mmap(None, ctypes.c_size_t(1 << 16), 1, 1, s.server.fd, ctypes.c_long(0))
    for size in (10, 3000):
        s.client.send(pattern(size))
        s.settle()
        s.server.call("bytes to fetch", _receive_into, s.server.fd, area)
        s.server.rest()


def _receive_into(fd: int, area: int) -> int:
    """struct tcp_zerocopy_receive of <linux/tcp.h>: its `recv_skip_hint`, where no page was mapped."""
    raw = ctypes.create_string_buffer(struct.pack("<QIIIi", area, 1 << 16, 0, 0, 0), 24)
    size = ctypes.c_uint32(len(raw))
    _check(_libc.getsockopt(fd, socket.IPPROTO_TCP, _TCP_ZEROCOPY_RECEIVE, raw, ctypes.byref(size)))
    _, length, hint, _, _ = struct.unpack("<QIIIi", raw.raw)
    assert not length, "a page was mapped"
    return int(hint)
