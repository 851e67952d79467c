# SPDX-License-Identifier: Apache-2.0
"""Finds the connections that were there before the programs: census lists all sockets, those with one name
are put together, and census joins them; see bpf/census.c."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from splicer.host.namespaces import Directory
from splicer.kernel import libbpf
from splicer.kernel.layout import (
    OLDER,
    OLDER_JOINED,
    OLDER_SOCKET,
    CensusState,
    OlderFlag,
    OlderOutcome,
    OlderSocket,
    name_connection,
)
from splicer.kernel.settings import SettingsMap
from splicer.kernel.walker import Walker, open_iterator

_WORD = 1 << 32
# A namespace may have a million sockets, and is visited once.
_PATIENCE_S = 2.0
_NAME = struct.Struct("=Q")

# What keeps a connection with both ends on this host from being followed, in the words of `splicer status`.
AMBIGUOUS = "ambiguous"
OUTSIDE = "outside"
REPAIRED = "repaired"
CLOSED = "closed"
FULL = "map_full"
UNMARKED = "unmarked"
_LEFT = {OlderOutcome.GONE: CLOSED, OlderOutcome.FULL: FULL, OlderOutcome.UNMARKED: UNMARKED}


@dataclass(frozen=True)
class CensusReport:
    """What came of a census: connections that are followed from now on; those that are not, though both ends
    are on this host, by reason; sockets whose other end was not found, mostly of connections with another
    host; namespaces that were visited, and those where a socket's lock could not be had; seconds it took."""

    found: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    single: int = 0
    namespaces: int = 0
    held_up: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Older:
    """Two sockets that belong together."""

    name: int
    client: OlderSocket
    server: OlderSocket


@dataclass(frozen=True)
class Matching:
    """Sockets put together: connections to be followed, others by why not, and how many sockets have no
    counterpart."""

    connections: Sequence[Older]
    left: Mapping[str, int]
    single: int


def read_sockets(written: bytes) -> list[OlderSocket]:
    """What census has listed."""
    return [
        OlderSocket(sk, cookie, netns, sent, received, OlderFlag(flags))
        for sk, cookie, netns, sent, received, flags in OLDER_SOCKET.iter_unpack(written)
    ]


def match(sockets: Sequence[OlderSocket]) -> Matching:
    """Find the two ends of each connection by its name.

    Nothing says which end is the client, so each socket has two names: what it is called as the client, and
    as the server; see client_id() in bpf/socket.h. A name that a third socket has as well is forged by
    somebody (TCP_REPAIR), and nobody can say who: such a connection is left alone.
    """
    clients: defaultdict[int, list[OlderSocket]] = defaultdict(list)
    for socket in sockets:
        clients[name_connection((socket.sent + 1) % _WORD, socket.received)].append(socket)
    servers: defaultdict[int, list[OlderSocket]] = defaultdict(list)
    for socket in sockets:
        name = name_connection(socket.received, socket.sent)
        if name in clients:
            servers[name].append(socket)
    connections: list[Older] = []
    left: Counter[str] = Counter()
    seen: set[int] = set()
    for name, found in servers.items():
        ends = {socket.sk: socket for socket in (*clients[name], *found)}
        seen.update(ends)
        reason = _find_obstacle(list(ends.values()), found)
        if reason is None:
            connections.append(Older(name, clients[name][0], found[0]))
        elif reason:
            left[reason] += 1
    single = sum(not socket.flags & OlderFlag.OUTSIDE for socket in sockets if socket.sk not in seen)
    return Matching(connections, left, single)


def _find_obstacle(ends: Sequence[OlderSocket], servers: Sequence[OlderSocket]) -> str | None:
    """Why a connection is not followed; "" if it is already, or is none of ours."""
    flags = OlderFlag(0)
    for end in ends:
        flags |= end.flags
    is_strange = all(end.flags & OlderFlag.OUTSIDE for end in ends)
    if is_strange or any(server.flags & OlderFlag.KNOWN for server in servers):
        return ""
    if len(ends) != 2:
        return AMBIGUOUS
    if flags & OlderFlag.OUTSIDE:
        return OUTSIDE
    return REPAIRED if flags & OlderFlag.REPAIRED else None


class Census:
    """One census, in steps between which other things may be done."""

    def __init__(
        self,
        program_fd: int,
        older: libbpf.Map,
        settings: SettingsMap,
        *,
        cgroup: int,
        directory: Directory | None = None,
    ) -> None:
        """Of sockets made in the cgroup with this id or below it; 0: of all."""
        self._program = program_fd
        self._older = older
        self._settings = settings
        self._cgroup = cgroup
        self._directory = directory or Directory()
        self._walker = Walker(_PATIENCE_S)
        self._held_up = 0
        self._namespaces = 0

    def run(self) -> Generator[CensusReport | None, None, None]:
        """Each step visits one namespace; the last one gives the report, the others None.

        Raises KernelError.
        """
        started = time.monotonic()
        self._forget_older()  # those of a daemon that was killed
        link = libbpf.link_iterator(self._program)
        try:
            matching = yield from self._list(link)
            outcomes = yield from self._join(link, matching.connections)
            left = Counter(matching.left)
            for outcome, reason in _LEFT.items():
                left[reason] += outcomes[outcome]
            # Neither end was visited again: its namespace has gone, or it has been closed.
            left[CLOSED] += len(matching.connections) - outcomes.total()
            yield CensusReport(
                outcomes[OlderOutcome.JOINED],
                {reason: n for reason, n in sorted(left.items()) if n},
                matching.single,
                self._namespaces,
                self._held_up,
                round(time.monotonic() - started, 3),
            )
        finally:
            os.close(link)
            self._walker.close()

    def _list(self, link: int) -> Generator[None, None, Matching]:
        self._settings.write(census=CensusState.LISTS, cgroup=self._cgroup)
        sockets: list[OlderSocket] = []
        for path in self._directory.walk():
            written = self._visit(link, path)
            if written is not None:
                self._namespaces += 1
                sockets += read_sockets(written)
            yield None
        return match(sockets)

    def _forget_older(self) -> None:
        for name in self._older.walk_keys():
            self._older.delete(name)

    def _join(self, link: int, connections: Sequence[Older]) -> Generator[None, None, Counter[OlderOutcome]]:
        outcomes: Counter[OlderOutcome] = Counter()
        self._settings.write(census=CensusState.JOINS)
        # As many as there is room for at a time; so that few namespaces are visited for each lot, in order.
        ordered = sorted(connections, key=lambda each: (each.server.netns, each.client.netns))
        room = self._older.max_entries
        try:
            for start in range(0, len(ordered), room):
                yield from self._join_some(link, ordered[start : start + room], outcomes)
                self._forget_older()
        finally:
            self._forget_older()
        self._settings.write(census=CensusState.DONE)
        return outcomes

    def _join_some(
        self, link: int, connections: Sequence[Older], outcomes: Counter[OlderOutcome]
    ) -> Generator[None, None, None]:
        for each in connections:
            value = OLDER.pack(each.client.sk, each.server.sk, each.client.cookie, each.server.cookie)
            try:
                self._older.set(_NAME.pack(each.name), value)
            except libbpf.KernelError:  # no memory
                outcomes[OlderOutcome.FULL] += 1
        ends = [end for each in connections for end in (each.client, each.server)]
        for cookie in dict.fromkeys(end.netns for end in ends):
            path = self._directory.find(cookie)
            written = self._visit(link, path) if path else None
            outcomes.update(OlderOutcome(outcome) for _, outcome in OLDER_JOINED.iter_unpack(written or b""))
            yield None

    def _visit(self, link: int, path: str) -> bytes | None:
        """What census writes about the namespace at `path`; None if it is gone, or held up there."""
        iterator = open_iterator(link, path)
        if iterator is None:
            return None
        written = self._walker.walk(iterator)
        if written is None:
            self._held_up += 1
        return written
