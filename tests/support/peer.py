# SPDX-License-Identifier: Apache-2.0
"""One end of some TCP connections, played by a process of its own and told what to do over stdin.

Run as a script: every line on stdin is a JSON object ``{"op": NAME, ...arguments}``, every line on stdout is
its answer, ``{"ok": true, "value": ...}`` or ``{"ok": false, "error": NAME, "message": ..., "value": ...}``.
Errors of system calls are answers, not accidents: the tests compare them. An operation that waits longer than
its ``timeout`` (seconds) answers with the error ``TIMEOUT``. End of file on stdin closes everything and ends
the process.

What is sent is a pseudo-random stream that depends only on a seed, so that the receiver can say at which
offset the first wrong byte stood. Only the standard library is imported: the file has to start fast, in any
namespace, with -S.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

STREAM_PERIOD = 1_048_573  # bytes; a prime, so that no power of two maps the stream onto itself
READ_SIZE = 1 << 18
SPLICE_FLAGS_NONBLOCK = 2  # SPLICE_F_NONBLOCK of <fcntl.h>
EVENT_NAMES = {
    select.EPOLLIN: "IN",
    select.EPOLLOUT: "OUT",
    select.EPOLLPRI: "PRI",
    select.EPOLLERR: "ERR",
    select.EPOLLHUP: "HUP",
    select.EPOLLRDHUP: "RDHUP",
}


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


class Visit:
    """One connection of `churn`: asks, and compares the echo."""

    def __init__(self, family: int, host: str, port: int, rounds: int) -> None:
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        # With a time-out the socket is non-blocking from the start, which eager asks of a client.
        self.sock.settimeout(10.0)
        self.sock.connect((host, port))
        self.sock.setblocking(False)
        self.rounds = rounds
        self.awaited = b""

    def ask(self, blob: bytes, chance: random.Random, largest: int) -> None:
        start, size = chance.randrange(len(blob) - largest), chance.randint(1, largest)
        # What the kernel does not take now is not asked: the echo tells nothing about messages.
        taken = self.sock.send(blob[start : start + size])
        self.awaited = blob[start : start + taken]
        self.rounds -= 1

    def hear(self, done: dict[str, int]) -> bool:
        """Read once; True if the visit is over."""
        data = self.sock.recv(1 << 16)
        done["wrong"] += not self.awaited.startswith(data) or not data
        self.awaited = self.awaited[len(data) :]
        done["rounds"] += not self.awaited
        return not data or (not self.awaited and self.rounds == 0)

    def leave(self, chance: random.Random) -> None:
        how = chance.randrange(3)
        with contextlib.suppress(OSError):
            if how == 0:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif how == 1:
                self.sock.send(b"and one more that nobody reads")
        self.sock.close()


class Peer:
    """The operations; each public method is one, and its arguments are the fields of the command."""

    def __init__(self) -> None:
        self._listeners: dict[str, socket.socket] = {}
        self._connections: dict[str, Connection] = {}
        self._epolls: dict[str, select.epoll] = {}
        self._told_to_end = False
        signal.signal(signal.SIGUSR1, self._note_signal)

    def _note_signal(self, *_: object) -> None:
        self._told_to_end = True

    # making connections

    def listen(
        self,
        name: str,
        family: int,
        host: str,
        port: int = 0,
        defer_accept: int = 0,
        v6only: bool = False,
        options: list[list[int]] | None = None,
    ) -> int:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6only))
        if defer_accept:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, defer_accept)
        _apply(sock, options)
        sock.bind((host, port))
        sock.listen(256)
        self._listeners[name] = sock
        return int(sock.getsockname()[1])

    def accept(
        self,
        listener: str,
        conn: str,
        sends: int = 1,
        receives: int = 0,
        blocking: bool = False,
        options: list[list[int]] | None = None,
        timeout: float = 10.0,
    ) -> list[Any]:
        sock = self._listeners[listener]
        sock.settimeout(timeout)
        try:
            accepted, _ = sock.accept()
        except TimeoutError:
            raise Overdue from None
        _apply(accepted, options)
        accepted.setblocking(blocking)
        self._connections[conn] = Connection(accepted, sends, receives)
        return [list(accepted.getsockname()[:2]), list(accepted.getpeername()[:2])]

    def unlisten(self, listener: str) -> None:
        self._listeners.pop(listener).close()

    def connect(
        self,
        conn: str,
        family: int,
        host: str,
        port: int,
        source: list[Any] | None = None,
        sends: int = 0,
        receives: int = 1,
        blocking: bool = False,
        options: list[list[int]] | None = None,
        fast_open: str = "",
        timeout: float = 10.0,
    ) -> list[Any]:
        """`fast_open` is literal text for the SYN to carry (TCP Fast Open)."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        _apply(sock, options)
        if source is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((source[0], source[1]))
        if not blocking and not fast_open:
            sock.settimeout(timeout)
        text = fast_open.encode("latin-1")
        try:
            if text:
                sock.sendto(text, socket.MSG_FASTOPEN, (host, port))
            else:
                sock.connect((host, port))
        except TimeoutError:
            sock.close()
            raise Overdue from None
        sock.setblocking(blocking)
        connection = self._connections[conn] = Connection(sock, sends, receives)
        connection.sent.update(text)
        connection.sent_bytes += len(text)
        return [list(sock.getsockname()[:2]), list(sock.getpeername()[:2])]

    def reconnect(self, conn: str, host: str, port: int, timeout: float = 10.0) -> None:
        """Disconnect with connect(AF_UNSPEC) and connect the same socket to another place (IPv4)."""
        sock = self._connections[conn].sock
        nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.connect(sock.fileno(), nowhere, len(nowhere)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        sock.settimeout(timeout)
        sock.connect((host, port))
        sock.setblocking(False)

    # sending

    def send(
        self, conn: str, count: int, chunk: int = READ_SIZE, flags: int = 0, timeout: float = 10.0
    ) -> int:
        """Send exactly `count` bytes of the stream in messages of at most `chunk`, waiting for room."""
        connection, deadline, left = self._connections[conn], time.monotonic() + timeout, count
        while left:
            try:
                left -= connection.put_stream(min(chunk, left), flags)
            except BlockingIOError:
                try:
                    connection.wait(select.POLLOUT, deadline)
                except Overdue:
                    raise Overdue(count - left) from None
        return count

    def send_until_full(self, conn: str, chunk: int, limit: int, timeout: float = 10.0) -> dict[str, Any]:
        """Send messages of `chunk` bytes until EAGAIN, `limit` bytes or the timeout; never waits for room."""
        connection, deadline, total = self._connections[conn], time.monotonic() + timeout, 0
        while total < limit:
            if time.monotonic() > deadline:
                return {"bytes": total, "stopped": "timeout"}
            try:
                total += connection.put_stream(chunk)
            except BlockingIOError:
                return {"bytes": total, "stopped": "full"}
        return {"bytes": total, "stopped": "limit"}

    def send_once(self, conn: str, count: int, flags: int = 0) -> int:
        """A single send(2) of stream bytes; answers what the kernel took."""
        return self._connections[conn].put_stream(count, flags)

    def say(self, conn: str, text: str, flags: int = 0) -> int:
        """A single send(2) of literal text; the receiver must use `hear`."""
        return self._connections[conn].put(text.encode("latin-1"), flags)

    def gather(self, conn: str, sizes: list[int], timeout: float = 10.0) -> int:
        """A single sendmsg(2) of stream bytes in several buffers, its rest sent when there is room."""
        connection = self._connections[conn]
        data = connection.outgoing.look(sum(sizes))
        views, position = [], 0
        for size in sizes:
            views.append(memoryview(data)[position : position + size])
            position += size
        count = connection.sock.sendmsg(views)
        connection.sent.update(data[:count])
        connection.sent_bytes += count
        connection.outgoing.advance(count)
        return count + self.send(conn, len(data) - count, timeout=timeout)

    def sendfile(self, conn: str, count: int, timeout: float = 10.0) -> int:
        """sendfile(2) of stream bytes from a file in memory."""
        connection, deadline, done = self._connections[conn], time.monotonic() + timeout, 0
        data = connection.outgoing.look(count)
        source = os.memfd_create("peer")
        try:
            os.write(source, data)
            while done < len(data):
                try:
                    done += os.sendfile(connection.sock.fileno(), source, done, len(data) - done)
                except BlockingIOError:
                    connection.wait(select.POLLOUT, deadline)
        finally:
            os.close(source)
        connection.sent.update(data)
        connection.sent_bytes += done
        connection.outgoing.advance(done)
        return done

    # receiving

    def recv(
        self,
        conn: str,
        count: int,
        flags: int = 0,
        at_most: int = READ_SIZE,
        pause: float = 0.0,
        timeout: float = 10.0,
    ) -> int:
        """Receive exactly `count` stream bytes; fewer come back if the end of the stream arrives first."""
        connection, deadline, left = self._connections[conn], time.monotonic() + timeout, count
        while left:
            try:
                connection.wait(select.POLLIN, deadline)
                data = connection.take(min(at_most, left), flags)
            except BlockingIOError:
                connection.note_again()
                continue
            except Overdue:
                raise Overdue(count - left) from None
            if not data:
                break
            left -= len(data)
            if pause:
                time.sleep(pause)
        return count - left

    def recv_once(self, conn: str, count: int, flags: int = 0) -> int:
        """A single recv(2) of stream bytes; how many came."""
        return len(self._connections[conn].take(count, flags))

    def recv_cut_short(self, conn: str, count: int, room: int) -> int:
        """A single recv(2) of `count` stream bytes into memory of which only `room` bytes are there; how many
        came, 0 after EFAULT."""
        libc = ctypes.CDLL(None, use_errno=True)
        size = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
        with mmap.mmap(-1, size + mmap.PAGESIZE) as area:
            start = ctypes.addressof(ctypes.c_char.from_buffer(area))
            libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0)
            connection, at = self._connections[conn], size - room
            taken = libc.recv(
                connection.sock.fileno(), ctypes.c_void_p(start + at), ctypes.c_size_t(count), 0
            )
            if taken < 0 and ctypes.get_errno() != errno.EFAULT:
                raise OSError(ctypes.get_errno(), "recv")
            connection.note_received(area[at : at + max(taken, 0)])
        return max(taken, 0)

    def hear(self, conn: str, count: int, flags: int = 0, timeout: float = 10.0) -> str:
        """Receive exactly `count` literal bytes, fewer before the end of the stream; a peek looks once."""
        connection, deadline, heard = self._connections[conn], time.monotonic() + timeout, b""
        while len(heard) < count:
            try:
                connection.wait(select.POLLIN, deadline)
                data = connection.take(count - len(heard), flags, streamed=False)
            except BlockingIOError:
                connection.note_again()
                continue
            except Overdue:
                raise Overdue(heard.decode("latin-1")) from None
            heard += data
            if not data or flags & socket.MSG_PEEK:
                break
        return heard.decode("latin-1")

    def hear_once(self, conn: str, count: int, flags: int = 0) -> str:
        """A single recv(2) of literal bytes."""
        return self._connections[conn].take(count, flags, streamed=False).decode("latin-1")

    def hear_message(self, conn: str, count: int, ancillary: int = 256, timeout: float = 10.0) -> list[Any]:
        """A single recvmsg(2): the text and the control messages as [level, type, value of an int]."""
        connection = self._connections[conn]
        connection.wait(select.POLLIN, time.monotonic() + timeout)
        data, control, _, _ = connection.sock.recvmsg(count, ancillary)
        connection.note_received(data, streamed=False)
        return [
            data.decode("latin-1"),
            [[level, kind, struct.unpack("i", value[:4])[0]] for level, kind, value in control],
        ]

    def splice_in(self, conn: str, count: int, timeout: float = 10.0) -> int:
        """Read `count` stream bytes by splice(2) through a pipe, as io.Copy and HAProxy do."""
        connection, deadline, left = self._connections[conn], time.monotonic() + timeout, count
        out, into = os.pipe()
        try:
            while left:
                connection.wait(select.POLLIN, deadline)
                try:
                    moved = os.splice(
                        connection.sock.fileno(), into, min(left, 65536), flags=SPLICE_FLAGS_NONBLOCK
                    )
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Overdue(count - left) from None
                    time.sleep(0.001)
                    continue
                if not moved:
                    break
                connection.note_received(os.read(out, moved))
                left -= moved
        except Overdue:
            raise Overdue(count - left) from None
        finally:
            os.close(out)
            os.close(into)
        return count - left

    def splice_nothing(self, conn: str) -> int:
        """A splice(2) on an empty receive queue: answers EAGAIN, and shows how this end means to read."""
        out, into = os.pipe()
        try:
            return os.splice(self._connections[conn].sock.fileno(), into, 65536, flags=SPLICE_FLAGS_NONBLOCK)
        finally:
            os.close(out)
            os.close(into)

    def expect_eof(self, conn: str, timeout: float = 10.0) -> bool:
        """True if the next thing to read is the end of the stream."""
        connection = self._connections[conn]
        connection.wait(select.POLLIN, time.monotonic() + timeout)
        return connection.take(1) == b""

    def recv_to_eof(self, conn: str, timeout: float = 20.0) -> int:
        connection, deadline, total = self._connections[conn], time.monotonic() + timeout, 0
        while True:
            try:
                connection.wait(select.POLLIN, deadline)
                data = connection.take(READ_SIZE)
            except BlockingIOError:
                connection.note_again()
                continue
            except Overdue:
                raise Overdue(total) from None
            if not data:
                return total
            total += len(data)

    # conversations

    def pingpong(
        self,
        conn: str,
        rounds: int,
        size: int = 64,
        answer: int = 64,
        pause: float = 0.0,
        timeout: float = 10.0,
    ) -> int:
        """`rounds` times: one message of `size` bytes out, `answer` bytes back."""
        for _ in range(rounds):
            self.send(conn, size, timeout=timeout)
            if self.recv(conn, answer, timeout=timeout) != answer:
                raise ConnectionError(errno.ECONNRESET, "the stream ended within a round")
            if pause:
                time.sleep(pause)
        return rounds

    def echo(self, conn: str, rounds: int, size: int = 64, answer: int = 64, timeout: float = 10.0) -> int:
        """The other side of `pingpong`."""
        for _ in range(rounds):
            if self.recv(conn, size, timeout=timeout) != size:
                raise ConnectionError(errno.ECONNRESET, "the stream ended within a round")
            self.send(conn, answer, timeout=timeout)
        return rounds

    def pingpong_for(self, conn: str, seconds: float, size: int = 64, timeout: float = 10.0) -> int:
        """Rounds of `pingpong` for some time, a shutdown(SHUT_WR) at the end; how many rounds there were."""
        end, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            rounds += self.pingpong(conn, 1, size, size, timeout=timeout)
        self._connections[conn].sock.shutdown(socket.SHUT_WR)
        return rounds

    def echo_to_eof(self, conn: str, size: int = 64, timeout: float = 10.0) -> int:
        """Answer messages of `size` bytes with as many until the other side ends; how many there were."""
        rounds = 0
        while True:
            got = self.recv(conn, size, timeout=timeout)
            if got == 0:
                return rounds
            if got != size:
                raise ConnectionError(errno.ECONNRESET, "the stream ended within a round")
            self.send(conn, size, timeout=timeout)
            rounds += 1

    def exchange(
        self,
        conns: list[str],
        seconds: float,
        seed: int,
        largest: int = 20_000,
        bursts: int = 8,
        edge: bool = False,
        timeout: float = 20.0,
    ) -> dict[str, int]:
        """Bursts of messages of random sizes on every connection while reading random amounts, for so many
        seconds or until SIGUSR1.

        Afterwards each connection is shut down for writing and read to its end. Non-blocking, with epoll;
        with `edge` the socket is read until EAGAIN whenever an edge says so.
        """
        chance = random.Random(seed)
        poller = select.epoll()
        by_fd = {self._connections[name].sock.fileno(): self._connections[name] for name in conns}
        trigger = select.EPOLLIN | (select.EPOLLET if edge else 0)
        for fd in by_fd:
            poller.register(fd, trigger)
        messages, full, open_fds = 0, 0, set(by_fd)
        end = time.monotonic() + seconds
        writing = True
        while open_fds or writing:
            now = time.monotonic()
            if writing and (now >= end or self._told_to_end):
                writing, self._told_to_end = False, False
                end = now
                for connection in by_fd.values():
                    connection.sock.shutdown(socket.SHUT_WR)
            if now >= end + timeout:
                raise Overdue({str(fd): by_fd[fd].received_bytes for fd in open_fds})
            if writing:
                for connection in by_fd.values():
                    if chance.random() < 0.5:
                        continue
                    for _ in range(chance.randint(1, bursts)):
                        try:
                            connection.put_stream(int(math.exp(chance.uniform(0, math.log(largest)))))
                            messages += 1
                        except BlockingIOError:
                            full += 1
                            break
            for fd, _ in poller.poll(0.002 if writing else 0.5):
                while True:
                    wanted = chance.randint(1, 2 * largest)
                    try:
                        data = by_fd[fd].take(wanted)
                    except BlockingIOError:
                        break
                    if not data:
                        poller.unregister(fd)
                        open_fds.discard(fd)
                        break
                    if not edge and chance.random() < 0.5:
                        break
            # Short pauses now and then, and a longer one in which both sides may be at rest.
            if writing and (drawn := chance.random()) < 0.13:
                time.sleep(chance.uniform(0.005, 0.02) if drawn < 0.03 else chance.uniform(0, 0.004))
        poller.close()
        return {"messages": messages, "full": full}

    def serve(self, listener: str, seconds: float, timeout: float = 10.0) -> int:
        """Accept and echo, non-blocking with epoll, for some time or until SIGUSR1, and until all have gone;
        how many came."""
        door = self._listeners[listener]
        door.setblocking(False)
        poller = select.epoll()
        poller.register(door, select.EPOLLIN)
        guests: dict[int, tuple[socket.socket, bytearray]] = {}
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end or guests:
            if self._told_to_end:
                end, self._told_to_end = min(end, time.monotonic()), False
            if time.monotonic() > end + timeout:
                raise Overdue(len(guests))
            for fd, _ in poller.poll(0.05):
                if fd == door.fileno():
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            sock, _ = door.accept()
                            sock.setblocking(False)
                            guests[sock.fileno()] = (sock, bytearray())
                            poller.register(sock, select.EPOLLIN)
                            count += 1
                elif not _echo(*guests[fd]):
                    guests.pop(fd)[0].close()
                else:
                    poller.modify(fd, select.EPOLLIN | (select.EPOLLOUT if guests[fd][1] else 0))
        poller.close()
        return count

    def churn(
        self,
        family: int,
        host: str,
        port: int,
        seconds: float,
        seed: int,
        together: int = 12,
        rounds: int = 80,
        largest: int = 6000,
        timeout: float = 10.0,
    ) -> dict[str, int]:
        """Connections to `serve`, some at a time, each for a random number of rounds, ended in some way."""
        chance = random.Random(seed)
        blob = random.Random(seed + 1).randbytes(1 << 20)
        poller = select.epoll()
        visits: dict[int, Visit] = {}
        done = {"connections": 0, "rounds": 0, "wrong": 0, "broken": 0}
        end = time.monotonic() + seconds
        while visits or time.monotonic() < end:
            if time.monotonic() > end + timeout:
                raise Overdue(done)
            while len(visits) < together and time.monotonic() < end:
                visit = Visit(family, host, port, chance.randint(1, rounds))
                visits[visit.sock.fileno()] = visit
                poller.register(visit.sock, select.EPOLLIN)
                done["connections"] += 1
                visit.ask(blob, chance, largest)
            for fd, _ in poller.poll(0.05):
                visit = visits[fd]
                try:
                    finished = visit.hear(done)
                except OSError:
                    done["broken"] += 1
                    finished = True
                if finished:
                    poller.unregister(fd)
                    visits.pop(fd).leave(chance)
                elif not visit.awaited:
                    visit.ask(blob, chance, largest)
        poller.close()
        return done

    # endings

    def shutdown(self, conn: str, how: int) -> None:
        self._connections[conn].sock.shutdown(how)

    def close(self, conn: str) -> None:
        self._connections[conn].sock.close()

    def reset(self, conn: str) -> None:
        """Close with SO_LINGER 0, which sends a RST."""
        sock = self._connections[conn].sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    # looking at a socket

    def setblocking(self, conn: str, blocking: bool) -> None:
        self._connections[conn].sock.setblocking(blocking)

    def setsockopt(self, conn: str, level: int, option: int, value: int) -> None:
        self._connections[conn].sock.setsockopt(level, option, value)

    def settimeout(self, conn: str, option: int, seconds: float) -> None:
        """SO_RCVTIMEO or SO_SNDTIMEO."""
        whole = int(seconds)
        packed = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
        self._connections[conn].sock.setsockopt(socket.SOL_SOCKET, option, packed)

    def getsockopt(self, conn: str, level: int, option: int) -> int:
        return self._connections[conn].sock.getsockopt(level, option)

    def set_ulp(self, conn: str, name: str) -> None:
        self._connections[conn].sock.setsockopt(socket.IPPROTO_TCP, 31, name.encode())

    def fionread(self, conn: str) -> int:
        """Bytes waiting to be read, as ioctl(FIONREAD) says."""
        answer = fcntl.ioctl(self._connections[conn].sock, termios.FIONREAD, b"\0\0\0\0")
        return int(struct.unpack("i", answer)[0])

    def wait_fionread(self, conn: str, count: int, timeout: float = 3.0) -> int:
        """The last answer of FIONREAD, taken when it reaches `count` or time is up."""
        deadline = time.monotonic() + timeout
        while (waiting := self.fionread(conn)) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        return waiting

    def poll(self, conn: str) -> list[str]:
        """Names of the events poll(2) reports for the socket at this moment."""
        poller = select.poll()
        poller.register(
            self._connections[conn].sock,
            select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDHUP,
        )
        return _event_names(poller.poll(0))

    def wait_events(self, conn: str, events: list[str], timeout: float = 3.0) -> list[str]:
        """What poll(2) reports once it reports all of `events`, or when time is up."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self.poll(conn)
            if set(events) <= set(seen) or time.monotonic() > deadline:
                return seen
            time.sleep(0.002)

    def watch(self, conn: str, edge: bool = True) -> None:
        """Put the socket into an epoll set of its own, for `wakeups`."""
        self._epolls[conn] = select.epoll()
        self._epolls[conn].register(
            self._connections[conn].sock,
            select.EPOLLIN | select.EPOLLRDHUP | (select.EPOLLET if edge else 0),
        )

    def wakeup(self, conn: str, timeout: float = 3.0) -> list[str]:
        """The events of one epoll_wait(2) on the set of `watch`; an empty list if none came in time."""
        return _event_names(self._epolls[conn].poll(timeout))

    def netns_cookie(self) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            return int(struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, 71, 8))[0])

    def drain_error_queue(self, conn: str, timeout: float = 3.0) -> list[list[int]]:
        """Zero-copy completions as [first, last] message numbers; waits for at least one."""
        connection, deadline = self._connections[conn], time.monotonic() + timeout
        ranges: list[list[int]] = []
        while not ranges and time.monotonic() < deadline:
            try:
                _, control, _, _ = connection.sock.recvmsg(1, 256, socket.MSG_ERRQUEUE)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            for _, _, value in control:
                _, _, _, _, _, first, last = struct.unpack("=IBBBBII", value[:16])
                ranges.append([first, last])
        return ranges

    def report(self, conn: str) -> dict[str, Any]:
        """What has gone through the connection: counts, checksums, and the offset of the first wrong byte."""
        connection = self._connections[conn]
        return {
            "sent": connection.sent_bytes,
            "sent_sum": connection.sent.hexdigest(),
            "received": connection.received_bytes,
            "received_sum": connection.received.hexdigest(),
            "first_wrong": connection.first_wrong,
            "spurious": connection.spurious,
        }

    def end(self) -> None:
        for sock in [*self._listeners.values(), *(c.sock for c in self._connections.values())]:
            with contextlib.suppress(OSError):
                sock.close()


def _echo(sock: socket.socket, waiting: bytearray) -> bool:
    """Read once and send back what is possible; False at the end of the connection."""
    try:
        if not waiting:
            data = sock.recv(1 << 16)
            if not data:
                return False
            waiting += data
        del waiting[: sock.send(waiting)]
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def _apply(sock: socket.socket, options: list[list[int]] | None) -> None:
    for level, option, value in options or []:
        sock.setsockopt(level, option, value)


def _event_names(events: list[tuple[int, int]]) -> list[str]:
    return [name for _, mask in events for bit, name in EVENT_NAMES.items() if mask & bit]


def _answer(operation: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, "value": operation(**arguments)}
    except Overdue as overdue:
        return {"ok": False, "error": "TIMEOUT", "message": str(overdue), "value": overdue.value}
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "UNKNOWN")
        return {"ok": False, "error": name, "message": str(error), "value": None}


def serve() -> None:
    """Carry out the commands on stdin until it ends."""
    peer = Peer()
    print(json.dumps({"ok": True, "value": os.getpid()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        operation = getattr(peer, command.pop("op"))
        print(json.dumps(_answer(operation, command)), flush=True)
    peer.end()


if __name__ == "__main__":
    serve()
