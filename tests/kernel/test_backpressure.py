# SPDX-License-Identifier: Apache-2.0
"""A reader that does not read: the sender is held back, memory stays bounded, and nothing is lost."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from support.pauses import sleep
from support.wire import Wire

MIB = 1 << 20
PAGE = 4096
# Twice what plain TCP takes here: the send buffer may grow to tcp_wmem[2], 4 MiB by default, and so on.
MOST_BYTES = 32 * MIB
MOST_SLAB = 32 * MIB
SMALL_BUFFERS = [[socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768], [socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768]]


def _slab_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Slab:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no Slab")


def _tcp_bytes() -> int:
    """What all TCP sockets of the machine have been charged for."""
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            return int(words[words.index("mem") + 1]) * PAGE
    raise AssertionError("/proc/net/sockstat has no TCP")


@pytest.mark.parametrize("chunk", [65_536, 1_000], ids=["64KiB", "1000B"])
@pytest.mark.parametrize("to", ["b", "lo"], ids=["bridge", "loopback"])
def test_sender_is_held_back(wire: Wire, to: str, chunk: int) -> None:
    """When the reader does not read, the sender gets EAGAIN after a bounded number of bytes and is not
    writable; memory stays bounded; when the reader reads, everything arrives and the sender may go on."""
    pair = wire.hot_pair(server=to)
    tcp, slab = _tcp_bytes(), _slab_bytes()
    total, taken = 0, -1
    while taken:
        if total:
            sleep(0.3)  # buffers may be rearranged meanwhile: it is full when no more is taken after that
        sent = pair.client.send_until_full(chunk=chunk, limit=2 * MOST_BYTES)
        assert sent["stopped"] == "full", sent
        taken = sent["bytes"]
        total += taken
        assert total <= MOST_BYTES
    assert "OUT" not in pair.client.poll()
    assert _tcp_bytes() - tcp <= 2 * MOST_BYTES
    assert _slab_bytes() - slab <= MOST_SLAB
    pair.server.begin("recv", count=total + 100_000)
    pair.client.send(100_000)
    assert pair.server.finish() == total + 100_000
    assert "OUT" in pair.client.wait_events(events=["OUT"])
    pair.pingpong(10)
    pair.verify()


def test_one_byte_messages(wire: Wire) -> None:
    """One-byte messages to a reader that does not read cannot pile up: each costs far more than a byte."""
    pair = wire.pair(options=(SMALL_BUFFERS, SMALL_BUFFERS))
    wire.heat(pair)
    tcp, slab = _tcp_bytes(), _slab_bytes()
    sent = pair.client.send_until_full(chunk=1, limit=2_000_000, timeout=20.0)
    assert sent["stopped"] == "full", sent
    assert _slab_bytes() - slab <= MOST_SLAB
    assert _tcp_bytes() - tcp <= MOST_SLAB
    assert pair.server.recv(sent["bytes"]) == sent["bytes"]
    pair.pingpong(10)
    pair.verify()


def test_both_ends_full(wire: Wire) -> None:
    """Both ends send until they are full before either reads: nobody is stuck, nothing is lost."""
    pair = wire.hot_pair()
    one = pair.client.send_until_full(chunk=10_000, limit=2 * MOST_BYTES)
    other = pair.server.send_until_full(chunk=10_000, limit=2 * MOST_BYTES)
    assert one["stopped"] == other["stopped"] == "full"
    pair.client.begin("recv", count=other["bytes"])
    assert pair.server.recv(one["bytes"]) == one["bytes"]
    assert pair.client.finish() == other["bytes"]
    pair.pingpong(20)
    pair.verify()


def test_slow_reader(wire: Wire) -> None:
    """A reader slower than its sender gets every byte, in order."""
    pair = wire.hot_pair()
    count = 6 * MIB
    pair.server.begin("recv", count=count, at_most=50_000, pause=0.002, timeout=20.0)
    pair.client.send(count, chunk=7_000, timeout=20.0)
    assert pair.server.finish() == count
    pair.pingpong(20)
    pair.verify()


@pytest.mark.parametrize("chunk", [300, 4_000, 100_000])
def test_stream_one_way(wire: Wire, chunk: int) -> None:
    """A stream in one direction is byte-exact whether it is redirected or handed back to TCP on its way."""
    pair = wire.hot_pair()
    count = min(20 * MIB, chunk * 20_000)
    pair.server.begin("recv", count=count, timeout=20.0)
    pair.client.send(count, chunk=chunk, timeout=20.0)
    assert pair.server.finish() == count
    pair.pingpong(20)
    pair.verify()


@pytest.mark.timeout(320)  # the last wait is as long as all before it took
def test_many_stuck_connections(wire: Wire) -> None:
    """The bound holds for each of many connections of one reader at the same time."""
    first = wire.pair(options=(SMALL_BUFFERS, SMALL_BUFFERS))
    client, server = first.client.peer, first.server.peer
    pairs = [first]
    for _ in range(11):
        address = wire.lab.address("b")
        pairs.append(wire.host.connect(client, server, address, options=(SMALL_BUFFERS, SMALL_BUFFERS)))
    for pair in pairs:
        wire.heat(pair)
    slab = _slab_bytes()
    sent = [pair.client.send_until_full(chunk=500, limit=MOST_BYTES) for pair in pairs]
    assert {each["stopped"] for each in sent} == {"full"}
    assert sum(each["bytes"] for each in sent) <= MOST_BYTES
    assert _slab_bytes() - slab <= MOST_SLAB
    for pair, each in zip(pairs, sent, strict=True):
        # What is left comes with the sender's next zero-window probe: row 88 of HAZARDS.md.
        pair.server.recv(each["bytes"], timeout=120.0)
        pair.verify()
