# SPDX-License-Identifier: Apache-2.0
"""One non-blocking connection under load: ping-pong (rr) or a one-way stream, for the matrix.

    load.py serve ADDRESS PORT                                serves one connection, then exits
    load.py drive ADDRESS PORT rr|stream SIZE 0|1 SECONDS     0|1: TCP_NODELAY; prints one line of JSON

Both ends wait in epoll and never in recv or send: a blocking socket would not be spliced. The
interpreter costs about a microsecond per message at either end, plain and spliced alike.

A stream starts with small exchanges, as protocols with a greeting do: without them its sender would
never read, never become hot and never be spliced, and the matrix would compare plain TCP with itself.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from typing import NoReturn

HEADER = struct.Struct("!cIB")  # pattern, size, nodelay
RESULT = struct.Struct("!QQ")  # bytes, nanoseconds
GREETING_SIZE = 64
GREETING_SECONDS = 0.05
WARM_UP_SECONDS = 0.2
STREAM_BUFFER = 256 * 1024
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


def serve(address: str, port: int) -> None:
    listener = socket.create_server((address, port))
    print("listening", flush=True)
    sock, _ = listener.accept()
    listener.close()
    connection = Connection(sock)
    header = bytearray(HEADER.size)
    connection.receive(memoryview(header))
    pattern, size, nodelay = HEADER.unpack(header)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    if pattern == b"r":
        echo(connection, size)
    else:
        answer_greetings(connection)
        sink(connection)


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


def sink(connection: Connection) -> None:
    """Reads to the end of the stream and reports bytes and time, the warm-up excluded."""
    buffer = bytearray(STREAM_BUFFER)
    total = 0
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
        if begin:
            total += count
        elif clock() >= warm:
            begin = clock()
    elapsed = clock() - begin if begin else 0.0
    connection.send(memoryview(RESULT.pack(total, int(elapsed * 1e9))))


def drive(address: str, port: int, pattern: str, size: int, nodelay: int, seconds: float) -> None:
    sock = socket.create_connection((address, port), STALL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
    connection = Connection(sock)
    connection.send(memoryview(HEADER.pack(pattern[:1].encode(), size, nodelay)))
    result = ping(connection, size, seconds) if pattern == "rr" else pour(connection, size, seconds)
    print(json.dumps(result))


def ping(connection: Connection, size: int, seconds: float) -> dict[str, float]:
    message = memoryview(bytearray(size))
    clock = time.perf_counter
    times: list[float] = []
    warm = clock() + WARM_UP_SECONDS
    end = warm + seconds
    before = clock()
    begin = 0.0
    while before < end:
        connection.send(message)
        connection.receive(message)
        after = clock()
        if begin:
            times.append(after - before)
        elif after >= warm:
            begin = after
        before = after
    times.sort()
    count = len(times)
    return {
        "rate": count / (before - begin),
        "p50_us": times[count // 2] * 1e6,
        "p99_us": times[count * 99 // 100] * 1e6,
        "max_us": times[-1] * 1e6,
    }


def pour(connection: Connection, size: int, seconds: float) -> dict[str, float]:
    greet(connection)
    message = bytes(size)
    send, clock = connection.sock.send, time.perf_counter
    end = clock() + WARM_UP_SECONDS + seconds
    between_looks = range(max(1, 65536 // size))
    while clock() < end:
        for _ in between_looks:
            try:
                send(message)
            except BlockingIOError:
                connection.wait_writable()
    connection.sock.shutdown(socket.SHUT_WR)
    result = bytearray(RESULT.size)
    connection.receive(memoryview(result))
    total, nanoseconds = RESULT.unpack(result)
    return {"rate": total * 8 / nanoseconds}  # Gbit/s


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
        case ["serve", address, port]:
            serve(address, int(port))
        case ["drive", address, port, ("rr" | "stream") as pattern, size, nodelay, seconds]:
            drive(address, int(port), pattern, int(size), int(nodelay), float(seconds))
        case _:
            fail_usage()


if __name__ == "__main__":
    main()
