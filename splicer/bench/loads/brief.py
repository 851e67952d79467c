# SPDX-License-Identifier: Apache-2.0
"""Connections of one request, both ends in this process: as many as a line of stdin says, and how long they
took (nanoseconds) as a line of stdout."""

from __future__ import annotations

import socket
import sys
import time

REQUEST, ANSWER = bytes(100), bytes(200)


def exchange(door: socket.socket) -> None:
    client = socket.create_connection(door.getsockname())
    server, _ = door.accept()
    client.send(REQUEST)
    server.recv(1024)
    server.send(ANSWER)
    client.recv(1024)
    client.close()
    server.recv(1)
    server.close()


def main() -> None:
    door = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(flush=True)
    for line in sys.stdin:
        begun = time.monotonic_ns()
        for _ in range(int(line)):
            exchange(door)
        print(time.monotonic_ns() - begun, flush=True)


if __name__ == "__main__":
    main()
