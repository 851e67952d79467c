# SPDX-License-Identifier: Apache-2.0
"""Keep-alive probes for a connection that is another process's: what its TCP would send with SO_KEEPALIVE.

A probe is an ACK whose sequence number is one below the next. The peer throws it away, and answers with an
ACK that says how far it is (tcp_xmit_probe_skb() and tcp_validate_incoming() of Linux; RFC 9293, 3.8.4 and
3.10.7.4). So one packet goes each way, past whoever counts packets, and neither end's state changes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from dataclasses import dataclass

SO_BINDTOIFINDEX = 62  # include/uapi/asm-generic/socket.h, Linux 5.0
_ACK = 0x10
_TCP = struct.Struct("!2H 2I 2B 3H")
_TCP_WORDS = _TCP.size // 4
# In units that only the connection knows. Who receives a probe takes nothing from it; a tracker believes the
# largest window it has seen.
_WINDOW = 1
_DONT_FRAGMENT = 0x4000
_HOPS = 64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Probe:
    """Whose it is: address and port here and at the peer, the sequence numbers that come next, the device
    that the socket is bound to (0: none), and its mark."""

    local: tuple[Address, int]
    remote: tuple[Address, int]
    sent: int
    received: int
    device: int = 0
    mark: int = 0


def read_endpoint(text: str) -> tuple[Address, int]:
    """ "10.0.0.1:80" or "[fd00::1]:80" as address and port. Raises ValueError."""
    host, _, port = text.rpartition(":")
    return ipaddress.ip_address(host.strip("[]")), int(port)


def _sum_up(data: bytes) -> int:
    """The checksum of RFC 1071. `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def build(probe: Probe) -> bytes:
    """The packet, in network byte order, with its IP header."""
    (source, source_port), (target, target_port) = probe.local, probe.remote
    numbers = (source_port, target_port, (probe.sent - 1) % (1 << 32), probe.received)
    bits = (_TCP_WORDS << 4, _ACK, _WINDOW)
    pseudo = source.packed + target.packed + struct.pack("!IHH", _TCP.size, 0, socket.IPPROTO_TCP)
    checksum = _sum_up(pseudo + _TCP.pack(*numbers, *bits, 0, 0))
    segment = _TCP.pack(*numbers, *bits, checksum, 0)
    if source.version == 6:
        head = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, _HOPS)
    else:
        # The kernel writes the checksum of the header, and an identification where it is 0.
        head = struct.pack(
            "!BBHHHBBH",
            *(0x45, 0, 20 + len(segment), 0),
            *(_DONT_FRAGMENT, _HOPS, socket.IPPROTO_TCP, 0),
        )
    return head + source.packed + target.packed + segment


def may_send() -> bool:
    """Does this process have CAP_NET_RAW?"""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    except PermissionError:
        return False
    return True


def send(probe: Probe) -> None:
    """Send it from the calling thread's network namespace, by the way that the connection's own packets take.

    Raises OSError: no route, a full queue, a packet filter that lets it not out.
    """
    local, remote = str(probe.local[0]), str(probe.remote[0])
    family = socket.AF_INET6 if probe.local[0].version == 6 else socket.AF_INET
    # A socket of this protocol writes whole packets, and receives none that there are.
    with socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW) as raw:
        if probe.device:
            raw.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, probe.device)
        if probe.mark:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, probe.mark)
        # Routes may depend on the source. One that is nobody's here (IP_TRANSPARENT) cannot be bound to.
        scope = (0, probe.device) if family == socket.AF_INET6 else ()
        with contextlib.suppress(OSError):
            raw.bind((local, 0, *scope))
        raw.sendto(build(probe), (remote, 0, *scope))
