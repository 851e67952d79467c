# SPDX-License-Identifier: Apache-2.0
"""Probes of readers that ask for TCP_INQ: how many bytes are left to read?

They read as gRPC does: edge-triggered epoll, and recvmsg(2) until the answer is that nothing is left. Where
no answer comes they read on until EAGAIN.
"""

from __future__ import annotations

import random
import select
import signal
import socket
import struct
import threading
import time
from select import EPOLLET, EPOLLIN

from conformance.probes import probe
from conformance.scene import PATIENCE, End, Overdue, Scene, error_name, pattern, show

TCP, TCP_INQ = socket.IPPROTO_TCP, 36
ASKS = ((TCP, TCP_INQ, 1),)
BOTH = (ASKS, ASKS)
REFUSES = 7105  # support/host.py


class Asker:
    """Reads one end, `size` bytes at a time at most."""

    def __init__(self, s: Scene, end: End, size: int = 8192) -> None:
        self.scene, self.end, self.size = s, end, size
        self.epoll = s.keep(select.epoll())
        self.epoll.register(end.sock, EPOLLIN | EPOLLET)
        # What the last answer was; at first there may be something.
        self.left = 1

    def gather(self, count: int) -> tuple[bytes, str]:
        """Read until there are `count` bytes, the end or an error; no note."""
        data = b""
        while len(data) < count:
            if not self.left and not self.epoll.poll(PATIENCE):
                raise Overdue(f"{self.end.name} has {len(data)} bytes of {count}")
            self.left = 1
            try:
                piece, control, _, _ = self.end.sock.recvmsg(self.size, 64)
            except BlockingIOError:
                self.left = 0
                continue
            except OSError as error:
                return data, f", {error_name(error)}"
            if not piece:
                return data, ", end"
            data += piece
            for level, kind, value in control:
                if (level, kind) == (TCP, TCP_INQ):
                    [self.left] = struct.unpack("i", value)
        return data, ""

    def take(self, count: int) -> bytes:
        """The same as one call, with a line for all."""
        self.scene.moment()
        data, result = self.gather(count)
        self.scene.note(f"{self.end.name} take({count}) = {show(data)}{result}")
        return data


def read_in_queue(sock: socket.socket, count: int) -> str:
    data, control, _, _ = sock.recvmsg(count, 256)
    return f"{data!r} {[struct.unpack('i', value)[0] for _, _, value in control]}"


@probe()
def in_queue_message(s: Scene) -> None:
    """TCP_INQ asked for later: recvmsg(2) tells how many bytes still wait."""
    s.server.set("INQ", TCP, TCP_INQ, 1)
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recvmsg", lambda: read_in_queue(s.server.sock, 4))
    s.server.call("recvmsg", lambda: read_in_queue(s.server.sock, 100))


@probe(options=((), ASKS))
def in_queue_message_from_the_start(s: Scene) -> None:
    """TCP_INQ: every recvmsg(2) tells how many bytes still wait."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recvmsg", lambda: read_in_queue(s.server.sock, 4))
    s.server.call("recvmsg", lambda: read_in_queue(s.server.sock, 100))


@probe(options=BOTH, port=REFUSES, reason="control_messages")
def in_queue_message_where_it_is_refused(s: Scene) -> None:
    """The same at a service whose policy says that it cannot do without."""
    in_queue_message_from_the_start(s)


@probe(options=BOTH, cuts=8, storms=3)
def asks_and_answers(s: Scene) -> None:
    """Messages of many sizes to and fro, each read with a buffer that may be too small for it."""
    client, server = Asker(s, s.client), Asker(s, s.server, 1000)
    for number, size in enumerate((1, 1000, 1001, 300, 8192, 70_000, 17, 999, 16_384)):
        s.client.push(pattern(size, number))
        server.take(size)
        s.server.push(pattern(size + 3, number + 50))
        client.take(size + 3)


@probe(options=BOTH, cuts=8, storms=3)
def asks_with_several_waiting(s: Scene) -> None:
    """Several messages wait when the reader comes: one report, and all of them are read."""
    server = Asker(s, s.server, 500)
    for number in range(8):
        for part in range(number + 1):
            s.client.send(pattern(211, number * 10 + part))
        s.settle()
        server.take(211 * (number + 1))


@probe(options=BOTH, cuts=6)
def asks_whole_buffers(s: Scene) -> None:
    """Messages exactly as large as the reader's buffer: a full one does not mean that more is left."""
    server = Asker(s, s.server, 4096)
    for number in range(6):
        for _ in range(1 + number % 2):
            s.client.send(pattern(4096, number))
        server.take(4096 * (1 + number % 2))


@probe(options=BOTH)
def asks_until_the_end(s: Scene) -> None:
    """The end of the stream comes behind all bytes, and the answer of the half-closed side after it."""
    client, server = Asker(s, s.client), Asker(s, s.server, 100)
    s.client.send(pattern(1234))
    s.client.shutdown(socket.SHUT_WR)
    server.take(1235)
    s.server.push(pattern(40_000, 1))
    client.take(40_000)
    s.server.send(b"trailer")
    s.server.shutdown(socket.SHUT_WR)
    client.take(100)


@probe(options=BOTH)
def asks_as_the_end_comes(s: Scene) -> None:
    """A reader that has read everything, and waits, is told of the end."""
    server = Asker(s, s.server)
    s.client.send(b"all of it")
    server.take(9)
    closer = threading.Timer(0.02, s.client.sock.shutdown, (socket.SHUT_WR,))
    closer.start()
    server.take(1)
    closer.join()


@probe(options=BOTH)
def asks_until_a_reset(s: Scene) -> None:
    """A reader that waits is told of a reset."""
    client, server = Asker(s, s.client), Asker(s, s.server)
    s.client.send(b"request")
    server.take(7)
    s.server.send(b"answer")
    client.take(6)
    s.client.reset()
    server.take(1)
    s.server.poll()


@probe(options=BOTH)
def asks_behind_a_reset(s: Scene) -> None:
    """What had come before the reset is read before it."""
    server = Asker(s, s.server, 100)
    s.client.send(pattern(250))
    s.settle()
    s.client.reset()
    server.take(251)


@probe(options=BOTH, cuts=4)
def asks_between_signals(s: Scene) -> None:
    """A reader that is interrupted a thousand times a second gets everything."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    client, server = Asker(s, s.client), Asker(s, s.server, 1000)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for number in range(6):
            s.client.push(pattern(20_000, number))
            server.take(20_000)
            time.sleep(0.002)
            s.server.push(pattern(3000, number))
            client.take(3000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@probe(options=BOTH)
def asks_no_more(s: Scene) -> None:
    """TCP_INQ switched off and on again, with bytes there."""
    server = Asker(s, s.server, 300)
    for value in (0, 1, 0, 1):
        s.client.send(pattern(1000, value))
        s.settle()
        s.server.set("INQ", TCP, TCP_INQ, value)
        server.take(1000)


@probe(options=BOTH, cuts=2, storms=3)
def asks_streams_both_ways(s: Scene) -> None:
    """Megabytes both ways at once, in pieces of any size, as streaming calls send them."""
    s.moment()
    flows = [_Flow(s, s.client, 21), _Flow(s, s.server, 22)]
    time.sleep(0.003)
    s.moment()
    for each in flows:
        each.finish()


class _Flow:
    """4 MB from one end to the other, with a thread for each."""

    def __init__(self, s: Scene, sender: End, seed: int) -> None:
        self.scene, self.sender, self.seed = s, sender, seed
        self.data = pattern(4 << 20, seed)
        self.reader = Asker(s, s.other(sender), 64 << 10)
        self.got, self.trouble = b"", ""
        self.threads = [threading.Thread(target=each) for each in (self._send, self._read)]
        for thread in self.threads:
            thread.start()

    def _send(self) -> None:
        chance, at = random.Random(self.seed), 0
        while at < len(self.data):
            try:
                at += self.sender.sock.send(self.data[at : at + int(100_000 ** chance.random())])
            except BlockingIOError:
                self.sender.wait(select.POLLOUT)

    def _read(self) -> None:
        try:
            self.got, self.trouble = self.reader.gather(len(self.data))
        except Overdue as overdue:
            self.trouble = f", {overdue}"

    def finish(self) -> None:
        for thread in self.threads:
            thread.join()
        self.scene.note(f"from {self.sender.name}: all {self.got == self.data}{self.trouble}")
