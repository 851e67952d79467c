# SPDX-License-Identifier: Apache-2.0
"""Events of connections: what the programs tell and enlist finds, with names, and answers about them.

A hundred thousand connections that are spliced at once must not hold the loop up. An event takes a lookup in
the map, and only so many each second; what has no name by then, or is told of nobody, is added up once a
second from the programs' counts.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from splicer.daemon.attribution import Attribution
from splicer.daemon.control import Rows
from splicer.daemon.journal import MOST_OF_CONNECTIONS, Journal, Record, fill_gaps
from splicer.errors import SplicerError
from splicer.kernel.layout import (
    COUNT_REFUSED,
    COUNTERS,
    STATE_PAIRED,
    EnlistOutcome,
    Event,
    EventType,
    read_pair,
    read_standing,
)
from splicer.model import REASON_NAMES, SCHEMA, Owner

# So many records are read for events each second; of a crowd the first ones.
_READS = 1000
# The owners of so many events are looked up in one go of the loop, once a second. Who asks does it as well.
_NAMED = 100
# Those who follow have half of the places on the control socket at most.
FOLLOWERS = 4
# How often it is looked for something new for them, and how often they hear that nothing is.
_FOLLOW_PAUSE_S = 0.1
_FOLLOW_BEAT_S = 1.0
# At a stop they have so long to take the last ones.
_FOLLOW_END_S = 0.5
_ROWS = 128

_SPLICED, _RESCUED, _LOST = map(COUNTERS.index, ("spliced", "rescued", "events_lost"))
_RESCUE = REASON_NAMES.index("rescue")
# What is no answer to why it was not spliced.
_NO_REFUSALS = frozenset(map(REASON_NAMES.index, ("", "cold", "pending")))


class Source(Protocol):
    """What is needed of a Sweeper."""

    def find_raw_pair(self, name: int) -> bytes | None: ...
    def read_counter(self, index: int) -> int: ...


class EventNoter:
    """Leaves what happens to connections in the journal. Only the daemon's loop may use it."""

    def __init__(self, journal: Journal, source: Source) -> None:
        self._journal = journal
        self._source = source
        self._reads = _READS
        # The latest event of a connection, by its name: what is told twice is noted once.
        self._latest: dict[int, Record] = {}
        # Counts when they were read last, and how much of them was noted by name since then.
        self._counted = self._read_counts()
        self._noted = dict.fromkeys(self._counted, 0)
        self._named = journal.last

    def receive(self, event: Event) -> None:
        """A record of the ring buffer."""
        if event.type == EventType.ADOPT:
            known = self._latest.get(event.name)
            if known is not None and known.type in ("draining", "rescued"):
                del self._latest[event.name]  # it is plain again
        elif event.type == EventType.DRAIN:
            is_rescue = event.reason == _RESCUE
            reason = REASON_NAMES[event.reason] if event.reason < len(REASON_NAMES) else str(event.reason)
            noted = self._note(
                "rescued" if is_rescue else "draining", event.name, reason, event.netns, event.tgid
            )
            if noted and is_rescue:
                self._noted[_RESCUED] += 1

    def note_outcome(self, name: int, outcome: EnlistOutcome) -> None:
        """What came of putting a connection in."""
        if outcome == EnlistOutcome.IN:
            self._noted[_SPLICED] += 1
            self._note("spliced", name)
        elif outcome == EnlistOutcome.OVER and (raw := self._read(name)) is not None:
            state, reason = read_standing(raw)
            if state == STATE_PAIRED and reason not in _NO_REFUSALS and reason < len(REASON_NAMES):
                self._noted[COUNT_REFUSED + reason] += 1
                self._note("refused", name, REASON_NAMES[reason], raw=raw)

    def _note(
        self,
        type_: str,
        name: int,
        reason: str = "",
        netns: tuple[int, int] = (0, 0),
        tgid: tuple[int, int] = (0, 0),
        raw: bytes | None = None,
    ) -> bool:
        """False if that is what was said of it last."""
        before = self._latest.pop(name, None)
        if before is not None and (before.type, before.reason) == (type_, reason):
            self._latest[name] = before
            return False
        raw = raw or self._read(name)
        record = self._journal.note(
            type_, reason=reason, name=name, netns=netns, tgid=tgid, raw=raw, of_connections=True
        )
        if raw is None and before is not None:
            record.take_parties(before)  # it is closed by now
        self._latest[name] = record
        if len(self._latest) > MOST_OF_CONNECTIONS:
            del self._latest[next(iter(self._latest))]
        return True

    def _read(self, name: int) -> bytes | None:
        if self._reads <= 0:
            return None
        self._reads -= 1
        return self._source.find_raw_pair(name)

    def tend(self, attribution: Attribution) -> None:
        """Once a second: add up what has no name, and find out who it was while they are there."""
        self._reads = _READS
        for index, now in self._read_counts().items():
            new = (now - self._counted[index]) % (1 << 64) - self._noted[index]
            self._counted[index], self._noted[index] = now, 0
            if new > 0:
                type_, reason = _describe_count(index)
                self._journal.note(type_, reason=reason, count=new, of_connections=True)
        fresh = self._journal.read(self._named)
        if fresh:
            self._named = fresh[-1].number
            name_parties(fresh[:_NAMED], attribution)

    def _read_counts(self) -> dict[int, int]:
        indexes = (
            _SPLICED,
            _RESCUED,
            _LOST,
            *(COUNT_REFUSED + reason for reason in range(1, len(REASON_NAMES))),
        )
        return {index: self._source.read_counter(index) for index in indexes}


def _describe_count(index: int) -> tuple[str, str]:
    """The type of event that a count is of, and its reason."""
    if index >= COUNT_REFUSED:
        return "refused", REASON_NAMES[index - COUNT_REFUSED]
    return {_SPLICED: ("spliced", ""), _RESCUED: ("rescued", "rescue"), _LOST: ("lost", "")}[index]


@functools.lru_cache(maxsize=512)
def _share(owner: Owner) -> Owner:
    """One object for equal ones: thousands of events are about some tens of parties."""
    return owner


def name_parties(
    records: list[Record], attribution: Attribution, find: Callable[[int], bytes | None] | None = None
) -> None:
    """Find whose connections these events are about, as far as it is not known. `find` reads the record of
    those that were not read."""
    found: dict[tuple[int, int, int], Owner] = {}
    for record in records:
        # Another thread may be at it, so it is read once.
        raw = record.raw
        if not record.name or record.client is not None:
            continue
        if raw is None and find is not None:
            raw = find(record.name)
        if raw is None:
            continue
        pair = read_pair(raw)
        record.local, record.remote = pair.client.local, pair.client.remote
        record.server = _share(attribution.find_owner(pair.server, found))
        record.client = _share(attribution.find_owner(pair.client, found))
        record.raw = None  # half a kilobyte


class EventHandler:
    """Answers `splicer events`. Used by the threads that answer requests."""

    def __init__(
        self, journal: Journal, attribution: Attribution, find_raw_pair: Callable[[int], bytes | None]
    ) -> None:
        self._journal = journal
        self._attribution = attribution
        self._find_raw_pair = find_raw_pair
        self._followers = threading.BoundedSemaphore(FOLLOWERS)
        self._ended = threading.Event()

    def answer(self, request: Mapping[str, Any]) -> Rows:
        """The latest `limit` events, 0 for all, or those `after` a number of `daemon`; with `follow` all that
        come as well. Raises SplicerError."""
        limit, after = _read_number(request, "limit"), _read_number(request, "after")
        if request.get("daemon") != self._journal.daemon:
            after = 0
        head = {"schema": SCHEMA, "daemon": self._journal.daemon, "since": self._journal.since}
        if request.get("follow") is not True:
            return Rows(head, "events", self._list(after, limit))
        if request.get("stream") is not True:
            raise SplicerError("who follows events has to ask for a stream")
        if self._ended.is_set():
            raise SplicerError("the daemon is stopping")
        if not self._followers.acquire(blocking=False):
            raise SplicerError(
                f"{FOLLOWERS} follow the events already",
                hint="end one of them, or look at them without --follow",
            )
        return Rows(
            head, "events", _Following(self._follow(after, limit), self._followers.release), waits=True
        )

    def _list(self, after: int, limit: int) -> Iterator[list[dict[str, Any]]]:
        records = self._journal.read(after, limit)
        if limit and len(records) == limit:
            after = records[0].number - 1  # those before were not asked for
        yield from self._spell(fill_gaps(records, after))

    def _spell(self, records: list[Record]) -> Iterator[list[dict[str, Any]]]:
        for start in range(0, len(records), _ROWS):
            some = records[start : start + _ROWS]
            name_parties(some, self._attribution, self._find_raw_pair)
            yield [record.to_json() for record in some]

    def _follow(self, after: int, limit: int) -> Iterator[list[dict[str, Any]]]:
        last = self._journal.last
        for rows in self._list(after, limit):
            last = max(last, rows[-1]["number"])
            yield rows
        beat_at = 0.0
        while True:
            is_over = self._ended.is_set()
            if last != self._journal.last:
                records = self._journal.read(last)
                for rows in self._spell(fill_gaps(records, last)):
                    yield rows
                last = records[-1].number
            elif time.monotonic() >= beat_at:
                # Who has gone without a word is noticed by this.
                yield []
                beat_at = time.monotonic() + _FOLLOW_BEAT_S
            if is_over:
                return
            self._ended.wait(_FOLLOW_PAUSE_S)

    def end(self) -> None:
        """There will be no more events. Waits until those who follow have them all, but not for long."""
        self._ended.set()
        deadline = time.monotonic() + _FOLLOW_END_S
        for _ in range(FOLLOWERS):
            self._followers.acquire(timeout=max(0.0, deadline - time.monotonic()))


class _Following:
    """Rows without an end, and what is done when nobody takes any more."""

    def __init__(self, rows: Iterator[list[dict[str, Any]]], release: Callable[[], None]) -> None:
        self._rows = rows
        self._release = release
        self._guard = threading.Lock()
        self._is_open = True

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return self._rows

    def close(self) -> None:
        with self._guard:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._release()


def _read_number(request: Mapping[str, Any], key: str) -> int:
    value = request.get(key)
    return value if isinstance(value, int) and value > 0 else 0
