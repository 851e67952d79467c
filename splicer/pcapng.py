# SPDX-License-Identifier: Apache-2.0
"""Packets that never were, in a file that Wireshark reads.

The format is pcapng (draft-ietf-opsawg-pcapng): blocks of 32-bit words in the writer's byte order. Each
packet is an IP header, a TCP header and a piece of a stream (LINKTYPE_RAW). The checksum of IPv4 is right,
that of TCP is 0: nothing was ever sent.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_BYTE_ORDER = 0x1A2B3C4D
_LINKTYPE_RAW = 101
_COMMENT = 1
_SECTION_OS, _SECTION_APPLICATION = 3, 4
_INTERFACE_NAME, _INTERFACE_DESCRIPTION, _INTERFACE_RESOLUTION = 2, 3, 9
_STATISTICS_RECEIVED, _STATISTICS_DROPPED = 4, 5
_PACKET_DROPPED = 4
_NANOSECONDS = 9  # 10^-9
_LONGEST_OPTION = 0xFFFF

_PACKET_HEAD = struct.Struct("=7I")
_IP4 = struct.Struct(">BBHHHBBH4s4s")
_IP6 = struct.Struct(">IHBB16s16s")
_TCP = struct.Struct(">HHIIBBHHH")
_PROTOCOL_TCP = 6
_ACK_PUSH = 0x18
_WINDOW = 0xFFFF
IP4_HEADERS = _IP4.size + _TCP.size
IP6_HEADERS = _IP6.size + _TCP.size
LARGEST_PAYLOAD = 0xFFFF - IP6_HEADERS
"""What a packet can carry, by the length in its header."""


class Route:
    """Makes the headers of packets from one end to the other. Addresses are 16 bytes, IPv4 as
    ::ffff:a.b.c.d."""

    def __init__(self, source: bytes, source_port: int, target: bytes, target_port: int) -> None:
        mapped = bytes(10) + b"\xff\xff"
        self._is_4 = source[:12] == mapped and target[:12] == mapped
        self._ports = source_port, target_port
        self._addresses = (source[12:], target[12:]) if self._is_4 else (source, target)
        words = struct.unpack(">4H", b"".join(self._addresses)) if self._is_4 else ()
        # Of IPv4: everything but length and identification.
        self._sum = 0x4500 + 0x4000 + (64 << 8 | _PROTOCOL_TCP) + sum(words)
        self._number = 0

    @property
    def size(self) -> int:
        """Bytes of the headers."""
        return IP4_HEADERS if self._is_4 else IP6_HEADERS

    def make_headers(self, seq: int, ack: int, payload: int) -> bytes:
        """Of a packet with so many bytes of payload."""
        tcp = _TCP.pack(*self._ports, seq, ack, _TCP.size // 4 << 4, _ACK_PUSH, _WINDOW, 0, 0)
        if not self._is_4:
            return _IP6.pack(6 << 28, _TCP.size + payload, _PROTOCOL_TCP, 64, *self._addresses) + tcp
        length = IP4_HEADERS + payload
        self._number = self._number + 1 & 0xFFFF
        total = self._sum + length + self._number
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        checksum = ~total & 0xFFFF
        head = _IP4.pack(0x45, 0, length, self._number, 0x4000, 64, _PROTOCOL_TCP, checksum, *self._addresses)
        return head + tcp


def _pad(size: int) -> bytes:
    return bytes(-size & 3)


def _option(code: int, value: bytes) -> bytes:
    value = value[:_LONGEST_OPTION]
    return struct.pack("=HH", code, len(value)) + value + _pad(len(value))


def _options(*options: tuple[int, bytes]) -> bytes:
    found = b"".join(_option(code, value) for code, value in options if value)
    return found + bytes(4) if found else b""


# Less than so many bytes are sooner copied than given to the kernel apart.
_COPIED = 1024
# IOV_MAX, include/uapi/linux/uio.h.
_AT_ONCE = 1024


def write_all(fd: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write all of them, one after the other, as they lie there. Raises OSError."""
    for start in range(0, len(parts), _AT_ONCE):
        some = list(parts[start : start + _AT_ONCE])
        left = sum(map(len, some))
        while left:
            written = os.writev(fd, some)
            left -= written
            if left:
                while written >= len(some[0]):
                    written -= len(some.pop(0))
                some[0] = memoryview(some[0])[written:]


class Writer:
    """One section. Everything is written at the next `flush`, without being copied before."""

    def __init__(self, fd: int, *, snaplen: int, application: str, system: str) -> None:
        """`snaplen`: bytes that are kept of a packet at most, its headers among them."""
        self._fd = fd
        self._parts: list[bytes | memoryview] = []
        self._snaplen = snaplen
        self._interfaces = 0
        options = _options((_SECTION_OS, system.encode()), (_SECTION_APPLICATION, application.encode()))
        self._write(_SECTION, struct.pack("=IHHq", _BYTE_ORDER, 1, 0, -1) + options)

    def _write(self, kind: int, body: bytes) -> None:
        size = len(body) + 12
        self._parts.append(b"".join((struct.pack("=2I", kind, size), body, struct.pack("=I", size))))

    def flush(self) -> None:
        """Write what there is. Raises OSError."""
        write_all(self._fd, self._parts)
        self._parts.clear()

    def add_interface(self, name: str, description: str) -> int:
        """Returns its number."""
        options = _options(
            (_INTERFACE_NAME, name.encode()),
            (_INTERFACE_DESCRIPTION, description.encode()),
            (_INTERFACE_RESOLUTION, bytes((_NANOSECONDS,))),
        )
        self._write(_INTERFACE, struct.pack("=HHI", _LINKTYPE_RAW, 0, self._snaplen) + options)
        self._interfaces += 1
        return self._interfaces - 1

    def add_packet(
        self,
        interface: int,
        time_ns: int,
        headers: bytes,
        payload: bytes | memoryview,
        size: int,
        *,
        comment: str = "",
        dropped: int = 0,
    ) -> None:
        """`time_ns`: since 1970. `size`: of the payload, of which so many bytes are given as are kept; they
        must stay there until `flush`. `dropped`: so many of this interface are missing before this one."""
        room = self._snaplen - len(headers)
        if len(payload) > room:
            payload, headers = payload[: max(room, 0)], headers[: self._snaplen]
        kept = len(headers) + len(payload)
        options = b""
        if comment or dropped:
            missing = struct.pack("=Q", dropped) if dropped else b""
            options = _options((_COMMENT, comment.encode()), (_PACKET_DROPPED, missing))
        padding = -kept & 3
        total = _PACKET_HEAD.size + kept + padding + len(options) + 4
        head = _PACKET_HEAD.pack(
            _PACKET, total, interface, time_ns >> 32, time_ns & 0xFFFFFFFF, kept, len(headers) + size
        )
        tail = bytes(padding) + options + struct.pack("=I", total)
        if len(payload) < _COPIED:
            self._parts.append(b"".join((head, headers, payload, tail)))
        else:
            self._parts += (head + headers, payload, tail)

    def add_statistics(
        self, interface: int, time_ns: int, *, received: int, dropped: int, comment: str = ""
    ) -> None:
        """How many packets there were, and how many are missing."""
        options = _options(
            (_COMMENT, comment.encode()),
            (_STATISTICS_RECEIVED, struct.pack("=Q", received)),
            (_STATISTICS_DROPPED, struct.pack("=Q", dropped)),
        )
        head = struct.pack("=3I", interface, time_ns >> 32, time_ns & 0xFFFFFFFF)
        self._write(_STATISTICS, head + options)
