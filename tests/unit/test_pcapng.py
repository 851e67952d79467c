# SPDX-License-Identifier: Apache-2.0
"""Packets as they are in the file: blocks, options, headers, and what is cut off. tshark reads such files in
tests/kernel/test_tap.py."""

from __future__ import annotations

import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from splicer import pcapng
from splicer.pcapng import Route, Writer, write_all

V4 = [ipaddress.ip_address(f"::ffff:10.0.0.{last}").packed for last in (1, 2)]
V6 = [ipaddress.ip_address(f"2001:db8::{last}").packed for last in (1, 2)]


def _read_blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data):
        kind, size = struct.unpack_from("=2I", data, place)
        assert size % 4 == 0 and struct.unpack_from("=I", data, place + size - 4) == (size,)
        yield kind, data[place + 8 : place + size - 4]
        place += size
    assert place == len(data)


def _read_options(data: bytes) -> dict[int, bytes]:
    found, place = {}, 0
    while place < len(data):
        code, size = struct.unpack_from("=HH", data, place)
        if not code:
            assert place + 4 == len(data)
            break
        found[code] = data[place + 4 : place + 4 + size]
        place += 4 + size + (-size & 3)
    return found


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_headers_of_ipv4() -> None:
    route = Route(V4[0], 40000, V4[1], 80)
    for number, size in enumerate((0, 1, 16384, pcapng.LARGEST_PAYLOAD), start=1):
        head = route.make_headers(0xFFFFFFF0, 7, size)
        assert len(head) == route.size == 40
        assert _sum(head[:20]) == 0xFFFF
        version, _, length, ident, _, _, protocol, _, source, target = struct.unpack(
            ">BBHHHBBH4s4s", head[:20]
        )
        assert (version, length, ident, protocol) == (0x45, 40 + size, number, 6)
        assert (source, target) == (V4[0][12:], V4[1][12:])
        assert struct.unpack(">HHIIBB", head[20:34]) == (40000, 80, 0xFFFFFFF0, 7, 0x50, 0x18)


def test_headers_of_ipv6() -> None:
    head = Route(V6[0], 40000, V6[1], 80).make_headers(1, 2, 1000)
    assert len(head) == 60
    assert struct.unpack(">IHBB16s16s", head[:40]) == (0x60000000, 1020, 6, 64, V6[0], V6[1])


def test_blocks(tmp_path: Path) -> None:
    file = tmp_path / "x"
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    writer = Writer(fd, snaplen=100, application="me", system="it")
    first = writer.add_interface("one", "the first")
    headers = Route(V4[0], 1, V4[1], 2).make_headers(1, 2, 70)
    time_ns = (5 << 32) + 6
    writer.add_packet(first, time_ns, headers, b"x" * 70, 70)
    writer.add_packet(first, time_ns, headers, memoryview(b"abc"), 3, comment="why", dropped=9)
    writer.add_statistics(first, time_ns, received=2, dropped=9, comment="all")
    assert file.read_bytes() == b""
    writer.flush()
    writer.flush()
    os.close(fd)
    section, interface, cut, whole, statistics = _read_blocks(file.read_bytes())
    assert section[0] == 0x0A0D0D0A and section[1][:4] == struct.pack("=I", 0x1A2B3C4D)
    assert _read_options(section[1][16:]) == {3: b"it", 4: b"me"}
    assert interface[0] == 1 and struct.unpack("=HHI", interface[1][:8]) == (101, 0, 100)
    assert _read_options(interface[1][8:]) == {2: b"one", 3: b"the first", 9: b"\x09"}
    assert cut[0] == 6 and struct.unpack("=5I", cut[1][:20]) == (0, 5, 6, 100, 110)
    assert cut[1][20:] == headers + b"x" * 60
    assert struct.unpack("=5I", whole[1][:20]) == (0, 5, 6, 43, 43)
    assert whole[1][20:63] == headers + b"abc"
    assert _read_options(whole[1][64:]) == {1: b"why", 4: struct.pack("=Q", 9)}
    assert statistics[0] == 5 and struct.unpack("=3I", statistics[1][:12]) == (0, 5, 6)
    assert _read_options(statistics[1][12:]) == {1: b"all", 4: struct.pack("=Q", 2), 5: struct.pack("=Q", 9)}


def test_whatever_the_kernel_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """writev(2) may write less than it is given, to the middle of a part or to its end."""
    written = bytearray()
    sizes = iter([1, 4, 2, 1000])

    def take(_: int, parts: list[bytes]) -> int:
        some = b"".join(parts)[: next(sizes, 1 << 20)]
        written.extend(some)
        return len(some)

    monkeypatch.setattr(os, "writev", take)
    parts = [b"ab", b"", memoryview(b"cdefg"), b"hi", b"j" * 5000, *[b"k"] * 2000]
    write_all(3, parts)
    assert bytes(written) == b"".join(bytes(part) for part in parts)
