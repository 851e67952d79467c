# SPDX-License-Identifier: Apache-2.0
"""A peer with the habits of real programs: it sends when epoll says that there is room, reads what FIONREAD
says that there is, asks without end whether there is anything, reads with O_NONBLOCK cleared for the time, or
waits elsewhere than in its reads on a socket that blocks.

Run as a script like peer.py and with its operations; those added here are event loops.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import peer
from connection import Connection, Overdue, count_waiting

GLANCE = 0.05  # seconds


def is_readable(sock: socket.socket) -> bool:
    """Would recv(2) find a byte now?"""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


class Talk:
    """One connection of `talk`: what is still to be done on it, and how FIONREAD has treated its reader."""

    def __init__(self, connection: Connection, size: int, rounds: int, opens: bool) -> None:
        self.connection = connection
        self.size = size
        self.opens = opens
        self.unread = size * rounds
        self.owed = size if opens else 0
        self._questions = rounds - 1  # yet to come
        self._denied_at: float | None = None
        self._denied_for = 0.0
        self.denials = 0
        self.longest_denial = 0.0

    @property
    def events(self) -> int:
        """What to wait for; nothing when all is done. Whoever answers waits for its answers to be taken."""
        reads = self.unread and (self.opens or self.owed <= self.size)
        return (select.POLLIN if reads else 0) | (select.POLLOUT if self.owed else 0)

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.owed -= self.connection.put_stream(self.owed)

    def read(self) -> None:
        """A byte, which must be there, and then as much as FIONREAD says: Java's available()."""
        try:
            got = len(self.connection.take(1))
        except BlockingIOError:
            return
        if not got:
            raise ConnectionError(errno.ECONNRESET, "the stream ended too early")
        told = count_waiting(self.connection.sock)
        if told:
            got += len(self.connection.take(told))
        sock = self.connection.sock
        # A byte that came between the two questions is no denial: it is counted when asked again.
        self._note_answer(denied=not told and is_readable(sock) and not count_waiting(sock))
        self.unread -= got
        if not self.opens:
            self.owed += got
        elif self.unread <= self._questions * self.size and self._questions:
            self._questions -= 1
            self.owed += self.size

    def _note_answer(self, denied: bool) -> None:
        """Times in which the reader itself was kept waiting do not count."""
        if not denied:
            self._denied_at = None
            return
        now = time.monotonic()
        if self._denied_at is None:
            self._denied_for = 0.0
        else:
            self._denied_for += min(now - self._denied_at, GLANCE)
        self._denied_at = now
        self.denials += 1
        self.longest_denial = max(self.longest_denial, self._denied_for)


class Toggling(Connection):
    """A connection that is non-blocking while it waits, and blocking for each read."""

    def take(self, count: int, flags: int = 0, *, streamed: bool = True) -> bytes:
        os.set_blocking(self.sock.fileno(), True)
        try:
            return super().take(count, flags, streamed=streamed)
        finally:
            os.set_blocking(self.sock.fileno(), False)


class Waiting(Connection):
    """A connection whose socket blocks, and whose reads find what they are for: something waits before them,
    or they ask not to wait. Of so many reads one does not care, and sleeps."""

    def begin_waiting(self, way: str, sleep_every: int) -> None:
        """`way` is poll, select, epoll, or dontwait after a poll."""
        self.way, self.sleep_every = way, sleep_every
        self.reads = 0
        self.poller = select.epoll() if way == "epoll" else None
        if self.poller is not None:
            self.poller.register(self.sock, select.EPOLLIN)
        self.sock.setblocking(True)

    def wait(self, events: int, deadline: float) -> None:
        if not events & select.POLLIN:
            return
        self.reads += 1
        if self.sleep_every and not self.reads % self.sleep_every:
            return
        left = max(deadline - time.monotonic(), 0.0)
        if self.way == "select":
            ready = bool(select.select([self.sock], [], [], left)[0])
        elif self.poller is not None:
            ready = bool(self.poller.poll(left))
        else:
            poller = select.poll()
            poller.register(self.sock, select.POLLIN)
            ready = bool(poller.poll(left * 1000))
        if not ready:
            raise Overdue

    def take(self, count: int, flags: int = 0, *, streamed: bool = True) -> bytes:
        own = socket.MSG_DONTWAIT if self.way == "dontwait" else 0
        return super().take(count, flags | own, streamed=streamed)


class Habitual(peer.Peer):
    """The operations of a peer, and those that believe what the kernel says about a socket."""

    def __init__(self) -> None:
        super().__init__()
        self._spinners: list[subprocess.Popen[bytes]] = []

    # spinning

    def spin(self, conn: str, cpu: int) -> None:
        """Another process asks without end for bytes of the connection, on which everything else goes on. An
        interpreter would be too slow for that: it would hardly ever be met in a system call. That CPU is
        nearly its own, whatever else runs there: who sends from another meets it."""
        fd = self._connections[conn].sock.fileno()
        command = ["wrk", "-s", str(Path(__file__).with_name("ask.lua")), "http://-/"]
        environment = {**os.environ, "ASK": str(fd)}
        process = subprocess.Popen(command, env=environment, pass_fds=[fd])
        self._spinners.append(process)
        os.sched_setaffinity(process.pid, {cpu})
        os.setpriority(os.PRIO_PROCESS, process.pid, -20)

    def stop_spinning(self, conn: str) -> None:
        for process in self._spinners:
            process.kill()
            process.wait()
        self._spinners.clear()

    # toggling O_NONBLOCK

    def toggle(self, conn: str, on: bool = True) -> None:
        """From now on clear O_NONBLOCK for each read, and set it again; or no more."""
        self._connections[conn].__class__ = Toggling if on else Connection

    # waiting elsewhere than in a read

    def wait_in(self, conn: str, way: str, sleep_every: int = 0) -> None:
        """From now on the socket blocks, and is read as class Waiting says."""
        connection = self._connections[conn]
        connection.__class__ = Waiting
        assert isinstance(connection, Waiting)
        connection.begin_waiting(way, sleep_every)

    # sending when there is room

    def watch_room(self, conn: str, edge: bool) -> None:
        """Put the socket into an epoll set of its own, for `push`."""
        trigger = select.EPOLLET if edge else 0
        self._epolls[conn] = select.epoll()
        self._epolls[conn].register(self._connections[conn].sock, select.EPOLLOUT | trigger)
        self._epolls[conn].poll(0)  # the first report, which every set gives

    def push(self, conn: str, count: int, chunk: int, timeout: float = 10.0) -> int:
        """Send exactly `count` bytes of the stream in messages of `chunk`, whenever epoll says EPOLLOUT and
        until EAGAIN; how often that came."""
        connection, deadline, left, refused = self._connections[conn], time.monotonic() + timeout, count, 0
        while left:
            patience = max(deadline - time.monotonic(), 0.0)
            if not self._epolls[conn].poll(patience) or not patience:
                raise Overdue({"left": left, "refused": refused})
            try:
                while left:
                    left -= connection.put_stream(min(chunk, left))
            except BlockingIOError:
                refused += 1
                time.sleep(0.001)  # a level-triggered set may say EPOLLOUT again at once
        return refused

    # reading what is said to be there

    def recv_told(self, conns: list[str], count: int, edge: bool, patience: float = 3.0) -> None:
        """Receive exactly `count` stream bytes from each connection, as whoever believes FIONREAD does: it
        sleeps in epoll, asks how much there is and reads so much; 0 means that nothing is there.

        Gives up when nothing came for `patience` seconds, not counting those in which it was stopped.
        """
        poller = select.epoll()
        left = {self._connections[name].sock.fileno(): count for name in conns}
        by_fd = {self._connections[name].sock.fileno(): self._connections[name] for name in conns}
        for fd in by_fd:
            poller.register(fd, select.EPOLLIN | (select.EPOLLET if edge else 0))
        idle = 0.0
        while any(left.values()):
            events, moved = poller.poll(GLANCE), 0
            for fd, _ in events:
                while left[fd] and (told := count_waiting(by_fd[fd].sock)):
                    taken = len(by_fd[fd].take(min(told, left[fd])))
                    left[fd] -= taken
                    moved += taken
                    if not edge:
                        break
            if moved:
                idle = 0.0
                continue
            idle += GLANCE
            if idle > patience:
                waiting = {name: is_readable(self._connections[name].sock) for name in conns}
                raise Overdue({"left": list(left.values()), "readable": waiting})
            if events:
                time.sleep(GLANCE)  # it would go round and round
        poller.close()

    def talk(
        self, conns: list[str], rounds: int, size: int, opens: bool, timeout: float = 30.0
    ) -> dict[str, Any]:
        """On each connection `rounds` messages of `size` bytes each way, the answers sent as the bytes come.

        All that is read is read as Java's available() makes programs do: see Talk. Answers how often FIONREAD
        said 0 while bytes waited, and the longest time in which it said nothing else on one connection.
        """
        talks = {}
        poller = select.poll()
        for name in conns:
            each = Talk(self._connections[name], size, rounds, opens)
            talks[each.connection.sock.fileno()] = each
            poller.register(each.connection.sock, each.events)
        deadline = time.monotonic() + timeout
        while any(each.events for each in talks.values()):
            if time.monotonic() > deadline:
                raise Overdue([each.unread for each in talks.values()])
            for fd, events in poller.poll(GLANCE * 1000):
                each = talks[fd]
                if events & select.POLLOUT:
                    each.send()
                if events & select.POLLIN:
                    each.read()
                poller.modify(fd, each.events)
        return {
            "denials": sum(each.denials for each in talks.values()),
            "longest": max(each.longest_denial for each in talks.values()),
        }


if __name__ == "__main__":
    peer.Peer = Habitual  # type: ignore[misc]
    peer.serve()
