# SPDX-License-Identifier: Apache-2.0
"""What a probe plays on: a connection, and the transcript of all that an application could observe of it.

Every call of an application goes through an `End` (or `Scene.call`) and leaves one line in the transcript.
Just before each is a *moment*, at which the connection may be taken back to plain TCP. Waiting for bytes to
arrive (`Scene.settle`) is the probe's own business and leaves no line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from support import pauses

from conformance.memory import Bound

SO_PEEK_OFF = 42
SIOCOUTQ = 0x5411
PATIENCE = 8.0  # seconds; whatever takes longer is a hang
SHOWN = 48  # bytes of data shown as they are; more are shown as a digest

EVENTS = {
    select.EPOLLIN: "IN",
    select.EPOLLPRI: "PRI",
    select.EPOLLOUT: "OUT",
    select.EPOLLERR: "ERR",
    select.EPOLLHUP: "HUP",
    select.EPOLLRDHUP: "RDHUP",
}

# Offsets in struct tcp_info, <linux/tcp.h>.
_STATE, _BYTES_RECEIVED, _NOTSENT, _BYTES_SENT, _BYTES_RETRANS = 0, 128, 144, 200, 208


class Overdue(Exception):
    """Something that has to happen did not."""


@dataclass(frozen=True)
class Cut:
    """When and how a connection goes back to plain TCP: at moment `at` (none: -1), then `lag` seconds pass.

    `how` is "guard" (an option that a spliced socket cannot have is asked for: at once and for good) or
    "drain" (the operator's command: some time during the lag, and adopted again afterwards).
    """

    at: int = -1
    lag: float = 0.0
    how: str = "guard"
    # Every moment takes a random time up to this, so that what happens meanwhile can happen anywhere.
    drag: float = 0.0
    seed: int = 0


def show(value: Any) -> str:
    """A value of a system call, as it stands in a transcript."""
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        if len(data) <= SHOWN:
            return repr(data)[1:]
        return f"{len(data)} bytes {hashlib.blake2b(data, digest_size=6).hexdigest()}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(each) for each in value) + "]"
    return str(value)


def names(mask: int) -> str:
    """The events of a poll mask; "-" for none."""
    return "|".join(name for bit, name in EVENTS.items() if mask & bit) or "-"


def pattern(count: int, seed: int = 0) -> bytes:
    """Bytes that depend on the seed alone."""
    return random.Random(seed).randbytes(count)


def error_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


@dataclass
class Scene:
    """A connection from `client` to `server`, and what a probe did with it."""

    client: End
    server: End
    cut: Cut = field(default_factory=Cut)
    report: Callable[[str], None] = lambda line: None
    lines: list[str] = field(default_factory=list)
    moments: int = 0
    drain: Callable[[], object] = lambda: None
    # A bound on the memory of one end's socket, where the probe asked for it.
    memory: Bound | None = None
    _chance: random.Random = field(default_factory=random.Random)
    _open: list[Any] = field(default_factory=list)
    _muted: bool = False

    def __post_init__(self) -> None:
        self.client.scene = self.server.scene = self
        self._chance.seed(self.cut.seed)

    # the transcript

    def note(self, line: str) -> None:
        if self._muted:
            return
        self.lines.append(line)
        self.report(line)

    def moment(self) -> None:
        """The connection may go back to plain TCP here."""
        number, self.moments = self.moments, self.moments + 1
        if self.cut.drag:
            time.sleep(self._chance.uniform(0.0, self.cut.drag))
        if number == self.cut.at:
            self._take_back()

    def call(self, label: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out one call; its value or the name of its error goes into the transcript, and comes back."""
        self.moment()
        try:
            value = function(*arguments)
        except OSError as error:
            value = error_name(error)
        self.note(f"{label} = {show(value)}")
        return value

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Nothing in it goes into the transcript: calls whose number or result TCP itself leaves to
        chance."""
        return _Quiet(self)

    def keep(self, thing: Any) -> Any:
        """Close `thing` when the probe is over."""
        self._open.append(thing)
        return thing

    def close(self) -> None:
        for thing in [*self._open, self.client.sock, self.server.sock]:
            with contextlib.suppress(OSError):
                thing.close()

    def other(self, end: End) -> End:
        return self.server if end is self.client else self.client

    # waiting

    def settle(self) -> None:
        """All that was sent either way through TCP is in the receiver's queue. Redirected bytes are at
        once."""
        for sender in (self.client, self.server):
            receiver = self.other(sender)
            if sender.closed or receiver.closed:
                continue
            self.until(f"what {sender.name} sent has arrived", lambda s=sender, r=receiver: _arrived(s, r))

    def until(self, what: str, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
        deadline = time.monotonic() + patience
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise Overdue(what)
            time.sleep(0.0005)

    def _take_back(self) -> None:
        if self.cut.how == "drain":
            self.drain()
        for end in (self.client, self.server):
            if self.cut.how == "guard" and not end.closed:
                # The guard sees the request and starts draining; -1 is what the socket has anyway. A kernel
                # without the option answers EOPNOTSUPP, after the guard has seen it.
                try:
                    end.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
                except OSError as error:
                    if error.errno == errno.ENOTSOCK:
                        continue
                break
        if self.cut.lag:
            time.sleep(self.cut.lag)


class _Quiet(contextlib.AbstractContextManager[None]):
    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __enter__(self) -> None:
        self.scene._muted = True

    def __exit__(self, *_: object) -> None:
        self.scene._muted = False


@dataclass
class End:
    """One end of the connection. Methods without a note of their own say so."""

    name: str
    sock: socket.socket
    scene: Scene = field(init=False, repr=False)

    @property
    def closed(self) -> bool:
        return self.sock.fileno() < 0

    @property
    def fd(self) -> int:
        return self.sock.fileno()

    def call(self, label: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.scene.call(f"{self.name} {label}", function, *arguments)

    # sending

    def send(self, data: bytes, flags: int = 0) -> Any:
        """A single send(2)."""
        return self.call(f"send({len(data)}{_flags(flags)})", self.sock.send, data, flags)

    def sendmsg(self, buffers: Sequence[bytes], flags: int = 0) -> Any:
        sizes = "+".join(str(len(each)) for each in buffers[:6])
        return self.call(f"sendmsg({sizes}{_flags(flags)})", self.sock.sendmsg, buffers, [], flags)

    def push(self, data: bytes, chunk: int = 1 << 18, flags: int = 0) -> None:
        """Send all of it, waiting for room; one line for all."""
        self.scene.moment()
        view, sent, result = memoryview(data), 0, ""
        try:
            while sent < len(data):
                try:
                    sent += self.sock.send(view[sent : sent + chunk], flags)
                except BlockingIOError:
                    self.wait(select.POLLOUT)
        except OSError as error:
            result = f", {error_name(error)}"
        self.scene.note(f"{self.name} push({len(data)} in {chunk}) = {sent}{result}")

    def fill(self, chunk: int, limit: int = 1 << 26) -> int:
        """Send until EAGAIN, with pauses until no more is taken, as buffers grow. How much depends: no note.

        What is sent is `pattern(chunk, 9)` again and again.
        """
        data, total = memoryview(pattern(chunk, 9) * 2), 0
        refused = 0
        while True:
            before = total
            while total < limit:
                try:
                    total += self.sock.send(data[total % chunk : total % chunk + chunk])
                except BlockingIOError:
                    break
            # A delayed acknowledgement may still make room: the last look is one that found none.
            refused = refused + 1 if total == before else 0
            if refused == 2 or total >= limit:
                return total
            pauses.sleep(0.05)

    # receiving

    def recv(self, count: int, flags: int = 0) -> Any:
        """A single recv(2) of what is there."""
        return self.call(f"recv({count}{_flags(flags)})", self.sock.recv, count, flags)

    def read(self, count: int) -> Any:
        return self.call(f"read({count})", os.read, self.fd, count)

    def readv(self, *sizes: int) -> Any:
        buffers = [bytearray(size) for size in sizes]
        return self.call(f"readv{sizes}", lambda: _cut_to(os.readv(self.fd, buffers), buffers))

    def recvmsg(self, *sizes: int, flags: int = 0, ancillary: int = 0) -> Any:
        """recvmsg(2) into several buffers: bytes, control messages and msg_flags."""
        buffers = [bytearray(size) for size in sizes]

        def carry_out() -> list[Any]:
            count, control, seen, _ = self.sock.recvmsg_into(buffers, ancillary, flags)
            return [_cut_to(count, buffers), len(control), f"flags {seen:#x}"]

        return self.call(f"recvmsg{sizes}{_flags(flags)}", carry_out)

    def take(self, count: int, chunk: int = 1 << 18, flags: int = 0) -> bytes:
        """Exactly `count` bytes in as many reads as it takes, fewer at the end of the stream; one line."""
        self.scene.moment()
        parts, left, result = [], count, ""
        try:
            while left:
                try:
                    data = self.sock.recv(min(chunk, left), flags)
                except BlockingIOError:
                    self.wait(select.POLLIN)
                    continue
                if not data:
                    result = ", end"
                    break
                parts.append(data)
                left -= len(data)
        except OSError as error:
            result = f", {error_name(error)}"
        data = b"".join(parts)
        self.scene.note(f"{self.name} take({count}) = {show(data)}{result}")
        return data

    def rest(self) -> bytes:
        """All that is there, in as many reads as it takes; ends at EAGAIN, an error or the end."""
        self.scene.settle()
        self.scene.moment()
        parts, result = [], "EAGAIN"
        try:
            while True:
                data = self.sock.recv(1 << 18)
                if not data:
                    result = "end"
                    break
                parts.append(data)
        except OSError as error:
            result = error_name(error)
        data = b"".join(parts)
        self.scene.note(f"{self.name} rest() = {show(data)}, {result}")
        return data

    # looking

    def wait(self, mask: int, patience: float = PATIENCE) -> int:
        """Sleep until poll(2) shows one of `mask`; no note. Raises Overdue."""
        poller = select.poll()
        poller.register(self.sock, mask)
        found = poller.poll(patience * 1000)
        if not found:
            raise Overdue(f"{self.name} waits for {names(mask)}")
        return found[0][1]

    def poll(self, timeout: float = 0.0) -> Any:
        """All events of poll(2)."""

        def look() -> str:
            poller = select.poll()
            poller.register(self.sock, select.POLLIN | select.POLLPRI | select.POLLOUT | select.POLLRDHUP)
            return names(sum(mask for _, mask in poller.poll(timeout * 1000)))

        return self.call("poll", look)

    def select(self, timeout: float = 0.0) -> Any:
        def look() -> str:
            found = select.select([self.sock], [self.sock], [self.sock], timeout)
            return "".join(letter for letter, each in zip("rwx", found, strict=True) if each) or "-"

        return self.call("select", look)

    def fionread(self) -> Any:
        return self.call("FIONREAD", _ioctl, self.sock, termios.FIONREAD)

    def outq(self) -> Any:
        return self.call("SIOCOUTQ", _ioctl, self.sock, SIOCOUTQ)

    def error(self) -> Any:
        """getsockopt(SO_ERROR), by name."""

        def get() -> str:
            number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return errno.errorcode.get(number, str(number))

        return self.call("SO_ERROR", get)

    def state(self) -> int:
        """The number of the TCP state; no note. 1 ESTABLISHED, 7 CLOSE, 8 CLOSE_WAIT."""
        return tcp_info(self.sock)[_STATE]

    # options and endings

    def set(self, label: str, level: int, option: int, value: int | bytes) -> Any:
        return self.call(f"set {label}", self.sock.setsockopt, level, option, value)

    def get(self, label: str, level: int, option: int) -> Any:
        return self.call(f"get {label}", self.sock.getsockopt, level, option)

    def shutdown(self, how: int) -> Any:
        """shutdown(2); after one of writing the other end has seen the FIN when this returns."""
        value = self.call(f"shutdown({('RD', 'WR', 'RDWR')[how]})", self.sock.shutdown, how)
        if how != socket.SHUT_RD:
            self.scene.settle()
            other = self.scene.other(self)
            if not other.closed and value is None:
                self.scene.until("the FIN", lambda: other.state() not in (1, 4, 5))
        return value

    def close(self) -> None:
        self.scene.moment()
        self.sock.close()
        self.scene.note(f"{self.name} close")

    def reset(self) -> None:
        """close(2) with SO_LINGER 0, which sends a RST; it has arrived when this returns."""
        self.scene.moment()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        other = self.scene.other(self)
        if not other.closed:
            self.scene.until("the RST", lambda: other.state() == 7)
        self.scene.note(f"{self.name} reset")


def tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)


def received_bytes(sock: socket.socket) -> int:
    """What came through TCP, by its own count."""
    return _u64(tcp_info(sock), _BYTES_RECEIVED)


def _arrived(sender: End, receiver: End) -> bool:
    out, into = tcp_info(sender.sock), tcp_info(receiver.sock)
    if out[_STATE] == 7 or into[_STATE] == 7:
        return True
    sent = _u64(out, _BYTES_SENT) - _u64(out, _BYTES_RETRANS)
    return struct.unpack_from("I", out, _NOTSENT)[0] == 0 and _u64(into, _BYTES_RECEIVED) >= sent


def _u64(info: bytes, offset: int) -> int:
    return int(struct.unpack_from("Q", info, offset)[0])


def _ioctl(sock: socket.socket, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, request, b"\0" * 4))[0])


def _flags(flags: int) -> str:
    found = [
        name
        for bit, name in (
            (socket.MSG_PEEK, "PEEK"),
            (socket.MSG_TRUNC, "TRUNC"),
            (socket.MSG_WAITALL, "WAITALL"),
            (socket.MSG_DONTWAIT, "DONTWAIT"),
            (socket.MSG_MORE, "MORE"),
            (socket.MSG_OOB, "OOB"),
            (socket.MSG_NOSIGNAL, "NOSIGNAL"),
            (socket.MSG_EOR, "EOR"),
            (socket.MSG_ERRQUEUE, "ERRQUEUE"),
        )
        if flags & bit
    ]
    return ", " + "|".join(found) if found else ""


def _cut_to(count: int, buffers: list[bytearray]) -> list[bytes]:
    """What a scattered read of `count` bytes left in each buffer."""
    found = []
    for each in buffers:
        found.append(bytes(each[:count]))
        count = max(0, count - len(each))
    return found
