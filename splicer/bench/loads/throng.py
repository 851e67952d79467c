# SPDX-License-Identifier: Apache-2.0
"""A part of many connections, for the measurement of scale: a program of its own, run by its path.

    throng.py ADDRESS PORT NUMBER

Makes NUMBER connections, both ends here and non-blocking, and says `connected`. Then it does what the lines
on standard input say, and answers each with a line:

    talk ROUNDS        so many messages each way on every connection, then `talked`
    chat RATE          from now on RATE times a second a message each way on some connection; 0 ends it
    leave NUMBER       a message from so many clients that nobody reads, then `left`
    take NUMBER        read these, then `taken`
    visit NUMBER       make and close so many more, one by one: `visited CONNECT CLOSE`, microseconds for each

It ends with standard input.
"""

from __future__ import annotations

import itertools
import resource
import select
import socket
import sys
import time
from typing import IO

MESSAGE = b"x" * 64
OTHER_FILES = 64
PATIENCE = 10.0  # seconds

Pair = tuple[socket.socket, socket.socket]


class Throng:
    """The connections of one process."""

    def __init__(self, address: str, port: int, number: int) -> None:
        files = 2 * number + OTHER_FILES
        most = max(files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        self._where = (address, port)
        self._listener = socket.create_server(self._where, backlog=128)
        self._pairs = [self._connect() for _ in range(number)]
        self._turn = itertools.cycle(self._pairs)

    def _connect(self) -> Pair:
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(self._where)
        server, _ = self._listener.accept()
        server.setblocking(False)
        return client, server

    def talk(self, rounds: int) -> None:
        # Connection by connection would have each splice while it is talking, as if they were few.
        for _ in range(rounds):
            for client, server in self._pairs:
                exchange(client, server)

    def chat(self) -> None:
        exchange(*next(self._turn))

    def leave(self, number: int) -> None:
        for client, _ in self._pairs[:number]:
            client.send(MESSAGE)

    def take(self, number: int) -> None:
        for _, server in self._pairs[:number]:
            receive(server)

    def visit(self, number: int) -> tuple[float, float]:
        connecting = closing = 0.0
        for _ in range(number):
            begun = time.perf_counter()
            client, server = self._connect()
            connected = time.perf_counter()
            client.close()
            server.close()
            closing += time.perf_counter() - connected
            connecting += connected - begun
        return connecting / number * 1e6, closing / number * 1e6


def exchange(client: socket.socket, server: socket.socket) -> None:
    for sender, reader in ((client, server), (server, client)):
        sender.send(MESSAGE)
        receive(reader)


def receive(reader: socket.socket) -> None:
    """A message. Raises SystemExit if it is another one, or does not come."""
    try:
        got = reader.recv(len(MESSAGE))
    except BlockingIOError:
        poll = select.poll()  # select(2) knows the first 1024 files only
        poll.register(reader, select.POLLIN)
        got = reader.recv(len(MESSAGE)) if poll.poll(1000 * PATIENCE) else b""
    if got != MESSAGE:
        sys.exit("a message is missing")


def obey(throng: Throng) -> None:
    # Unbuffered: what is read must be what poll(2) tells of.
    with open(0, "rb", buffering=0, closefd=False) as commands:
        follow(throng, commands)


def follow(throng: Throng, commands: IO[bytes]) -> None:
    news = select.poll()
    news.register(commands, select.POLLIN)
    due, pause = 0.0, 0.0
    while True:
        wait = max(0.0, due - time.monotonic()) if pause else None
        if not news.poll(None if wait is None else wait * 1000):
            throng.chat()
            due = max(due + pause, time.monotonic() - 1)
            continue
        line = commands.readline().decode().split()
        if not line:
            return
        command, number = line[0], float(line[1])
        if command == "talk":
            throng.talk(int(number))
            print("talked", flush=True)
        elif command == "chat":
            pause = 1 / number if number else 0.0
            due = time.monotonic()
            print("chatting", flush=True)
        elif command == "leave":
            throng.leave(int(number))
            print("left", flush=True)
        elif command == "take":
            throng.take(int(number))
            print("taken", flush=True)
        elif command == "visit":
            print("visited", *throng.visit(int(number)), flush=True)


def main() -> None:
    throng = Throng(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("connected", flush=True)
    obey(throng)


if __name__ == "__main__":
    main()
