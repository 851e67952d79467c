# SPDX-License-Identifier: Apache-2.0
"""The operations of a peer on one socket: making it, sending, receiving, ending it, and looking at it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from connection import READ_SIZE, Connection, Overdue, count_waiting, reset_at_close

SPLICE_FLAGS_NONBLOCK = 2  # SPLICE_F_NONBLOCK of <fcntl.h>
EVENT_NAMES = {
    select.EPOLLIN: "IN",
    select.EPOLLOUT: "OUT",
    select.EPOLLPRI: "PRI",
    select.EPOLLERR: "ERR",
    select.EPOLLHUP: "HUP",
    select.EPOLLRDHUP: "RDHUP",
}


class Sockets:
    """Each public method is an operation, and its arguments are the fields of the command."""

    def __init__(self) -> None:
        self._listeners: dict[str, socket.socket] = {}
        self._connections: dict[str, Connection] = {}
        self._epolls: dict[str, select.epoll] = {}

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
        protocol: int = 0,
    ) -> int:
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
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
        protocol: int = 0,
        timeout: float = 10.0,
    ) -> list[Any]:
        """`fast_open` is literal text for the SYN to carry (TCP Fast Open)."""
        sock = socket.socket(family, socket.SOCK_STREAM, protocol)
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
        got = 0
        try:
            for data in self._connections[conn].receive(count, timeout, flags, at_most):
                got += len(data)
                if pause:
                    time.sleep(pause)
        except Overdue:
            raise Overdue(got) from None
        return got

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
        heard = ""
        try:
            for data in self._connections[conn].receive(count, timeout, flags, streamed=False):
                heard += data.decode("latin-1")
                if flags & socket.MSG_PEEK:
                    break
        except Overdue:
            raise Overdue(heard) from None
        return heard

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
        with _pipe() as (out, into):
            while left:
                try:
                    connection.wait(select.POLLIN, deadline)
                    moved = os.splice(
                        connection.sock.fileno(), into, min(left, 65536), flags=SPLICE_FLAGS_NONBLOCK
                    )
                except Overdue:
                    raise Overdue(count - left) from None
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Overdue(count - left) from None
                    time.sleep(0.001)
                    continue
                if not moved:
                    break
                connection.note_received(os.read(out, moved))
                left -= moved
        return count - left

    def splice_nothing(self, conn: str) -> int:
        """A splice(2) on an empty receive queue: answers EAGAIN, and shows how this end means to read."""
        with _pipe() as (_, into):
            return os.splice(self._connections[conn].sock.fileno(), into, 65536, flags=SPLICE_FLAGS_NONBLOCK)

    def expect_eof(self, conn: str, timeout: float = 10.0) -> bool:
        """True if the next thing to read is the end of the stream."""
        connection = self._connections[conn]
        connection.wait(select.POLLIN, time.monotonic() + timeout)
        return connection.take(1) == b""

    def recv_to_eof(self, conn: str, timeout: float = 20.0) -> int:
        return self.recv(conn, sys.maxsize, timeout=timeout)

    # endings

    def shutdown(self, conn: str, how: int) -> None:
        self._connections[conn].sock.shutdown(how)

    def close(self, conn: str) -> None:
        self._connections[conn].sock.close()

    def reset(self, conn: str) -> None:
        """Close with SO_LINGER 0, which sends a RST."""
        reset_at_close(self._connections[conn].sock)
        self.close(conn)

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

    def count_segments(self, conn: str) -> list[int]:
        """TCP segments that the socket has sent and received."""
        info = self._connections[conn].sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
        return list(struct.unpack_from("=2I", info, 136))  # tcpi_segs_out, tcpi_segs_in of <linux/tcp.h>

    def set_ulp(self, conn: str, name: str) -> None:
        self._connections[conn].sock.setsockopt(socket.IPPROTO_TCP, 31, name.encode())

    def fionread(self, conn: str) -> int:
        """Bytes waiting to be read, as ioctl(FIONREAD) says."""
        return count_waiting(self._connections[conn].sock)

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

    def rename(self, name: str) -> None:
        """Have another name in ps(1)."""
        Path("/proc/self/comm").write_text(name)

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


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    out, into = os.pipe()
    try:
        yield out, into
    finally:
        os.close(out)
        os.close(into)


def _apply(sock: socket.socket, options: list[list[int]] | None) -> None:
    for level, option, value in options or []:
        sock.setsockopt(level, option, value)


def _event_names(events: list[tuple[int, int]]) -> list[str]:
    return [name for _, mask in events for bit, name in EVENT_NAMES.items() if mask & bit]
