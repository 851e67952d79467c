# SPDX-License-Identifier: Apache-2.0
"""A blocking HTTP client that reads in small pieces, as many programs do. splicer refuses to splice it.

    reader.py ADDRESS PORT PATH keep-alive|close SECONDS     prints one line of JSON

It waits in recv, without a timeout of Python's: with one the socket would be non-blocking. The interpreter
costs about a microsecond for each piece, plain and spliced alike.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time

PIECE = 8192
WARM_UP_SECONDS = 0.2
# So much longer than asked for only if something is lost: SIGALRM ends it.
PATIENCE_SECONDS = 15


def connect(address: str, port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect((address, port))
    return sock


def fetch(sock: socket.socket, request: bytes, piece: memoryview) -> int:
    """One response; its size with the header. Raises EOFError where it ends early."""
    sock.sendall(request)
    head = b""
    while (end := head.find(b"\r\n\r\n")) < 0:
        if not (count := sock.recv_into(piece)):
            raise EOFError("no response")
        head += piece[:count]
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ValueError(head.split(b"\r\n", 1)[0].decode(errors="replace"))
    length = head[:end].lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
    size = end + 4 + int(length)
    missing = size - len(head)
    receive = sock.recv_into
    while missing > 0:
        if not (count := receive(piece)):
            raise EOFError("the response is too short")
        missing -= count
    return size


def read(address: str, port: int, path: str, keep: bool, seconds: float) -> dict[str, float]:
    connection = "keep-alive" if keep else "close"
    request = f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: {connection}\r\n\r\n".encode()
    piece = memoryview(bytearray(PIECE))
    clock = time.perf_counter
    times: list[float] = []
    total = requests = 0
    begin = 0.0
    sock = connect(address, port) if keep else None
    before = clock()
    warm, end = before + WARM_UP_SECONDS, before + WARM_UP_SECONDS + seconds
    while before < end:
        if sock is not None:
            size = fetch(sock, request, piece)
        else:
            with connect(address, port) as once:
                size = fetch(once, request, piece)
        requests += 1
        after = clock()
        if begin:
            times.append(after - before)
            total += size
        elif after >= warm:
            begin = after
        before = after
    if not times:
        raise TimeoutError("not one response after the warm-up")
    times.sort()
    return {
        "rate": len(times) / (before - begin),
        "megabytes": total / (before - begin) / 1e6,
        "p50_us": times[len(times) // 2] * 1e6,
        "p99_us": times[len(times) * 99 // 100] * 1e6,
        "max_us": times[-1] * 1e6,
        "requests": requests,
    }


def main() -> None:
    match sys.argv[1:]:
        case [address, port, path, ("keep-alive" | "close") as kept, seconds]:
            signal.alarm(int(float(seconds)) + PATIENCE_SECONDS)
            print(json.dumps(read(address, int(port), path, kept == "keep-alive", float(seconds))))
        case _:
            print(__doc__, file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
