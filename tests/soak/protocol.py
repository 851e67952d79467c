# SPDX-License-Identifier: Apache-2.0
"""The self-checking protocol: frames that name connection, direction and place, and a reader that checks.

A frame is a header with a checksum of its own, and a payload with another. The payload is a slice of a pool
of random bytes that every process makes from the same seed, chosen by connection, direction and sequence
number: so a reader that finds a wrong byte can tell what should have been there, and often what happened.

Frames also tell how the ones before them fared: when the kernel had taken the first and the last byte of the
previous group (frames that are handed to the kernel together), and for how long it took nothing. With these
the reader knows for how long bytes had been sent while it was told that there is nothing to read.
"""

from __future__ import annotations

import enum
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

POOL_BYTES = 1 << 21
LARGEST = 1 << 20
MAGIC = 0x5B1C
# magic, kind, side, length, connection, sequence, want, count, blocked us, first ns, done ns, checksum
_FIELDS = struct.Struct(">HBBIQIIHIQQI")
_CHECK = struct.Struct(">I")
HEADER_BYTES = _FIELDS.size + _CHECK.size
CLIENT, SERVER = 0, 1


class Kind(enum.IntEnum):
    HELLO = 1  # a plan, from the client; the server's name, as its answer
    REQUEST = 2
    ANSWER = 3
    BYE = 4  # nothing follows
    CRASH = 5  # the server is to close at once, whatever waits


class Fault(Exception):
    """What arrived is not what was sent. `kind` is one word."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Pool:
    """Random bytes, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.bytes = random.Random(seed).randbytes(POOL_BYTES)
        self._view = memoryview(self.bytes)

    def slice(self, conn: int, side: int, seq: int, length: int) -> memoryview:
        """The payload of one frame."""
        mixed = conn * 0x9E3779B97F4A7C15 + seq * 0xC2B2AE3D27D4EB4F + side * 0x165667B19E3779F9
        start = ((mixed & (1 << 64) - 1) >> 20) % (POOL_BYTES - length)
        return self._view[start : start + length]


@dataclass(frozen=True)
class Frame:
    """What arrived. Times are CLOCK_MONOTONIC nanoseconds, 0 if the frame is not the first of a group."""

    kind: int
    length: int
    conn: int
    seq: int
    want: int
    count: int
    blocked_us: int
    first_ns: int
    done_ns: int
    payload: bytes  # of a HELLO; others are checked and dropped


@dataclass(frozen=True)
class Outgoing:
    """A frame to be sent. `payload` is None for one that comes out of the pool."""

    kind: int
    length: int
    want: int = 0
    count: int = 0
    payload: bytes | None = None


@dataclass(frozen=True)
class Sent:
    """How a group fared: when the kernel had taken its first and last byte, and its longest refusal."""

    first_ns: int = 0
    done_ns: int = 0
    blocked_us: int = 0


class Encoder:
    """Numbers the frames of one direction."""

    def __init__(self, pool: Pool, conn: int, side: int) -> None:
        self._pool = pool
        self._conn = conn
        self._side = side
        self.seq = 0

    def encode(self, frame: Outgoing, before: Sent) -> tuple[bytes, memoryview]:
        """Header and payload."""
        if frame.payload is None:
            payload = self._pool.slice(self._conn, self._side, self.seq, frame.length)
        else:
            payload = memoryview(frame.payload)
        fields = _FIELDS.pack(
            *(MAGIC, frame.kind, self._side, frame.length, self._conn, self.seq, frame.want, frame.count),
            *(before.blocked_us, before.first_ns, before.done_ns, zlib.crc32(payload)),
        )
        self.seq += 1
        return fields + _CHECK.pack(zlib.crc32(fields)), payload


class Decoder:
    """Checks the frames of one direction.

    `conn` is the connection they must be of, or None for whatever the first one says (a server does not know
    before); `nonce` is then the upper 16 bits that it must have.
    """

    def __init__(self, pool: Pool, side: int, conn: int | None, nonce: int) -> None:
        self._pool = pool
        self._side = side
        self.conn = conn
        self._nonce = nonce
        self.seq = 0
        self.position = 0  # bytes of this direction that have been checked
        self._buffer = bytearray()
        self._header: tuple[int, ...] | None = None
        self.ended = False

    @property
    def is_between_frames(self) -> bool:
        return not self._buffer and self._header is None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Take bytes as they come; the frames they complete. Raises Fault."""
        self._buffer += data
        while True:
            if self._header is None:
                if len(self._buffer) < HEADER_BYTES:
                    break
                self._header = self._read_header(bytes(self._buffer[:HEADER_BYTES]))
                del self._buffer[:HEADER_BYTES]
            length = self._header[3]
            if len(self._buffer) < length:
                break
            yield self._finish(self._header, length)
        if self.ended and self._buffer:
            raise Fault("repeated", f"{len(self._buffer)} bytes after the last frame")

    def _read_header(self, raw: bytes) -> tuple[int, ...]:
        if zlib.crc32(raw[: _FIELDS.size]) != _CHECK.unpack_from(raw, _FIELDS.size)[0]:
            raise Fault("corrupt", f"header {self.seq} at byte {self.position}: {self._recognise(raw)}")
        fields = _FIELDS.unpack_from(raw)
        magic, kind, side, length, conn, seq = fields[:6]
        if magic != MAGIC or length > LARGEST or conn >> 48 != self._nonce:
            raise Fault("foreign", f"header {self.seq} is of another run: {raw.hex()}")
        if self.conn is None and kind == Kind.HELLO:
            self.conn = conn
        if conn != self.conn:
            raise Fault("foreign", f"frame {seq} of connection {conn:x} instead of {self.seq}")
        if side != self._side:
            raise Fault("foreign", f"frame {seq} of the other direction")
        if seq != self.seq:
            kind_of_fault = "lost" if seq > self.seq else "repeated"
            raise Fault(kind_of_fault, f"frame {seq} instead of {self.seq} at byte {self.position}")
        return fields

    def _finish(self, header: tuple[int, ...], length: int) -> Frame:
        _, kind, _, _, conn, seq, want, count, blocked, first, done, checksum = header
        payload = bytes(self._buffer[:length]) if kind == Kind.HELLO else b""
        with memoryview(self._buffer) as view:
            with view[:length] as slice_:
                right = zlib.crc32(slice_) == checksum
                got = b"" if right else bytes(slice_)
        if not right:
            raise self._explain(got, kind)
        del self._buffer[:length]
        self._header = None
        self.seq += 1
        self.position += HEADER_BYTES + length
        self.ended = kind == Kind.BYE
        return Frame(kind, length, conn, seq, want, count, blocked, first, done, payload)

    def _explain(self, got: bytes, kind: int) -> Fault:
        """What happened to a payload, as far as can be told."""
        assert self.conn is not None
        where = f"frame {self.seq}, payload of {len(got)} bytes at byte {self.position + HEADER_BYTES}"
        if kind == Kind.HELLO:
            return Fault("corrupt", where)
        expected = bytes(self._pool.slice(self.conn, self._side, self.seq, len(got)))
        wrong = next((at for at in range(len(got)) if got[at] != expected[at]), None)
        if wrong is None:
            return Fault("corrupt", f"{where}: right bytes, wrong checksum")
        sample = got[wrong : wrong + 12]
        found = expected.find(sample) if len(sample) == 12 else -1
        if found > wrong:
            return Fault("lost", f"{where}: {found - wrong} bytes before {wrong}")
        if 0 <= found < wrong:
            return Fault("repeated", f"{where}: at {wrong} comes again what was at {found}")
        if len(sample) == 12 and (elsewhere := self.find_in_pool(sample)) >= 0:
            return Fault("foreign", f"{where}: at {wrong} comes what is at {elsewhere} of the pool")
        return Fault("corrupt", f"{where}: first wrong byte at {wrong}, {sample.hex()}")

    def find_in_pool(self, sample: bytes) -> int:
        return self._pool.bytes.find(sample)

    def _recognise(self, raw: bytes) -> str:
        magic = MAGIC.to_bytes(2, "big")
        at = raw.find(magic)
        if at > 0:
            return f"the header comes {at} bytes late"
        if (place := self.find_in_pool(raw[:12])) >= 0:
            return f"payload (at {place} of the pool) instead of a header"
        return raw.hex()
