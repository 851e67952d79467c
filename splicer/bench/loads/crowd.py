# SPDX-License-Identifier: Apache-2.0
"""Many connections that do nothing, for the measurement of what it costs to look after them.

    crowd.py PORT NUMBER RATE

Makes NUMBER connections over loopback, says so, and holds them until standard input ends. From the first byte
that comes there to the next it sends RATE messages a second, each on a connection that has carried none so
far. Under `--mode eager` such a connection is spliced from the start, and its first message goes through TCP
all the same: splicer is told to look at it.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
import time
from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
OTHER_FILES = 64


def connect(port: int, number: int) -> list[tuple[socket.socket, socket.socket]]:
    """(client, server) of each connection, non-blocking from the start: others are not spliced."""
    files = 2 * number + OTHER_FILES
    most = max(files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    listener = socket.create_server((LOOPBACK, port), backlog=128)
    pairs = []
    for _ in range(number):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((LOOPBACK, port))
        server, _ = listener.accept()
        server.setblocking(False)
        pairs.append((client, server))
    listener.close()
    return pairs


def wait_readable(fd: int, seconds: float | None = None) -> bool:
    poll = select.poll()  # select(2) knows the first 1024 files only
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def ask(silent: Iterator[tuple[socket.socket, socket.socket]], rate: float) -> None:
    """Until told to stop, or every connection has carried a message."""
    due = time.monotonic()
    for client, server in silent:
        due += 1 / rate
        if wait_readable(0, max(0.0, due - time.monotonic())):
            return
        client.send(b"x")
        wait_readable(server.fileno())
        server.recv(1)


def main() -> None:
    port, number, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    pairs = connect(port, number)
    print("connected", flush=True)
    silent = iter(pairs)
    while os.read(0, 1):
        ask(silent, rate)
        os.read(0, 1)


if __name__ == "__main__":
    main()
