# SPDX-License-Identifier: Apache-2.0
"""Probes in somebody else's name: bytes as they should be, and what a real TCP makes of them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from support.daemon import wait_until

from splicer.host import keepalive
from splicer.host.keepalive import Probe, build, read_endpoint

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECEIVES, SENDS = 1, 2
SEGMENTS = struct.Struct("=136x 2I")
needs_root = pytest.mark.skipif(not keepalive.may_send(), reason="CAP_NET_RAW is missing")
PLACES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [("10.0.0.1:80", "10.0.0.1", 80), ("[fd00::1]:65535", "fd00::1", 65535), ("[::1]:1", "::1", 1)],
)
def test_endpoints(text: str, address: str, port: int) -> None:
    assert read_endpoint(text) == (ipaddress.ip_address(address), port)


@pytest.mark.parametrize(("sent", "number"), [(1000, 999), (0, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFE)])
@pytest.mark.parametrize(("local", "remote"), [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
def test_packets(local: str, remote: str, sent: int, number: int) -> None:
    """An ACK with the sequence number before the next, no data and a right checksum."""
    one, other = ipaddress.ip_address(local), ipaddress.ip_address(remote)
    packet = build(Probe((one, 4000), (other, 80), sent, 0xFEDCBA98))
    head, segment = packet[:-20], packet[-20:]
    addresses = one.packed + other.packed
    assert head.endswith(addresses)
    if one.version == 4:
        assert (head[0], head[9], struct.unpack("!H", head[2:4])[0]) == (0x45, socket.IPPROTO_TCP, 40)
    else:
        assert (head[0], head[6], struct.unpack("!H", head[4:6])[0]) == (0x60, socket.IPPROTO_TCP, 20)
    ports_and_numbers = struct.unpack("!2H 2I 2B", segment[:14])
    assert ports_and_numbers == (4000, 80, number, 0xFEDCBA98, 5 << 4, 0x10)
    assert _sum(addresses + struct.pack("!2I", len(segment), socket.IPPROTO_TCP) + segment) == 0xFFFF


@pytest.fixture(params=PLACES, ids=["v4", "v6"])
def connection(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    family, address = request.param
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.create_server((address, 0), family=family))
        client = undo.enter_context(socket.create_connection(listener.getsockname()[:2]))
        server = undo.enter_context(listener.accept()[0])
        client.settimeout(5.0)
        server.settimeout(5.0)
        yield client, server


def _read_sequence(client: socket.socket) -> list[int]:
    """The numbers of what comes next, sent and received."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    found = []
    for queue in (SENDS, RECEIVES):
        client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        found.append(client.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) % (1 << 32))
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)  # off, and no window probe of its own
    return found


def _count_segments(end: socket.socket) -> int:
    """Those that came in."""
    return int(SEGMENTS.unpack(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SEGMENTS.size))[1])


def _make_probe(client: socket.socket, sent: int, received: int) -> Probe:
    (local, port), (remote, service) = client.getsockname()[:2], client.getpeername()[:2]
    return Probe((ipaddress.ip_address(local), port), (ipaddress.ip_address(remote), service), sent, received)


def _exchange(client: socket.socket, server: socket.socket) -> None:
    for one, other in ((client, server), (server, client)):
        one.sendall(b"x" * 1000)
        assert other.recv(1000, socket.MSG_WAITALL) == b"x" * 1000


@needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="TCP_REPAIR takes root")
def test_it_is_answered_and_nothing_else(connection: tuple[socket.socket, socket.socket]) -> None:
    """The server's TCP answers with one segment. Nobody has anything to read, and the connection goes on."""
    client, server = connection
    _exchange(client, server)
    sent, received = _read_sequence(client)
    before = _count_segments(client), _count_segments(server)
    keepalive.send(_make_probe(client, sent, received))
    wait_until("it is answered", lambda: _count_segments(client) > before[0])
    assert (_count_segments(client), _count_segments(server)) == (before[0] + 1, before[1] + 1)
    assert select.select(connection, [], connection, 0) == ([], [], [])
    _exchange(client, server)
    assert _read_sequence(client) == [(sent + 1000) % (1 << 32), (received + 1000) % (1 << 32)]


@needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="TCP_REPAIR takes root")
def test_one_that_comes_late_does_no_harm(connection: tuple[socket.socket, socket.socket]) -> None:
    """Its numbers are old, for TCP has carried bytes meanwhile."""
    client, server = connection
    _exchange(client, server)
    late = _make_probe(client, *_read_sequence(client))
    for _ in range(100):
        _exchange(client, server)
    keepalive.send(late)
    for _ in range(10):
        _exchange(client, server)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@needs_root
def test_no_route() -> None:
    nowhere = ipaddress.ip_address("10.255.255.1")
    with pytest.raises(OSError):
        keepalive.send(Probe((nowhere, 1), (nowhere, 1), 1, 1, device=1 << 20))
