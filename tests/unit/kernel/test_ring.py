# SPDX-License-Identifier: Apache-2.0
"""A ring buffer read in place: records in order, what is not finished, what was thrown away, and the end of
the data. That the kernel writes such a thing is tests/kernel/test_tap.py."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest

from splicer.kernel.ring import Ring

PAGE = mmap.PAGESIZE
SIZE = PAGE
BUSY, DISCARDED = 1 << 31, 1 << 30


class Producer:
    """A file that looks like one. What is written is there twice, as in the kernel's."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ring")
        os.truncate(self.fd, 2 * PAGE + 2 * SIZE)
        self.end = 0

    def put(self, data: bytes, flags: int = 0) -> int:
        """Where it is."""
        at = self.end
        for place, byte in enumerate(struct.pack("=II", len(data) | flags, 0) + data):
            for copy in (0, SIZE):
                os.pwrite(self.fd, bytes((byte,)), 2 * PAGE + (at + place) % SIZE + copy)
        self.end += (8 + len(data) + 7) & ~7
        os.pwrite(self.fd, struct.pack("=Q", self.end), PAGE)
        return at

    def finish(self, at: int, size: int) -> None:
        for copy in (0, SIZE):
            os.pwrite(self.fd, struct.pack("=I", size), 2 * PAGE + at % SIZE + copy)

    def read_consumed(self) -> int:
        return int(struct.unpack("=Q", os.pread(self.fd, 8, 0))[0])


@pytest.fixture
def producer() -> Iterator[Producer]:
    made = Producer()
    yield made
    os.close(made.fd)


@pytest.fixture
def ring(producer: Producer) -> Iterator[Ring]:
    made = Ring(producer.fd, SIZE)
    yield made
    made.close()


def _read(ring: Ring, most: int = 100) -> list[bytes]:
    views = ring.read(most)
    found = [bytes(view) for view in views]
    del views
    ring.release()
    return found


def test_records_are_read_in_order_and_once(producer: Producer, ring: Ring) -> None:
    assert _read(ring) == []
    for data in (b"a", b"", b"12345678", b"x" * 100):
        producer.put(data)
    assert _read(ring, 3) == [b"a", b"", b"12345678"]
    assert 0 < producer.read_consumed() < producer.end
    assert ring.fill == 112 / SIZE
    assert _read(ring) == [b"x" * 100]
    assert producer.read_consumed() == producer.end
    assert _read(ring) == []


def test_nothing_is_given_back_before_it_was_used(producer: Producer, ring: Ring) -> None:
    producer.put(b"a")
    views = ring.read(1)
    assert producer.read_consumed() == 0
    del views
    ring.release()
    assert producer.read_consumed() == producer.end


def test_what_is_not_finished_ends_it(producer: Producer, ring: Ring) -> None:
    producer.put(b"first")
    at = producer.put(b"second", BUSY)
    producer.put(b"third")
    assert _read(ring) == [b"first"]
    producer.finish(at, 6)
    assert _read(ring) == [b"second", b"third"]


def test_what_was_thrown_away_is_left_out(producer: Producer, ring: Ring) -> None:
    producer.put(b"first")
    producer.put(b"second", DISCARDED)
    producer.put(b"third")
    assert _read(ring) == [b"first", b"third"]


def test_beyond_the_end(producer: Producer, ring: Ring) -> None:
    for number in range(20):
        data = bytes([number]) * 1000
        producer.put(data)
        assert _read(ring) == [data]
