# SPDX-License-Identifier: Apache-2.0
"""One end of a connection in an epoll loop: reads and writes frames, and measures what it had to wait for."""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import select
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from soak.plans import BYE, CLIENT_ENDS, EXACT, SERVER_ENDS, Habits, Plan, draw_size, read_plan
from soak.protocol import CLIENT, SERVER, Decoder, Encoder, Fault, Frame, Kind, Outgoing, Sent
from soak.scarcity import NOWHERE_TO_READ, PAUSE, insist

if TYPE_CHECKING:
    from soak.worker import Worker

GROUP_BYTES = 60_000  # frames handed to the kernel together, unless one is larger
READS_PER_TURN = 8
LONG_STALL = 0.1  # seconds; told at once
LONG_DENIAL_NS = 30_000_000  # the daemon rescues after 40 ms
WARM_THOUGHT = 0.03  # seconds, on average
LONGEST_THOUGHT = 3.0  # seconds; a connection that is quiet for longer is worth a look
BROKEN = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError, TimeoutError)
GONE = select.EPOLLHUP | select.EPOLLERR


class NothingThere(Exception):
    """FIONREAD says so."""


class Channel:
    """What both ends have in common. `side` is the end's own; it reads what the other side sends."""

    side = CLIENT

    def __init__(self, worker: Worker, sock: socket.socket, conn: int | None) -> None:
        self.worker = worker
        self.sock = sock
        self.fd = sock.fileno()
        self.conn = conn
        self.rng = worker.rng
        self.plan = Plan("unknown")
        self.decoder = Decoder(worker.pool, 1 - self.side, conn, worker.nonce)
        self.encoder: Encoder | None = None
        self.born = self.moved = time.monotonic_ns()
        self.peer = ""
        self.remote = ""
        self.state = "open"
        self.closed = False
        self.eof = self.shut = False
        self.warned = False
        # Writing.
        self._queue: deque[Outgoing] = deque()
        self._group = memoryview(b"")
        self._taken = 0
        self._sends = 0
        self._sent = Sent()
        self._first_ns = 0
        self._blocked_since = 0
        self._blocked_us = 0
        # Reading. `_listed`: the last turn of the loop in which this end was told to read.
        self._wants = True
        self._paused = False
        self._listed = self._wanted_since = worker.turn
        self._start_unread = self._last_unread = 0
        self._idle_us = 0
        self._buffer = bytearray(1)
        self._events = 0
        self._mask = 0  # what epoll said last
        self._stalled = 0.0  # seconds, the longest stall
        self._denied_since = 0  # epoll said that there are bytes, FIONREAD that there are none
        self._watch()

    @property
    def habits(self) -> Habits:
        return self.plan.client if self.side == CLIENT else self.plan.server

    @property
    def is_idle(self) -> bool:
        """Nothing waits to be sent."""
        return not self._queue and self._taken == len(self._group)

    def describe(self) -> dict[str, Any]:
        return {
            "conn": f"{self.conn or 0:x}",
            "side": "server" if self.side else "client",
            "pattern": self.plan.pattern,
            "end": self.plan.end,
            "spliced": self.plan.spliced,
            "edge": self.habits.edge,
            "read": self.habits.read,
            "size": self.habits.size,
            "pause": round(self.habits.pause, 4),
            "state": self.state,
            "local": _name(self.sock, "getsockname"),
            "remote": self.remote or _name(self.sock, "getpeername"),
            "peer": self.peer,
            "read_frames": self.decoder.seq,
            "read_bytes": self.decoder.position,
            "sent_frames": self.encoder.seq if self.encoder else 0,
            "unsent": len(self._queue),
            "sends": self._sends,
            "paused": self._paused,
            "stalled": round(self._stalled, 4),
            "age": round((time.monotonic_ns() - self.born) / 1e9, 3),
            "quiet": round((time.monotonic_ns() - self.moved) / 1e9, 3),
            "born": self.born / 1e9,
        }

    # what the loop calls

    def on_event(self, events: int) -> None:
        self._mask = events
        if events & (select.EPOLLIN | select.EPOLLRDHUP | GONE):
            if self._paused and not events & GONE:
                self.worker.pending.discard(self)  # an edge: looked at when the pause is over
            else:
                if self._paused:
                    self._paused = False
                    self._listed = self.worker.turn  # it did not ask before
                self.receive()
        if not self.closed and events & select.EPOLLOUT:
            self.send()

    def resume(self) -> None:
        """The end of a pause."""
        if self.closed or not self._paused:
            return
        self._paused = False
        self._wanted_since = self.worker.turn
        if self.habits.edge:
            self._listed = self.worker.turn
            self.receive()
        else:
            self._watch()

    def receive(self) -> None:
        """Read what there is, within bounds."""
        worker = self.worker
        unread_until = 0
        if self._listed < worker.turn - 1 and self._wanted_since < worker.turn - 1:
            unread_until = worker.turned_ns  # it had asked then, and was told nothing
        listed, self._listed = self._listed, worker.turn
        worker.pending.discard(self)
        for number in range(READS_PER_TURN):
            if not self._wants or self.closed:
                return
            try:
                data = self._read()
            except BlockingIOError:
                return
            except NothingThere:
                if not number:
                    self._listed = listed  # it was told so, although epoll said otherwise
                    self._denied_since = self._denied_since or time.monotonic_ns()
                return
            except BROKEN as error:
                self.on_broken(type(error).__name__)
                return
            except OSError as error:
                if error.errno not in NOWHERE_TO_READ:
                    raise
                self._pause(PAUSE)
                return
            if not data:
                self.eof = True
                self._wants = False
                self._watch()
                if self.decoder.ended and self.decoder.is_between_frames:
                    self.on_eof()
                else:
                    self.on_broken("EOF")
                return
            self._arrived(data, unread_until)
            unread_until = 0
            if self.closed:
                return
            if self.habits.pause:
                self._pause(self.rng.expovariate(1 / self.habits.pause))
                return
        if self.habits.edge:
            worker.pending.add(self)

    def send(self) -> None:
        """Write what there is until the kernel takes no more."""
        while not self.closed and not self.shut:
            if self._taken == len(self._group) and not self._next_group():
                break
            piece = self._group[self._taken :]
            if self.plan.pieces:
                piece = piece[: self.rng.randint(1, self.plan.pieces)]
            try:
                taken = self.sock.send(piece)
            except BlockingIOError:
                if not self._blocked_since:
                    self._blocked_since = time.monotonic_ns()
                self._watch()
                return
            except BROKEN as error:
                # What the peer had sent before may still be there to read.
                self._queue.clear()
                self._group, self._taken, self._blocked_since = memoryview(b""), 0, 0
                self.shut = True
                if not self.eof:
                    self.on_unsendable(type(error).__name__)
                return
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                # Plain TCP says EAGAIN instead. report.py knows when this may be.
                self.worker.tally.count("no_memory", self.plan.spliced, self.plan.pattern)
                self.worker.later(PAUSE, self._send_again)
                return
            now = time.monotonic_ns()
            if self._blocked_since:
                # Until the loop asked last and was told that nothing more can be written; what comes after
                # that is this process's own slowness.
                refused_ns = self._count_waited(self._blocked_since, self.worker.turned_ns)
                self._blocked_us = max(self._blocked_us, refused_ns // 1000)
                self._blocked_since = 0
            self._sends += 1
            if not self._taken:
                self._first_ns = now
            self._taken += taken
            self.moved = now
            if self._taken == len(self._group):
                self._sent = Sent(self._first_ns, now, min(self._blocked_us, 0xFFFFFFFF))
        if not self.closed:
            self._watch()
            self.on_sent()

    def _send_again(self) -> None:
        if not self.closed:
            self.send()

    def queue(self, *frames: Outgoing) -> None:
        self._queue.extend(frames)

    def finish_sending(self) -> None:
        """Half-close."""
        if not self.shut:
            self.shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if not self.eof:
                    self.on_unsendable(type(error).__name__)

    def close(self, how: str, linger: bool = False) -> None:
        """Close the socket; `how` is counted. `linger`: with a reset."""
        if self.closed:
            return
        self.closed = True
        self.worker.tally.count("ended", self.plan.spliced, how)
        if linger:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.worker.forget(self)
        self.sock.close()

    def leave(self) -> None:
        """Close as the plan's end wants it: with bytes unread, or with a reset."""
        self.close(f"{self.plan.end} own", linger=self.plan.end.startswith("reset"))

    # what the two sides do differently

    def on_frame(self, frame: Frame) -> None:
        raise NotImplementedError

    def on_eof(self) -> None:
        """The peer's last frame was read, and then the end of the stream."""
        raise NotImplementedError

    def on_sent(self) -> None:
        """The kernel has taken all there is."""

    def is_expected(self) -> bool:
        """True if by the plan the peer may break off now."""
        raise NotImplementedError

    def on_unsendable(self, how: str) -> None:
        """The peer is gone as far as sending is concerned. Reading finds out the rest; not if it is blind."""
        if not self._wants or self._paused:
            self.on_broken(how)

    def on_broken(self, how: str) -> None:
        """The end of the stream without its last frame, or a reset."""
        kind = "fin" if how == "EOF" else "rst"
        if self.is_expected():
            self.close(f"{self.plan.end} {kind}")
            return
        self.worker.say("cut", {**self.describe(), "how": how, "time": time.monotonic_ns() / 1e9})
        self.close(f"cut {kind}")

    # inside

    def _watch(self) -> None:
        """Tell epoll what to wait for."""
        if self.habits.edge and self._events & select.EPOLLET:
            return
        if self.habits.edge:
            events = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
        else:
            # Whoever trusts FIONREAD needs another way to see the end.
            wanted = select.EPOLLIN | (select.EPOLLRDHUP if self.habits.read == EXACT else 0)
            events = wanted if self._wants and not self._paused else 0
            if self._blocked_since or self.state == "connecting":
                events |= select.EPOLLOUT
        if events != self._events:
            if self._events or self.fd in self.worker.channels:
                insist(self.worker.epoll.modify, self.fd, events)
            else:
                insist(self.worker.epoll.register, self.fd, events)
                self.worker.channels[self.fd] = self
            self._events = events

    def _pause(self, seconds: float) -> None:
        self._paused = True
        self._watch()
        self.worker.later(seconds, self.resume)

    def _read(self) -> bytes | memoryview:
        habits = self.habits
        if habits.read == "recv":
            return self.sock.recv(habits.size)
        if habits.read == EXACT:
            waiting = array.array("i", [0])
            fcntl.ioctl(self.fd, termios.FIONREAD, waiting)
            if not waiting[0] and not self._mask & (select.EPOLLRDHUP | GONE):
                raise NothingThere
            return self.sock.recv(min(max(waiting[0], 1), habits.size))
        if habits.read == "read":
            return os.read(self.fd, habits.size)
        if len(self._buffer) != habits.size:
            self._buffer = bytearray(habits.size)
        view = memoryview(self._buffer)
        if habits.read == "recv_into":
            return view[: self.sock.recv_into(view)]
        middle = habits.size // 3
        parts = [view[:middle], view[middle:]]
        if habits.read == "readv":
            return view[: os.readv(self.fd, parts)]
        return view[: self.sock.recvmsg_into(parts)[0]]

    def _arrived(self, data: bytes | memoryview, unread_until: int) -> None:
        if unread_until and not self.decoder.is_between_frames:
            self._idle_us = max(self._idle_us, self._count_waited(self.moved, unread_until) // 1000)
        if self.decoder.is_between_frames:
            self._start_unread = unread_until
        self.moved = time.monotonic_ns()
        if self._denied_since:
            if self.moved - self._denied_since > LONG_DENIAL_NS:
                self.worker.tally.count("denied", self.plan.spliced, EXACT)
            self._denied_since = 0
        spliced = self.plan.spliced
        messages = 0
        try:
            for frame in self.decoder.feed(data):
                messages += 1
                if frame.done_ns:
                    self._measure(frame)
                self._last_unread = unread_until
                self._start_unread = unread_until
                self.on_frame(frame)
                if self.closed:
                    break
        except Fault as fault:
            self.worker.say("fault", {**self.describe(), "fault": fault.kind, "detail": fault.detail})
            self.close("fault", linger=True)
        self.worker.tally.count("bytes", spliced, self.plan.pattern, len(data))
        self.worker.tally.count("messages", spliced, self.plan.pattern, messages)

    def _measure(self, frame: Frame) -> None:
        """How long the group before this frame was there and could not be read."""
        waited = max(
            self._count_waited(frame.first_ns, self._group_start),
            self._count_waited(frame.done_ns, self._last_unread),
            min(self._idle_us, frame.blocked_us) * 1000,
        )
        seconds = waited / 1e9
        self._stalled = max(self._stalled, seconds)
        if self.worker.tally.stall(self.plan.spliced, seconds) or seconds > LONG_STALL:
            record = {"seconds": round(seconds, 6), "time": time.monotonic_ns() / 1e9, **self.describe()}
            self.worker.tally.remember(self.plan.spliced, record)
            if seconds > LONG_STALL:
                self.worker.say("stall", record)
        self._group_start = self._start_unread
        self._idle_us = 0

    def _count_waited(self, since: int, until: int) -> int:
        """Nanoseconds between two times in which this end asked, and was told that there is nothing."""
        return until - since - self.worker.count_absent(since, until) if until > since else 0

    _group_start = 0

    def _next_group(self) -> bool:
        if not self._queue or self.encoder is None:
            return False
        parts: list[bytes | memoryview] = []
        size = 0
        while self._queue and (not parts or size + self._queue[0].length < GROUP_BYTES):
            header, payload = self.encoder.encode(self._queue.popleft(), Sent() if parts else self._sent)
            parts += [header, payload]
            size += len(header) + len(payload)
        self._group = memoryview(b"".join(parts))
        self._taken = 0
        self._blocked_us = 0
        return True


class ClientChannel(Channel):
    """The end that connects, and carries out the plan."""

    side = CLIENT

    def __init__(self, worker: Worker, sock: socket.socket, conn: int, plan: Plan, target: str) -> None:
        super().__init__(worker, sock, conn)
        self.plan = plan
        self.remote = target
        self.encoder = Encoder(worker.pool, conn, CLIENT)
        self._left = plan.rounds
        self._warm = plan.warm
        self._missing: deque[tuple[int, int]] = deque()  # lengths of answers, and how many of each
        self._outstanding = 0
        self.crashing = False
        self.state = "connecting"
        hello = json.dumps({"plan": plan.to_json(), "worker": worker.name}).encode()
        self.queue(Outgoing(Kind.HELLO, len(hello), payload=hello))
        self._watch()

    def on_event(self, events: int) -> None:
        if self.state == "connecting":
            number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number or not events & select.EPOLLOUT:
                self.worker.refused += 1
                self.close("refused")
                return
            self.state = "talking"
            if self.plan.client.nodelay:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.worker.tally.count("connections", self.plan.spliced, self.plan.pattern)
            self._advance()
        super().on_event(events)

    def renew(self) -> None:
        """End at the next occasion."""
        self._left = 0

    def on_frame(self, frame: Frame) -> None:
        if frame.kind == Kind.HELLO:
            self.peer = frame.payload.decode()
        elif frame.kind == Kind.ANSWER:
            self._check_answer(frame.length)
            if not self._outstanding and (self.plan.waits or self._left <= 0 or not self.plan.answers):
                self._think()
        elif frame.kind == Kind.BYE:
            if self.state != "ending" or self._outstanding:
                raise Fault("lost", f"the server ended with {self._outstanding} answers missing")
        else:
            raise Fault("foreign", f"a client got a frame of kind {frame.kind}")

    def on_eof(self) -> None:
        self.close(BYE if not self.plan.late else "half_close")

    def on_sent(self) -> None:
        if self.state == "ending" and not self.shut and self.is_idle:
            self.finish_sending()
        elif self.state == "leaving" and self.is_idle:
            self.state = "left"
            self._wants = False
            self._watch()
            self.worker.later(self.rng.uniform(0.02, 0.12), self.leave)

    def is_expected(self) -> bool:
        return self.crashing

    def _check_answer(self, length: int) -> None:
        if not self._missing:
            raise Fault("repeated", "an answer that was not asked for")
        wanted, n = self._missing.popleft()
        if n > 1:
            self._missing.appendleft((wanted, n - 1))
        if wanted != length:
            raise Fault("misordered", f"an answer of {length} bytes instead of {wanted}")
        self._outstanding -= 1

    def _think(self) -> None:
        mean = WARM_THOUGHT if self._warm else self.plan.think
        seconds = self.rng.expovariate(1 / (mean * self.worker.pace))
        self.worker.later(min(seconds, LONGEST_THOUGHT), self._advance)

    def _advance(self) -> None:
        """The next round, or the end."""
        if self.closed or self.state != "talking":
            return
        plan = self.plan
        if self._left <= 0:
            self._end()
            return
        if not self.is_idle or (not plan.waits and self._outstanding >= plan.window):
            self._think()
            return
        if self._warm > 0:
            self._warm -= 1
            self._request(plan.down[0], answers=1)
            self.send()
            return
        self._left -= 1
        for _ in range(plan.depth):
            self._request()
        self.send()
        if not plan.waits or not plan.answers:
            self._think()

    def _request(self, down: int | None = None, answers: int | None = None) -> None:
        plan = self.plan
        wanted = draw_size(self.rng, plan.down) if down is None else down
        answers = plan.answers if answers is None else answers
        self.queue(Outgoing(Kind.REQUEST, draw_size(self.rng, plan.up), wanted, answers))
        if answers:
            self._missing.append((wanted, answers))
            self._outstanding += answers

    def _end(self) -> None:
        plan = self.plan
        if plan.end in CLIENT_ENDS:
            self.state = "leaving"
            self.crashing = True
            for _ in range(3):
                self._request(down=9000)
        elif plan.end in SERVER_ENDS:
            self.state = "crashing"
            self.crashing = True
            self.queue(Outgoing(Kind.CRASH, 10))
            self.worker.later(0.01, self._pester)
        elif self._outstanding and not plan.late:
            return  # comes again with the last answer
        else:
            self.state = "ending"
            self.queue(Outgoing(Kind.BYE, 1))
        self.send()

    def _pester(self) -> None:
        """More for a server that does not read any more."""
        if not self.closed and not self.shut:
            for _ in range(3):
                self._request(down=9000)
            self.send()


class ServerChannel(Channel):
    """The end that was accepted, and answers."""

    side = SERVER

    def __init__(self, worker: Worker, sock: socket.socket, remote: str) -> None:
        super().__init__(worker, sock, None)
        self.remote = remote
        self._held: list[Outgoing] = []

    def on_frame(self, frame: Frame) -> None:
        if frame.kind == Kind.REQUEST:
            answers = [Outgoing(Kind.ANSWER, frame.want)] * frame.count
            if self.plan.late:
                self._held += answers
            elif answers:
                self.queue(*answers)
                self.worker.sending.add(self)
        elif frame.kind == Kind.HELLO:
            self._begin(frame)
        elif frame.kind == Kind.BYE:
            self.state = "ending"
            if not self.plan.late:
                self._say_bye()
        elif frame.kind == Kind.CRASH:
            self.state = "leaving"
            self._wants = False
            self._watch()
            self.worker.later(self.rng.uniform(0.02, 0.12), self.leave)
        else:
            raise Fault("foreign", f"a server got a frame of kind {frame.kind}")

    def on_eof(self) -> None:
        if self.plan.late:
            self.queue(*self._held)
            self._say_bye()
        if self.shut:
            self.close(BYE if not self.plan.late else "half_close")

    def on_sent(self) -> None:
        if self.state == "said_bye" and self.is_idle:
            self.finish_sending()
            if self.eof:
                self.close(BYE if not self.plan.late else "half_close")

    def is_expected(self) -> bool:
        return self.plan.end in CLIENT_ENDS or self.state == "leaving"

    def _say_bye(self) -> None:
        self.state = "said_bye"
        self.queue(Outgoing(Kind.BYE, 1))
        self.worker.sending.add(self)

    def _begin(self, frame: Frame) -> None:
        if self.encoder is not None:
            raise Fault("repeated", "a second plan")
        hello = json.loads(frame.payload)
        self.plan = read_plan(hello["plan"])
        self.peer = hello["worker"]
        self.conn = frame.conn
        self.encoder = Encoder(self.worker.pool, frame.conn, SERVER)
        if self.plan.server.nodelay:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.plan.server.edge:
            self.worker.pending.add(self)  # the rest of what is there raises no edge
            self._watch()
        name = self.worker.name.encode()
        self.queue(Outgoing(Kind.HELLO, len(name), payload=name))
        self.worker.sending.add(self)


def name_address(address: Sequence[Any]) -> str:
    """`a.b.c.d:port` or `[v6]:port`."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


def _name(sock: socket.socket, how: str) -> str:
    try:
        address = getattr(sock, how)()
    except OSError:
        return ""
    return name_address(address)
