# SPDX-License-Identifier: Apache-2.0
"""One non-blocking connection under load: ping-pong (rr) or a one-way stream, for the matrix.

    load.py serve ADDRESS PORT [CREDITS]     serves one connection, then exits
    load.py drive ADDRESS PORT rr|stream SIZE 0|1 SECONDS [CREDITS]     prints one line of JSON

0|1 is TCP_NODELAY. Both ends wait in epoll and never in recv or send: a blocking socket would not be
spliced. The interpreter costs about a microsecond per message at either end, plain and spliced alike.

CREDITS is a FIFO. With it, the reader of a stream bounds what it has not read to WINDOW: redirected messages
are bounded by nothing else, but for splicer's letting go of the connection.

A stream starts with small exchanges, as protocols with a greeting do: without them its sender would
never read, never become hot and never be spliced, and the matrix would compare plain TCP with itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from typing import NoReturn

HEADER = struct.Struct("!6sIB")  # pattern, size, nodelay
# The server's first word: until then its socket may be a blocking one, which accept makes.
READY = b"!"
RESULT = struct.Struct("!QQ")  # bytes, nanoseconds
GREETING_SIZE = 64
GREETING_SECONDS = 0.05
WARM_UP_SECONDS = 0.2
STREAM_BUFFER = 256 * 1024
WINDOW = 1024 * 1024
CREDIT = 256 * 1024
# Nobody is silent for that long unless something is lost.
STALL_SECONDS = 5.0


class Connection:
    """A connected non-blocking socket and its waiting."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._readable = select.epoll()
        self._readable.register(sock, select.EPOLLIN)
        self._writable = select.epoll()
        self._writable.register(sock, select.EPOLLOUT)

    def wait_readable(self) -> None:
        """Raises TimeoutError after STALL_SECONDS."""
        if not self._readable.poll(STALL_SECONDS):
            raise TimeoutError(f"nothing to read for {STALL_SECONDS:g} s")

    def wait_writable(self) -> None:
        """Raises TimeoutError after STALL_SECONDS."""
        if not self._writable.poll(STALL_SECONDS):
            raise TimeoutError(f"no room to write for {STALL_SECONDS:g} s")

    def receive(self, view: memoryview) -> None:
        """Fills the view. Raises EOFError at the peer's end of stream."""
        while view:
            self.wait_readable()
            try:
                count = self.sock.recv_into(view)
            except BlockingIOError:
                continue
            if count == 0:
                raise EOFError
            view = view[count:]

    def send(self, view: memoryview) -> None:
        """Sends all of the view."""
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                self.wait_writable()


def serve(address: str, port: int, credits: str | None = None) -> None:
    listener = socket.create_server((address, port))
    print("listening", flush=True)
    sock, _ = listener.accept()
    listener.close()
    connection = Connection(sock)
    connection.send(memoryview(READY))
    header = bytearray(HEADER.size)
    connection.receive(memoryview(header))
    padded, size, nodelay = HEADER.unpack(header)
    pattern = padded.rstrip(b"\0")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    match pattern:
        case b"stream":
            answer_greetings(connection)
            sink(connection, None if credits is None else os.open(credits, os.O_WRONLY))
        case _:
            echo(connection, size)


def echo(connection: Connection, size: int) -> None:
    message = memoryview(bytearray(size))
    while True:
        try:
            connection.receive(message)
        except EOFError:
            return
        connection.send(message)


def answer_greetings(connection: Connection) -> None:
    message = memoryview(bytearray(GREETING_SIZE))
    more = True
    while more:
        connection.receive(message)
        more = message[0] != 0
        connection.send(message)


def sink(connection: Connection, credits: int | None) -> None:
    """Reads to the end of the stream and reports bytes and time, the warm-up excluded."""
    buffer = bytearray(STREAM_BUFFER)
    total = uncredited = 0
    begin = 0.0
    warm = time.perf_counter() + WARM_UP_SECONDS
    receive, clock = connection.sock.recv_into, time.perf_counter
    while True:
        try:
            count = receive(buffer)
        except BlockingIOError:
            connection.wait_readable()
            continue
        if count == 0:
            break
        if credits is not None:
            uncredited += count
            if uncredited >= CREDIT:
                os.write(credits, bytes(uncredited // CREDIT))
                uncredited %= CREDIT
        if begin:
            total += count
        elif clock() >= warm:
            begin = clock()
    elapsed = clock() - begin if begin else 0.0
    connection.send(memoryview(RESULT.pack(total, int(elapsed * 1e9))))


def drive(
    address: str, port: int, pattern: str, size: int, nodelay: int, seconds: float, credits: str | None = None
) -> None:
    sock = socket.create_connection((address, port), STALL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    connection = Connection(sock)
    connection.receive(memoryview(bytearray(len(READY))))
    connection.send(memoryview(HEADER.pack(pattern.encode(), size, nodelay)))
    if pattern == "stream":
        result = pour(connection, size, seconds, credits)
    else:
        result = ping(connection, size, seconds)
    print(json.dumps(result))


def ping(connection: Connection, size: int, seconds: float) -> dict[str, float]:
    """`requests` are all exchanges and `sent_bytes` those of both directions, the warm-up included."""
    message = memoryview(bytearray(size))
    clock = time.perf_counter
    times: list[float] = []
    warm = clock() + WARM_UP_SECONDS
    end = warm + seconds
    before = clock()
    begin = 0.0
    early = 0
    while before < end:
        connection.send(message)
        connection.receive(message)
        after = clock()
        if begin:
            times.append(after - before)
        else:
            early += 1
            if after >= warm:
                begin = after
        before = after
    times.sort()
    count = len(times)
    return {
        "rate": count / (before - begin),
        "p50_us": times[count // 2] * 1e6,
        "p99_us": times[count * 99 // 100] * 1e6,
        "max_us": times[-1] * 1e6,
        "requests": count + early,
        "sent_bytes": 2 * size * (count + early),
    }


class Credits:
    """The reader's leave to send. In its absence there is always more."""

    def __init__(self, path: str | None) -> None:
        self._fd = None if path is None else os.open(path, os.O_RDONLY)
        self._credited = WINDOW

    def wait(self, sent: int) -> None:
        """Until what was sent and not read is less than WINDOW. Raises EOFError when the reader is gone."""
        while self._fd is not None and sent >= self._credited:
            given = len(os.read(self._fd, 4096))
            if not given:
                raise EOFError("the reader of the stream is gone")
            self._credited += given * CREDIT


def pour(connection: Connection, size: int, seconds: float, path: str | None) -> dict[str, float]:
    """`requests` are messages and `sent_bytes` what they held, the warm-up included and the greeting not."""
    greet(connection)
    credits = Credits(path)
    message = bytes(size)
    send, clock = connection.sock.send, time.perf_counter
    end = clock() + WARM_UP_SECONDS + seconds
    between_looks = range(max(1, 65536 // size))
    sent = 0
    while clock() < end:
        credits.wait(sent)
        for _ in between_looks:
            try:
                sent += send(message)
            except BlockingIOError:
                connection.wait_writable()
    connection.sock.shutdown(socket.SHUT_WR)
    result = bytearray(RESULT.size)
    connection.receive(memoryview(result))
    total, nanoseconds = RESULT.unpack(result)
    return {"rate": total * 8 / nanoseconds, "requests": -(-sent // size), "sent_bytes": sent}  # Gbit/s


def greet(connection: Connection) -> None:
    message = bytearray(GREETING_SIZE)
    end = time.perf_counter() + GREETING_SECONDS
    more = True
    while more:
        more = time.perf_counter() < end
        message[0] = more
        connection.send(memoryview(message))
        connection.receive(memoryview(bytearray(GREETING_SIZE)))


def fail_usage() -> NoReturn:
    print(__doc__, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    match sys.argv[1:]:
        case ["serve", address, port, *credits] if len(credits) <= 1:
            serve(address, int(port), *credits)
        case [
            "drive",
            address,
            port,
            ("rr" | "stream") as pattern,
            size,
            nodelay,
            seconds,
            *credits,
        ]:
            drive(address, int(port), pattern, int(size), int(nodelay), float(seconds), *credits)
        case _:
            fail_usage()


if __name__ == "__main__":
    main()
