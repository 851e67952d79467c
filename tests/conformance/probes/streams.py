# SPDX-License-Identifier: Apache-2.0
"""Probes of longer exchanges: every byte once and in order, whatever the sizes and whoever is slow."""

from __future__ import annotations

import hashlib
import random
import select
import threading
import time

from conformance.probes import probe
from conformance.scene import End, Overdue, Scene, pattern

MIB = 1 << 20


class Flow:
    """Bytes one way: a thread that sends and one that reads, both non-blocking with poll(2)."""

    def __init__(self, s: Scene, sender: End, data: bytes, sizes: list[int], pause: float = 0.0) -> None:
        self.scene, self.sender, self.receiver = s, sender, s.other(sender)
        self.data, self.sizes, self.pause = data, sizes, pause
        self.got = hashlib.blake2b(digest_size=6)
        self.count, self.first_wrong, self.trouble = 0, -1, ""
        self._threads = [
            threading.Thread(target=self._guard, args=(each,)) for each in (self._send, self._read)
        ]

    def __enter__(self) -> Flow:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._threads:
            each.join()
        self.scene.note(
            f"{self.sender.name} sent {len(self.data)}, {self.receiver.name} got {self.count} "
            f"{self.got.hexdigest()}, first wrong {self.first_wrong}{self.trouble}"
        )

    def _guard(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except (OSError, Overdue) as error:
            self.trouble += f", {error}"

    def _send(self) -> None:
        view, at, number = memoryview(self.data), 0, 0
        while at < len(self.data):
            size = self.sizes[number % len(self.sizes)]
            number += 1
            try:
                at += self.sender.sock.send(view[at : at + size])
            except BlockingIOError:
                self.sender.wait(select.POLLOUT)

    def _read(self) -> None:
        while self.count < len(self.data):
            try:
                data = self.receiver.sock.recv(50_000)
            except BlockingIOError:
                self.receiver.wait(select.POLLIN)
                continue
            if not data:
                return
            if self.first_wrong < 0 and data != self.data[self.count : self.count + len(data)]:
                self.first_wrong = self.count
            self.got.update(data)
            self.count += len(data)
            if self.pause:
                time.sleep(self.pause)


def _sizes(seed: int, largest: int, count: int = 200) -> list[int]:
    chance = random.Random(seed)
    return [int(largest ** chance.random()) + 1 for _ in range(count)]


@probe(cuts=2, storms=3, nagle=True)
def stream_of_small_messages(s: Scene) -> None:
    """A stream of small messages one way."""
    s.moment()
    with Flow(s, s.client, pattern(600_000, 1), [200]):
        time.sleep(0.01)
        s.moment()


@probe(cuts=1, storms=2)
def stream_of_large_messages(s: Scene) -> None:
    """A stream of large messages one way."""
    s.moment()
    with Flow(s, s.client, pattern(16 * MIB, 2), [256 << 10]):
        time.sleep(0.003)
        s.moment()


@probe(cuts=2, storms=3, nagle=True)
def stream_of_mixed_messages(s: Scene) -> None:
    """Messages from one byte to half a megabyte."""
    s.moment()
    with Flow(s, s.server, pattern(8 * MIB, 3), _sizes(3, 500_000)):
        time.sleep(0.003)
        s.moment()


@probe(cuts=2, storms=3)
def streams_both_ways(s: Scene) -> None:
    """Both directions at full speed at the same time."""
    s.moment()
    one = Flow(s, s.client, pattern(4 * MIB, 4), _sizes(4, 60_000))
    other = Flow(s, s.server, pattern(4 * MIB, 5), _sizes(5, 60_000))
    with one:
        with other:
            time.sleep(0.003)
            s.moment()


@probe(cuts=2, storms=3)
def many_small_messages_and_a_slow_reader(s: Scene) -> None:
    """A reader slower than the sender of many small messages."""
    s.moment()
    with Flow(s, s.client, pattern(300_000, 6), [60], pause=0.0005):
        time.sleep(0.01)
        s.moment()


@probe(cuts=2, storms=2)
def large_messages_and_a_slow_reader(s: Scene) -> None:
    """A reader slower than the sender of large messages: the sender is held back, nothing is lost."""
    s.moment()
    with Flow(s, s.client, pattern(12 * MIB, 7), [400_000], pause=0.0003):
        time.sleep(0.01)
        s.moment()


@probe(cuts=3)
def megabytes_at_once(s: Scene) -> None:
    """Single sends of megabytes; what is not taken is sent when there is room."""
    for size in (1 * MIB, 3 * MIB):
        with Flow(s, s.client, pattern(size, size), [size]):
            s.moment()
        with Flow(s, s.server, pattern(size, size + 1), [size]):
            s.moment()


@probe(cuts=4)
def held_back(s: Scene) -> None:
    """When the reader does not read, the sender gets EAGAIN after a bounded number of bytes and is not
    writable; later everything arrives in order."""
    chunk = pattern(10_000, 9)
    total = s.client.fill(10_000)
    s.note(f"bounded: {total < 32 * MIB}")
    s.client.poll()
    s.client.send(b"no room")
    with s.quiet():
        data = s.server.take(total)
    whole = chunk * (total // 10_000 + 1)
    s.note(f"all in order: {data == whole[:total]}")
    s.client.wait(select.POLLOUT)
    s.client.poll()
    s.client.send(b"room again")
    s.settle()
    s.server.rest()


@probe(cuts=2, drains=1)
def held_back_both_ways(s: Scene) -> None:
    """Both ends full at the same time: nobody is stuck."""
    totals = [end.fill(20_000) for end in (s.client, s.server)]
    s.client.poll()
    s.server.poll()
    with s.quiet():
        got = [len(s.client.take(totals[1])), len(s.server.take(totals[0]))]
    s.note(f"all: {got == totals[::-1]}")
    s.client.send(b"ping")
    s.settle()
    s.server.rest()


@probe(cuts=8, storms=3)
def request_and_response(s: Scene) -> None:
    """Requests and responses of every size."""
    for number, size in enumerate(_sizes(11, 30_000, 30)):
        question, answer = pattern(size, number), pattern(size * 2 % 40_000 + 1, number + 1)
        with s.quiet():
            s.client.push(question)
            right = s.server.take(len(question)) == question
            s.server.push(answer)
            right = right and s.client.take(len(answer)) == answer
        s.note(f"round {number}: {right}")


@probe(cuts=4, storms=3, nagle=True)
def pipelined_requests(s: Scene) -> None:
    """Several requests before the first response, as HTTP pipelining and Redis do."""
    for number in range(8):
        with s.quiet():
            for part in range(10):
                s.client.push(b"request %03d %02d;" % (number, part))
            asked = s.server.take(10 * 15)
            s.server.push(asked * 20)
            right = s.client.take(3000) == asked * 20
        s.note(f"round {number}: {right} {asked[:15]!r}")


@probe(cuts=6, drains=3, storms=2)
def lines_in_pieces(s: Scene) -> None:
    """A line protocol whose lines come in pieces and several at once, read a line at a time with MSG_PEEK."""
    text = b"".join(b"line number %d\n" % number for number in range(60))
    chance = random.Random(12)
    at, lines = 0, 0
    with s.quiet():
        while at < len(text):
            size = chance.randint(1, 40)
            s.client.send(text[at : at + size])
            at += size
            s.settle()
            lines += _read_lines(s)
    s.note(f"{lines} lines")
    s.server.rest()


def _read_lines(s: Scene) -> int:
    found = 0
    while True:
        seen = s.server.recv(200, 2)
        if isinstance(seen, str) or b"\n" not in seen:
            return found
        line = s.server.take(seen.index(b"\n") + 1)
        assert line.startswith(b"line number ")
        found += 1


@probe(cuts=2, drains=1)
def idle_for_a_while(s: Scene) -> None:
    """A connection that was silent goes on as before."""
    s.client.send(b"a")
    s.settle()
    s.server.rest()
    time.sleep(0.3)
    s.client.send(b"b")
    s.settle()
    s.server.rest()
    s.server.send(b"c")
    s.settle()
    s.client.rest()
