# SPDX-License-Identifier: Apache-2.0
"""A ring buffer read in place, many records at a time: a call for each would cost more than all the rest.

The kernel gives two counters, a page each, and the data twice, one after the other, so that a record which
goes beyond the end goes on (kernel/bpf/ringbuf.c, since Linux 5.8). A record is a head of 8 bytes, with its
length and two bits, and what the program wrote, up to the next multiple of 8.
"""

from __future__ import annotations

import mmap
import struct
import threading
from typing import Any

_PAGE = mmap.PAGESIZE
_HEAD = 8
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LENGTH = _DISCARDED - 1


class Ring:
    """Reads a BPF_MAP_TYPE_RINGBUF of `size` bytes. One at a time may do so."""

    def __init__(self, fd: int, size: int) -> None:
        self._mask = size - 1
        self._consumer_pages = mmap.mmap(fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._pages = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        self._consumer = memoryview(self._consumer_pages).cast("Q")
        self._view = memoryview(self._pages)
        self._producer = self._view[:8].cast("Q")
        self._position = self._next = self._consumer[0]
        self._barrier = threading.Lock()

    @property
    def fill(self) -> float:
        """How full it is: 0 to 1."""
        return (self._producer[0] - self._position) / (self._mask + 1)

    def read(self, most: int) -> list[memoryview]:
        """Up to so many records, the oldest first. They are good until `release`."""
        found: list[memoryview] = []
        places: list[tuple[int, int]] = []
        end = self._producer[0]
        self._order()
        position, mask, unpack = self._position, self._mask, struct.Struct("=I").unpack_from
        while position < end and len(places) < most:
            place = _PAGE + (position & mask)
            (length,) = unpack(self._view, place)
            if length & _BUSY:
                break
            if not length & _DISCARDED:
                places.append((place + _HEAD, length))
            position += (_HEAD + (length & _LENGTH) + 7) & ~7
        self._next = position
        # What stands in a record was written before its head said so.
        self._order()
        for place, length in places:
            found.append(self._view[place : place + length])
        return found

    def release(self) -> None:
        """Let the kernel have the room of what was read."""
        self._order()
        self._position = self._consumer[0] = self._next

    def _order(self) -> None:
        """What stands before this is done before what stands behind it, on any processor."""
        with self._barrier:
            pass

    def close(self) -> None:
        views: tuple[Any, ...] = (self._producer, self._view, self._consumer)
        for view in views:
            view.release()
        self._pages.close()
        self._consumer_pages.close()
