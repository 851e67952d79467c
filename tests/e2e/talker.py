# SPDX-License-Identifier: Apache-2.0
"""A connection that checks itself, for as long as a file is there: a client that sends numbered messages and
a server that gives each back. Both wait in poll and read without blocking. Prints how many rounds there were,
or what was wrong."""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

SIZE = 4096


def _receive(end: socket.socket, poller: select.poll, size: int) -> bytes:
    got = b""
    while len(got) < size:
        poller.poll()
        piece = end.recv(size - len(got))
        if not piece:
            return got
        got += piece
    return got


def _prepare(end: socket.socket) -> select.poll:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    poller = select.poll()
    poller.register(end, select.POLLIN)
    return poller


def _serve(door: socket.socket) -> None:
    end, _ = door.accept()
    poller = _prepare(end)
    while message := _receive(end, poller, SIZE):
        end.sendall(message)


def main() -> int:
    """Talk until the file that is named is gone."""
    going = Path(sys.argv[1])
    going.touch()
    door = socket.create_server(("127.0.0.1", 7700))
    if os.fork() == 0:
        _serve(door)
        os._exit(0)
    end = socket.create_connection(door.getsockname())
    poller = _prepare(end)
    rounds = 0
    while going.exists():
        message = rounds.to_bytes(8, "big") * (SIZE // 8)
        end.sendall(message)
        if _receive(end, poller, SIZE) != message:
            print(f"round {rounds}: something else came back", flush=True)
            return 1
        rounds += 1
    print(f"{rounds} rounds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
