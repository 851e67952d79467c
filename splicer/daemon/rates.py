# SPDX-License-Identifier: Apache-2.0
"""How much goes between whom just now: the answer to `splicer top`.

Two looks at the programs' counts give rates. All who watch share the looks, and these take a share of one CPU
at most: with very many connections they are further apart, and the rates are means of that time. Between
parties everything is added up as it is read. Of single connections the last count is remembered, but only
while somebody wants to see them.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from splicer.daemon.attribution import Attribution
from splicer.errors import USAGE, SplicerError
from splicer.kernel.layout import (
    STATE_PAIRED,
    STATE_SPLICED,
    TRAFFIC,
    TRAFFIC_KEY,
    Pair,
    read_amounts,
    read_names,
    read_standings,
)
from splicer.kernel.libbpf import Map, Walk
from splicer.kernel.volume import VolumeKey, Volumes
from splicer.model import REASON_NAMES, SCHEMA, STATES, TOP_KEYS, Owner

# Share of one CPU that the looks may take, and how far they are apart at least.
LOOK_SHARE = 0.02
LOOK_PAUSE_S = 0.4
# Nobody has asked for so long: what is remembered goes.
FORGET_S = 130.0
# Rows of parties in one answer, the busiest ones; and of connections at most.
_ROWS = 100
MOST_CONNECTIONS = 200
# Of so many plain connections the bytes are looked up one by one.
_PLAIN_ONES = 1000
_BATCH = 2048

Ends = tuple[int, int]
"""Cgroup ids of client and server."""


class Connections(Protocol):
    """What is needed of a Sweeper."""

    def walk_pairs(self) -> Walk: ...
    def find_pair(self, name: int) -> Pair | None: ...


class Carried(Protocol):
    """What is needed of a VolumeReader."""

    def read(self) -> Volumes: ...
    def read_each(self, wanted: Iterable[tuple[int, VolumeKey]]) -> dict[int, int]: ...


@dataclass
class Amounts:
    """What was carried: redirected bytes and messages, and bytes through TCP."""

    redirected: int = 0
    messages: int = 0
    plain: int = 0

    def add(self, other: Amounts) -> None:
        self.redirected += other.redirected
        self.messages += other.messages
        self.plain += other.plain

    def since(self, before: Amounts) -> Amounts:
        """What has been added. A connection that closes between two readings is missing in one of them."""
        return Amounts(
            max(0, self.redirected - before.redirected),
            max(0, self.messages - before.messages),
            max(0, self.plain - before.plain),
        )

    def at_least(self, other: Amounts) -> Amounts:
        return Amounts(
            max(self.redirected, other.redirected),
            max(self.messages, other.messages),
            max(self.plain, other.plain),
        )

    def to_json(self, new: Amounts, elapsed: float) -> dict[str, Any]:
        """All of it, and what is new by the second."""
        return {
            "redirected_bytes": self.redirected,
            "redirected_messages": self.messages,
            "plain_bytes": self.plain,
            "redirected_bytes_per_second": round(new.redirected / elapsed, 1),
            "redirected_messages_per_second": round(new.messages / elapsed, 1),
            "plain_bytes_per_second": round(new.plain / elapsed, 1),
        }


@dataclass
class Party:
    """Two who talk: how many open connections of theirs are followed, how many of them are spliced, what they
    carried, and how much of it is new since the last look."""

    connections: int = 0
    spliced: int = 0
    whole: Amounts = field(default_factory=Amounts)
    new: Amounts = field(default_factory=Amounts)
    # What the next look is compared with. It is held for one look if there was less than before: a connection
    # that was just closing is no news when it is among the closed ones. Else somebody was forgotten.
    base: Amounts = field(default_factory=Amounts)
    is_held: bool = False

    def add(self, other: Party) -> None:
        self.connections += other.connections
        self.spliced += other.spliced
        self.whole.add(other.whole)
        self.new.add(other.new)

    def to_json(self, elapsed: float) -> dict[str, Any]:
        return {
            "connections": self.connections,
            "spliced": self.spliced,
            **self.whole.to_json(self.new, elapsed),
        }


@dataclass
class Look:
    """Everything as it was `at` a time of the clock, and what is new since the look before, `elapsed` seconds
    earlier; 0 if there was none."""

    at: float
    elapsed: float = 0.0
    parties: dict[Ends, Party] = field(default_factory=dict)
    # By the name of the connection, if somebody wants them; and of those that carried something, how much.
    connections: dict[int, Amounts] | None = None
    busy: dict[int, Amounts] = field(default_factory=dict)
    is_compared: bool = False
    # Those whose plain bytes were looked up, and the number of those of which there were too many.
    known_plain: set[int] = field(default_factory=set)
    unknown_plain: int = 0


class RateReporter:
    """Answers who asks. Used by the threads that answer requests, one at a time."""

    def __init__(
        self,
        connections: Connections,
        traffic: Map,
        volumes: Carried,
        attribution: Attribution,
        find_owner: Callable[[int], Owner],
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`find_owner` gives the owner of a cgroup id."""
        self._connections = connections
        self._traffic = traffic
        self._volumes = volumes
        self._attribution = attribution
        self._find_owner = find_owner
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._guard = threading.Lock()
        self._look: Look | None = None
        self._next_at = -math.inf
        self._asked_at = -math.inf

    def forget(self) -> None:
        """Drop what nobody wants to see any more. To be called now and then, by any thread."""
        if self._look is not None and self._clock() - self._asked_at > FORGET_S:
            with self._guard:
                self._look = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The busiest pairs of parties by the key `sort` (of TOP_KEYS), and so many `connections`. Raises
        SplicerError."""
        key, wanted = request.get("sort", "bytes"), request.get("connections", 0)
        if key not in TOP_KEYS:
            raise SplicerError(
                f"unknown key ({key})", hint=f"accepted: {', '.join(TOP_KEYS)}", exit_code=USAGE
            )
        wanted = min(wanted, MOST_CONNECTIONS) if isinstance(wanted, int) else 0
        with self._guard:
            self._asked_at = self._clock()
            look = self._look
            is_short = look is not None and wanted > 0 and look.connections is None
            if look is None or is_short or self._asked_at >= self._next_at:
                begun = self._cpu_clock()
                look = self._look = self._take(look, with_connections=wanted > 0)
                cost = self._cpu_clock() - begun
                self._next_at = self._clock() + max(LOOK_PAUSE_S, cost / LOOK_SHARE)
            return self._describe(look, key, wanted)

    # -- looking ---------------------------------------------------------------------------------------------

    def _take(self, before: Look | None, *, with_connections: bool) -> Look:
        look = Look(self._clock(), connections={} if with_connections else None)
        if before is not None:
            look.elapsed = max(look.at - before.at, 0.001)
        # Closed ones first: one that closes meanwhile is missing this time, and none is there twice.
        for key, value in self._traffic.items():
            _, redirected, messages = TRAFFIC.unpack(value)
            client, server = TRAFFIC_KEY.unpack(key)
            self._find(look, (client, server)).whole.add(Amounts(redirected, messages))
        plain = self._walk(look)
        for between, volume in self._volumes.read().plain.items():
            self._find(look, (between.client, between.server)).whole.plain += volume.size
        if look.connections is not None:
            for name, size in self._volumes.read_each(plain).items():
                look.connections[name].plain = size
                look.known_plain.add(name)
        if before is not None:
            self._compare(look, before)
        else:
            for party in look.parties.values():
                party.base = party.whole
        return look

    @staticmethod
    def _find(look: Look, ends: Ends) -> Party:
        party = look.parties.get(ends)
        if party is None:
            party = look.parties[ends] = Party()
        return party

    def _walk(self, look: Look) -> list[tuple[int, VolumeKey]]:
        """Add up the open connections; names of plain ones, if single ones are wanted, and what they count
        for."""
        plain: list[tuple[int, VolumeKey]] = []
        walk = self._connections.walk_pairs()
        while (step := walk.step(_BATCH)) is not None:
            states, rows = read_amounts(step[1])
            for state, (client, server, sent, messages, answered, answers) in zip(states, rows, strict=True):
                party = self._find(look, (client, server))
                party.connections += 1
                party.spliced += state == STATE_SPLICED
                party.whole.redirected += sent + answered
                party.whole.messages += messages + answers
            if look.connections is not None:
                look.connections.update(_read_each(step[1]))
                for name, (state, reason), client, server in _read_plain(step[1]):
                    if state == STATE_PAIRED and len(plain) < _PLAIN_ONES:
                        plain.append((name, VolumeKey(client, server, reason)))
                    else:
                        look.unknown_plain += state == STATE_PAIRED
        return plain

    @staticmethod
    def _compare(look: Look, before: Look) -> None:
        nothing = Amounts()
        for ends in before.parties.keys() - look.parties.keys():
            look.parties[ends] = Party()
        for ends, party in look.parties.items():
            former = before.parties.get(ends, Party())
            party.new = party.whole.since(former.base)
            party.base = party.whole.at_least(former.base)
            party.is_held = party.base != party.whole
            if former.is_held:
                party.base, party.is_held = party.whole, False
        if look.connections is not None and before.connections is not None:
            look.is_compared = True
            for name, whole in look.connections.items():
                known = before.connections.get(name)
                new = whole.since(known or nothing)
                if known is not None and name not in before.known_plain:
                    new.plain = 0
                if new.redirected or new.messages or new.plain:
                    look.busy[name] = new

    # -- telling ---------------------------------------------------------------------------------------------

    def _describe(self, look: Look, key: str, wanted: int) -> dict[str, Any]:
        elapsed = look.elapsed or math.inf
        owners = {cgroup: self._find_owner(cgroup) for ends in look.parties for cgroup in ends}
        parties: dict[tuple[Owner, Owner], Party] = {}
        total = Party()
        for (client, server), party in look.parties.items():
            total.add(party)
            parties.setdefault((owners[client], owners[server]), Party()).add(party)
        rank = _RANKS[key]
        ordered = sorted(
            parties.items(), key=lambda item: (rank(item[1]), item[1].connections, item[1].whole.redirected)
        )[::-1]
        others = Party()
        for _, party in ordered[_ROWS:]:
            others.add(party)
        return {
            "schema": SCHEMA,
            "seconds": round(look.elapsed, 3),
            "total": total.to_json(elapsed),
            "pairs": [
                {"client": dict(vars(client)), "server": dict(vars(server)), **party.to_json(elapsed)}
                for (client, server), party in ordered[:_ROWS]
            ],
            "others": others.to_json(elapsed),
            "compared": look.is_compared,
            "connections": list(self._list_busy(look, key, wanted)),
            "plain_not_looked_up": look.unknown_plain if wanted else 0,
        }

    def _list_busy(self, look: Look, key: str, wanted: int) -> Iterator[dict[str, Any]]:
        if not wanted or look.connections is None:
            return
        rank = _RANKS[key]
        busiest = heapq.nlargest(
            wanted, look.busy.items(), key=lambda item: rank(Party(1, 0, item[1], item[1]))
        )
        found: dict[tuple[int, int, int], Owner] = {}
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for name, new in busiest:
            pair = self._connections.find_pair(name)
            if pair is None or pair.state not in STATES:
                continue
            yield {
                "client": dict(vars(self._attribution.find_owner(pair.client, found))),
                "server": dict(vars(self._attribution.find_owner(pair.server, found))),
                "local": pair.client.local,
                "remote": pair.client.remote,
                "state": STATES[pair.state],
                "reason": REASON_NAMES[pair.reason] if pair.reason < len(REASON_NAMES) else "",
                "age_seconds": round((now - pair.born_ns) / 1e9, 3),
                **look.connections[name].to_json(new, look.elapsed or math.inf),
                **({} if name in look.known_plain else {"plain_bytes": None}),
            }


_RANKS: Mapping[str, Callable[[Party], float]] = {
    "bytes": lambda party: party.new.redirected + party.new.plain,
    "redirected": lambda party: party.new.redirected,
    "plain": lambda party: party.new.plain,
    "messages": lambda party: party.new.messages,
    "connections": lambda party: party.connections,
}


def _read_each(values: memoryview) -> Iterator[tuple[int, Amounts]]:
    _, rows = read_amounts(values)
    for name, (_, _, sent, messages, answered, answers) in zip(read_names(values), rows, strict=True):
        yield name, Amounts(sent + answered, messages + answers)


def _read_plain(values: memoryview) -> Iterator[tuple[int, tuple[int, int], int, int]]:
    _, rows = read_amounts(values)
    for name, standing, row in zip(read_names(values), read_standings(values), rows, strict=True):
        yield name, standing, row[0], row[1]
