# SPDX-License-Identifier: Apache-2.0
"""One end of some TCP connections, played by a process of its own and told what to do over stdin.

Run as a script: every line on stdin is a JSON object ``{"op": NAME, ...arguments}``, every line on stdout is
its answer, ``{"ok": true, "value": ...}`` or ``{"ok": false, "error": NAME, "message": ..., "value": ...}``.
Errors of system calls are answers, not accidents: the tests compare them. An operation that waits longer than
its ``timeout`` (seconds) answers with the error ``TIMEOUT``. End of file on stdin closes everything and ends
the process.

Here are the protocol and the conversations; sockets.py has the operations on one socket. Only the standard
library is imported: the file has to start fast, in any namespace, with -S.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from connection import Overdue, Term, note_told, reset_at_close
from sockets import Sockets


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
                reset_at_close(self.sock)
            elif how == 1:
                self.sock.send(b"and one more that nobody reads")
        self.sock.close()


class Peer(Sockets):
    """The operations; those of sockets.py, and whole conversations."""

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
        term, rounds = Term(seconds), 0
        while term.lasts():
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
        term, writing = Term(seconds, timeout), True
        while open_fds or writing:
            if writing and not term.lasts():
                writing = False
                for connection in by_fd.values():
                    connection.sock.shutdown(socket.SHUT_WR)
            term.check({str(fd): by_fd[fd].received_bytes for fd in open_fds})
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
        term, count = Term(seconds, timeout), 0
        while term.lasts() or guests:
            term.check(len(guests))
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
        term = Term(seconds, timeout)
        while visits or term.lasts():
            term.check(done)
            while len(visits) < together and term.lasts():
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
    signal.signal(signal.SIGUSR1, note_told)
    peer = Peer()
    print(json.dumps({"ok": True, "value": os.getpid()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        operation = getattr(peer, command.pop("op"))
        print(json.dumps(_answer(operation, command)), flush=True)
    peer.end()


if __name__ == "__main__":
    serve()
