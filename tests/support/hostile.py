# SPDX-License-Identifier: Apache-2.0
"""The test's side of a hostile peer (support/forger.py), and what only root can tell it about its victim."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splicer.kernel import layout, libbpf
from support.cgroup import Cgroup
from support.host import Host
from support.lab import Lab
from support.players import Pair, Peer

PROGRAM = Path(__file__).with_name("forger.py")


class Hostile(Peer):
    """An unprivileged process in a user and network namespace of its own, below the attached cgroup."""

    def __init__(self, host: Host, beyond: list[str], cgroup: Cgroup | None = None) -> None:
        """`beyond`: addresses it can send to, and be a puppet at."""
        super().__init__(None, cgroup or host.cgroup, PROGRAM)
        host._peers.append(self)
        self.call("lay_cable", beyond=beyond)


@dataclass(frozen=True)
class Name:
    """The first data sequence numbers of a connection: what it is known by in the maps."""

    client_seq: int
    server_seq: int

    @property
    def as_client(self) -> list[int]:
        """First sequence numbers sent and received, as the socket that called connect() counts them."""
        return [self.client_seq - 1, self.server_seq]

    @property
    def as_server(self) -> list[int]:
        return [self.server_seq, self.client_seq]

    @property
    def slot(self) -> int:
        """Its place among those who wait for their server; bpf/maps.h has the number of places."""
        return (self.client_seq ^ self.server_seq) & 2047

    @property
    def place(self) -> int:
        """Its place among the young; their number is there, too."""
        return (self.client_seq ^ self.server_seq) & 255


def read_map(host: Host, name: str) -> dict[bytes, bytes]:
    """All entries of a pinned map."""
    pinned = libbpf.Map.open(str(host.pin_dir / "maps" / name))
    try:
        return dict(pinned.items())
    finally:
        pinned.close()


def read_seeds(host: Host) -> dict[bytes, bytes]:
    """All seeds by name, the young ones included."""
    return layout.find_young(read_map(host, "young").values()) | read_map(host, "seeds")


def make_seed(name: Name, socket: int = 1) -> bytes:
    """Of a connection with this name, whose server's socket is at this address."""
    fields = [0] * len(layout.SEED.unpack(bytes(layout.SEED.size)))
    fields[15:17] = name.client_seq, name.server_seq
    fields[11] = socket
    return layout.SEED.pack(*fields)


@contextmanager
def occupied(host: Host, name: Name, holder: Name) -> Iterator[None]:
    """The holder, a young connection, has the place of this name."""
    places = libbpf.Map.open(str(host.pin_dir / "maps" / "young"))
    key = struct.pack("=I", name.place)
    try:
        places.set(key, make_seed(holder))
        yield
        assert places.get(key) == make_seed(holder), "somebody took it"
    finally:
        places.set(key, bytes(layout.SEED.size))
        places.close()


def read_name(host: Host, pair: Pair) -> Name:
    """The name of a connection, from the record of its server's end."""
    known = [layout.read_seed(value) for value in read_seeds(host).values()]
    known += [layout.read_pair(value) for value in read_map(host, "pairs").values()]
    for each in known:
        ends = (_as_text(pair.server.local), _as_text(pair.server.remote))
        if (each.server.local, each.server.remote) == ends:
            return Name(*each.id)
    raise AssertionError(f"{pair.label} has no record")


def find_new_name(host: Host, before: dict[bytes, bytes]) -> Name:
    """The name of the one client that has arrived at its rendezvous since `before`."""
    [value] = [value for key, value in read_map(host, "rendezvous").items() if before[key] != value]
    return Name(*struct.unpack_from("=2I", value))


def dial(host: Host, lab: Lab, client: Peer, server: Peer) -> tuple[Pair, Name]:
    """A connection to host "b" whose server has not come yet, and its name.

    The last segment of the handshake is ignored until data comes: time enough for an attack.
    """
    before = read_map(host, "rendezvous")
    pair = host.dial(client, server, lab.address("b"), defer_accept=5)
    return pair, find_new_name(host, before)


def _as_text(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
