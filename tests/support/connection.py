# SPDX-License-Identifier: Apache-2.0
"""What peers are made of: sockets with what has gone through them, and memory that is not there yet.

What is sent is a pseudo-random stream that depends only on a seed, so that the receiver can say at which
offset the first wrong byte stood.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import termios
import time
from collections.abc import Iterator
from typing import Any

READ_SIZE = 1 << 18  # bytes
STREAM_PERIOD = 1_048_573  # bytes; a prime, so that no power of two maps the stream onto itself


class Overdue(Exception):
    """An operation waited longer than its timeout; carries what it had done by then."""

    def __init__(self, value: Any = None) -> None:
        super().__init__("timed out")
        self.value = value


class Stream:
    """An endless sequence of bytes that is a function of the seed alone."""

    def __init__(self, seed: int) -> None:
        block = random.Random(seed).randbytes(STREAM_PERIOD)
        self._twice = block + block
        self.offset = 0

    def look(self, count: int) -> bytes:
        """The next `count` bytes (at most one period), without moving on."""
        start = self.offset % STREAM_PERIOD
        return self._twice[start : start + min(count, STREAM_PERIOD)]

    def advance(self, count: int) -> None:
        self.offset += count

    def first_difference(self, data: bytes) -> int | None:
        """Move over `data`; the stream offset of its first wrong byte, or None."""
        position = 0
        while position < len(data):
            part = data[position : position + STREAM_PERIOD]
            expected = self.look(len(part))
            if part != expected:
                step = next(i for i, (a, b) in enumerate(zip(part, expected, strict=True)) if a != b)
                wrong = self.offset + step
                self.advance(len(data) - position)
                return wrong
            self.advance(len(part))
            position += len(part)
        return None


class Term:
    """A time in which something goes on: so many seconds, or until this process is told to end by SIGUSR1.
    Then it has `timeout` more to come to its end."""

    told_to_end = False

    def __init__(self, seconds: float, timeout: float = 0.0) -> None:
        self._end = time.monotonic() + seconds
        self._timeout = timeout

    def lasts(self) -> bool:
        if Term.told_to_end:
            Term.told_to_end = False
            self._end = min(self._end, time.monotonic())
        return time.monotonic() < self._end

    def check(self, value: Any = None) -> None:
        """Raises Overdue, with `value`, when it has taken too long."""
        if time.monotonic() > self._end + self._timeout:
            raise Overdue(value)


def note_told(*_: object) -> None:
    """The handler of SIGUSR1. What is about to begin will end at once."""
    Term.told_to_end = True


def reset_at_close(sock: socket.socket) -> None:
    """SO_LINGER 0: close(2) sends a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def count_waiting(sock: socket.socket) -> int:
    """Bytes waiting to be read, as ioctl(FIONREAD) says."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))[0])


class Connection:
    """A socket with what has gone through it, both ways."""

    def __init__(self, sock: socket.socket, sends: int, receives: int) -> None:
        self.sock = sock
        self.outgoing = Stream(sends)
        self.incoming = Stream(receives)
        self.sent = hashlib.blake2b()
        self.received = hashlib.blake2b()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.first_wrong: int | None = None
        self.spurious = 0

    def note_again(self) -> None:
        """A call answered EAGAIN: on a blocking socket an application would stumble over that."""
        self.spurious += self.sock.gettimeout() is None

    def wait(self, events: int, deadline: float) -> None:
        """Sleep until a non-blocking socket is ready; a blocking one will sleep in its own system call."""
        if self.sock.gettimeout() is None:
            return
        poller = select.poll()
        poller.register(self.sock, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise Overdue

    def put(self, data: bytes, flags: int = 0) -> int:
        """One send(2) of literal bytes; how many the kernel took."""
        count = self.sock.send(data, flags)
        self.sent.update(data[:count])
        self.sent_bytes += count
        return count

    def put_stream(self, count: int, flags: int = 0) -> int:
        """One send(2) of the next bytes of the outgoing stream."""
        taken = self.put(self.outgoing.look(count), flags)
        self.outgoing.advance(taken)
        return taken

    def note_received(self, data: bytes, *, streamed: bool = True) -> None:
        self.received.update(data)
        self.received_bytes += len(data)
        if streamed:
            wrong = self.incoming.first_difference(data)
            if self.first_wrong is None:
                self.first_wrong = wrong

    def take(self, count: int, flags: int = 0, *, streamed: bool = True) -> bytes:
        """One recv(2), checked against the incoming stream unless the peer was sending literals."""
        data = self.sock.recv(count, flags)
        if not flags & socket.MSG_PEEK:
            self.note_received(data, streamed=streamed)
        return data

    def receive(
        self, count: int, timeout: float, flags: int = 0, at_most: int = READ_SIZE, *, streamed: bool = True
    ) -> Iterator[bytes]:
        """`count` bytes as they come, waited for; fewer if the end of the stream arrives first."""
        deadline = time.monotonic() + timeout
        while count:
            try:
                self.wait(select.POLLIN, deadline)
                data = self.take(min(at_most, count), flags, streamed=streamed)
            except BlockingIOError:
                self.note_again()
                continue
            if not data:
                return
            count -= len(data)
            yield data


class FaultingMemory:
    """A page whose first use waits until `provide` is called: ioctl_userfaultfd(2)."""

    SIZE = 4096

    def __init__(self, libc: ctypes.CDLL) -> None:
        number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
        self.fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.fd, 0xC018AA3F, bytearray(struct.pack("=3Q", 0xAA, 0, 0)))  # UFFDIO_API
        libc.mmap.restype = ctypes.c_void_p
        # PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
        self.address: int = libc.mmap(None, ctypes.c_size_t(self.SIZE), 3, 0x22, -1, ctypes.c_long(0))
        region = struct.pack("=4Q", self.address, self.SIZE, 1, 0)
        fcntl.ioctl(self.fd, 0xC020AA00, bytearray(region))  # UFFDIO_REGISTER, missing pages

    def provide(self) -> None:
        """Let whoever waits go on."""
        zeroes = struct.pack("=3Qq", self.address, self.SIZE, 0, 0)
        fcntl.ioctl(self.fd, 0xC020AA04, bytearray(zeroes))  # UFFDIO_ZEROPAGE

    def close(self) -> None:
        os.close(self.fd)
