# SPDX-License-Identifier: Apache-2.0
"""How many bytes the connections of a namespace have sent through TCP, by looking at its sockets now and
then.

Redirected bytes are not among them: they never reach TCP, which counts here. What was sent after the last
look by a connection that has ended is missed. IP counts that as well, so it is known how much it is.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Of each segment: IP header, TCP header, timestamps.
HEADERS = 20 + 20 + 12

# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h and tcp.h
NETLINK_SOCK_DIAG, DIAG, DUMP, NLMSG_ERROR, NLMSG_DONE = 4, 20, 0x301, 2, 3
INET_DIAG_INFO = 2
INFO = 1 << (INET_DIAG_INFO - 1)
# All but SYN_SENT, TIME_WAIT, CLOSE, LISTEN and those that are not accepted yet.
STATES = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11
NETLINK = struct.Struct("=IHHII")
# family, protocol, which attributes, states; and an empty name
DIAG_REQUEST = struct.Struct("=BBBxI48x")
# family; ports, addresses, cookie
DIAG_ANSWER = struct.Struct("=Bxxx2s2s16s16s4xQ20x")
ATTRIBUTE = struct.Struct("=HH")
# bytes_sent, bytes_retrans
TCP_INFO = struct.Struct("=200xQQ")


class Connection(NamedTuple):
    """`client` and `server` are names of services, the others are address and port of each."""

    client: str
    server: str
    client_end: str
    server_end: str


class Socket(NamedTuple):
    """An end; `cookie` is the kernel's name for it, `sent` what it has sent, each byte once."""

    cookie: int
    local: str
    remote: str
    sent: int


class Looker:
    """Asks the kernel for the TCP sockets of the namespace in which it was made."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)

    def close(self) -> None:
        self._netlink.close()

    def look(self) -> list[Socket]:
        """All that have a connection."""
        found: list[Socket] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            request = DIAG_REQUEST.pack(family, socket.IPPROTO_TCP, INFO, STATES)
            self._netlink.send(NETLINK.pack(NETLINK.size + len(request), DIAG, DUMP, 0, 0) + request)
            while not _read_answer(self._netlink.recv(1 << 16), found):
                pass
        return found


def _read_answer(answer: bytes, into: list[Socket]) -> bool:
    """Whether it was the last one. Raises OSError."""
    while answer:
        length, kind, _, _, _ = NETLINK.unpack_from(answer)
        body, answer = answer[NETLINK.size : length], answer[(length + 3) & ~3 :]
        if kind == NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", body)
            raise OSError(-number, os.strerror(-number))
        if kind == NLMSG_DONE:
            return True
        into.append(_read_socket(body))
    return False


def _read_socket(body: bytes) -> Socket:
    family, local_port, remote_port, local, remote, cookie = DIAG_ANSWER.unpack_from(body)
    sent, rest = 0, body[DIAG_ANSWER.size :]
    while len(rest) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(rest)
        if kind == INET_DIAG_INFO and length >= ATTRIBUTE.size + TCP_INFO.size:
            sent, again = TCP_INFO.unpack_from(rest, ATTRIBUTE.size)
            sent -= again
        rest = rest[(length + 3) & ~3 :]
    ends = _name_end(family, local, local_port), _name_end(family, remote, remote_port)
    return Socket(cookie, *ends, sent)


def _name_end(family: int, address: bytes, port_be: bytes) -> str:
    """Address and port, an IPv4 address as one also where the socket is of IPv6."""
    found = ipaddress.ip_address(address[:4] if family == socket.AF_INET else address)
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    return f"{found}:{int.from_bytes(port_be, 'big')}"


@dataclass
class Ledger:
    """Adds up what is sent from the first look on. `services` has the name of each, by address, and `ports`
    the port that each listens on, by name."""

    services: Mapping[str, str]
    ports: Mapping[str, int]
    sent: dict[Connection, int] = field(default_factory=dict)
    # Connections that were there at the last look.
    open: set[Connection] = field(default_factory=set)
    # Of connections with an end elsewhere.
    sent_elsewhere: int = 0
    _last: dict[int, int] | None = None

    def look(self, sockets: Iterable[Socket]) -> None:
        """All sockets of all services, at one moment."""
        first, last = self._last is None, self._last or {}
        self._last, self.open = {}, set()
        for each in sockets:
            self._last[each.cookie] = each.sent
            new = 0 if first else each.sent - last.get(each.cookie, 0)
            connection = self._name(each)
            if connection is None:
                self.sent_elsewhere += new
            else:
                self.open.add(connection)
                self.sent[connection] = self.sent.get(connection, 0) + new

    def _name(self, each: Socket) -> Connection | None:
        names = []
        for end in (each.local, each.remote):
            address, _, port = end.rpartition(":")
            name = self.services.get(address)
            if name is None:
                return None
            names.append((name, end, self.ports.get(name) == int(port)))
        (own, local, serves), (other, remote, _) = names
        if serves:
            return Connection(other, own, remote, local)
        return Connection(own, other, local, remote)


@dataclass(frozen=True)
class Packets:
    """What the namespaces have sent, as IP counts it: `octets` with headers. Large segments count as one."""

    octets: int = 0
    packets: int = 0

    def __add__(self, other: Packets) -> Packets:
        return Packets(self.octets + other.octets, self.packets + other.packets)

    def __sub__(self, other: Packets) -> Packets:
        return Packets(self.octets - other.octets, self.packets - other.packets)

    @property
    def payload(self) -> int:
        """Bytes of data, but for some of the headers of those that make or reset a connection."""
        return self.octets - HEADERS * self.packets


def read_packets(pid: int) -> Packets:
    """Of the namespace that a process is in."""
    tables: dict[str, dict[str, int]] = {}
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
        for titles, values in zip(lines[::2], lines[1::2], strict=True):
            table = tables.setdefault(titles.partition(":")[0], {})
            table.update(zip(titles.split()[1:], map(int, values.split()[1:]), strict=True))
    return Packets(tables["IpExt"]["OutOctets"], tables["Ip"]["OutRequests"])
