# SPDX-License-Identifier: Apache-2.0
"""How many bytes the connections of a namespace have sent through TCP, by looking at its sockets now and
then.

Redirected bytes are not among them: they never reach TCP, which counts here. What was sent after the last
look by a connection that has ended is missed. IP counts that as well, so it is known how much it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Of each segment on Ethernet: IP header, TCP header, timestamps.
HEADERS = 20 + 20 + 12


class Connection(NamedTuple):
    """`client` and `server` are names of services, the others are address and port of each."""

    client: str
    server: str
    client_end: str
    server_end: str


class Socket(NamedTuple):
    """An end; `cookie` is the kernel's name for it, `sent` what it has sent, each byte once."""

    cookie: str
    local: str
    remote: str
    sent: int


def read_sockets(text: str) -> list[Socket]:
    """What `ss -tineHO` prints: a line for each socket. Those that carry nothing are left out."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5 or words[0] in ("LISTEN", "SYN-SENT", "TIME-WAIT"):
            continue
        numbers = dict(re.findall(r"\b(bytes_sent|bytes_retrans|sk):([0-9a-f]+)", line))
        if "sk" in numbers:
            sent = int(numbers.get("bytes_sent", 0)) - int(numbers.get("bytes_retrans", 0))
            found.append(Socket(numbers["sk"], _read_end(words[3]), _read_end(words[4]), sent))
    return found


def _read_end(text: str) -> str:
    """Address and port, an IPv4 address as one also where the socket is of IPv6."""
    address, _, port = text.rpartition(":")
    return f"{address.strip('[]').removeprefix('::ffff:')}:{port}"


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
    _last: dict[str, int] | None = None

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
