# SPDX-License-Identifier: Apache-2.0
"""The journal of events: what is kept, what is counted, and who is named."""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import pytest

from splicer.daemon.events import _READS, FOLLOWERS, EventHandler, EventNoter
from splicer.daemon.journal import LOGGED, MOST_OF_CONNECTIONS, Journal, NotingLog, fill_gaps
from splicer.errors import SplicerError
from splicer.kernel.layout import COUNT_REFUSED, COUNTERS, PAIR, EnlistOutcome, Event, EventType
from splicer.model import EVENTS, MISSED, REASON_NAMES, Owner

from ..conftest import Log

PACING, RESCUE, BACKPRESSURE, BLOCKING = map(
    REASON_NAMES.index, ("pacing", "rescue", "backpressure", "blocking_reader")
)


def record_of(state: int = 1, reason: int = 0) -> bytes:
    """A pair in the map, all of whose other fields are 0."""
    record = bytearray(PAIR.size)
    struct.pack_into("=2I", record, 8, state, reason)
    return bytes(record)


class Kernel:
    """The maps of the programs."""

    def __init__(self) -> None:
        self.pairs: dict[int, bytes] = {}
        self.counts: dict[int, int] = {}
        self.looked_up = 0

    def find_raw_pair(self, name: int) -> bytes | None:
        self.looked_up += 1
        return self.pairs.get(name)

    def read_counter(self, index: int) -> int:
        return self.counts.get(index, 0)


class Owners:
    """Finds one owner for everybody."""

    def __init__(self) -> None:
        self.asked = 0

    def find_owner(self, end: Any, found: dict[Any, Owner]) -> Owner:
        self.asked += 1
        return Owner(container="web")


@pytest.fixture
def journal() -> Journal:
    return Journal(lambda: 1000.0)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def noter(journal: Journal, kernel: Kernel) -> EventNoter:
    return EventNoter(journal, kernel)


def drain(name: int, reason: int) -> Event:
    return Event(EventType.DRAIN, reason, name, (1, 2), (3, 4))


def announce(name: int) -> Event:
    return Event(EventType.ADOPT, 0, name, (1, 2), (3, 4))


def told(journal: Journal) -> list[tuple[str, str, int]]:
    return [(each.type, each.reason, each.count) for each in journal.read()]


def test_a_hundred_thousand_are_bounded_and_counted(
    journal: Journal, noter: EventNoter, kernel: Kernel
) -> None:
    """Their records are read for so many a second only, and what concerns all is still there."""
    journal.note("paused")
    for name in range(1, 100_001):
        kernel.pairs[name] = b"x"
        noter.note_outcome(name, EnlistOutcome.IN)
    found = journal.read()
    assert len(found) == MOST_OF_CONNECTIONS + 1
    assert found[0].type == "paused"
    assert kernel.looked_up == _READS
    assert len(noter._latest) == MOST_OF_CONNECTIONS
    filled = fill_gaps(found, 0)
    assert [(each.type, each.count) for each in filled[:2]] == [
        ("paused", 1),
        (MISSED, 100_000 - MOST_OF_CONNECTIONS),
    ]
    kernel.counts[COUNTERS.index("spliced")] = 100_000
    noter.tend(Owners())  # type: ignore[arg-type]
    assert journal.last == 100_001, "each was noted by name"
    assert sum(sys.getsizeof(each) for each in found) < 1 << 20


def test_the_loop_names_only_so_many_at_a_time(journal: Journal, noter: EventNoter, kernel: Kernel) -> None:
    owners = Owners()
    for name in range(1, 1001):
        kernel.pairs[name] = record_of(2)
        noter.note_outcome(name, EnlistOutcome.IN)
    noter.tend(owners)  # type: ignore[arg-type]
    assert owners.asked == 200, "two ends of a hundred"
    noter.tend(owners)  # type: ignore[arg-type]
    assert owners.asked == 200, "what is left is for who asks"


def test_what_is_told_twice_is_noted_once(journal: Journal, noter: EventNoter) -> None:
    noter.note_outcome(7, EnlistOutcome.IN)
    noter.receive(drain(7, BACKPRESSURE))
    noter.receive(drain(7, BACKPRESSURE))
    noter.receive(announce(7))
    noter.note_outcome(7, EnlistOutcome.IN)
    noter.receive(drain(7, BACKPRESSURE))
    assert [each[0] for each in told(journal)] == ["spliced", "draining", "spliced", "draining"]


def test_again_by_a_walk(journal: Journal, noter: EventNoter) -> None:
    """Nobody tells the name of who was put in then."""
    noter.receive(drain(7, BACKPRESSURE))
    noter.receive(announce(7))
    noter.receive(drain(7, BACKPRESSURE))
    assert [each[0] for each in told(journal)] == ["draining", "draining"]


def test_a_rescue_is_no_common_way_back(journal: Journal, noter: EventNoter, kernel: Kernel) -> None:
    noter.receive(drain(7, RESCUE))
    kernel.counts[COUNTERS.index("rescued")] = 3
    noter.tend(Owners())  # type: ignore[arg-type]
    assert told(journal) == [("rescued", "rescue", 1), ("rescued", "rescue", 2)]


def test_refusals(journal: Journal, noter: EventNoter, kernel: Kernel) -> None:
    """By name where enlist found it out, and the others by number; a try that found no moment is none."""
    kernel.pairs |= {1: record_of(1, PACING), 2: record_of(1, 1), 3: record_of(3, PACING)}
    for name in (1, 2, 3, 4, 1):
        noter.note_outcome(name, EnlistOutcome.OVER)
    kernel.counts |= {COUNT_REFUSED + PACING: 2, COUNT_REFUSED + BLOCKING: 5}
    noter.tend(Owners())  # type: ignore[arg-type]
    assert told(journal) == [("refused", "pacing", 1), ("refused", "blocking_reader", 5)]
    noter.tend(Owners())  # type: ignore[arg-type]
    assert len(told(journal)) == 2


def test_what_was_counted_before_is_not_news(journal: Journal, kernel: Kernel) -> None:
    kernel.counts[COUNTERS.index("spliced")] = 12
    noter = EventNoter(journal, kernel)
    noter.tend(Owners())  # type: ignore[arg-type]
    assert told(journal) == []


def test_lost_words(journal: Journal, noter: EventNoter, kernel: Kernel) -> None:
    kernel.counts[COUNTERS.index("events_lost")] = 9
    noter.tend(Owners())  # type: ignore[arg-type]
    assert told(journal) == [("lost", "", 9)]


def test_who_has_closed_is_known_from_before(journal: Journal, noter: EventNoter, kernel: Kernel) -> None:
    kernel.pairs[7] = record_of(2)
    noter.note_outcome(7, EnlistOutcome.IN)
    del kernel.pairs[7]
    noter.receive(drain(7, REASON_NAMES.index("closing")))
    assert journal.read()[-1].raw == record_of(2)


def test_who_was_named_and_has_closed_has_that_name(
    journal: Journal, noter: EventNoter, kernel: Kernel
) -> None:
    owners = Owners()
    kernel.pairs[7] = record_of(2)
    noter.note_outcome(7, EnlistOutcome.IN)
    noter.tend(owners)  # type: ignore[arg-type]
    del kernel.pairs[7]
    noter.receive(drain(7, REASON_NAMES.index("closing")))
    noter.tend(owners)  # type: ignore[arg-type]
    before, after = journal.read()
    assert before.client == after.client == Owner(container="web")
    assert (after.server, after.local, after.remote) == (before.server, before.local, before.remote)


def test_records_are_not_kept_when_they_have_told_who_it_was(
    journal: Journal, noter: EventNoter, kernel: Kernel
) -> None:
    """Each is half a kilobyte, and there are thousands of events."""
    for name in range(1, 50):
        kernel.pairs[name] = record_of(2)
        noter.note_outcome(name, EnlistOutcome.IN)
    noter.tend(Owners())  # type: ignore[arg-type]
    assert [record.raw for record in journal.read()] == [None] * 49


# -- from the log ------------------------------------------------------------------------------------------


def test_the_log_is_passed_on_and_noted(journal: Journal, log: Log) -> None:
    noting = NotingLog(log, journal)
    noting.info("override", subjects=["web"], mode="off")
    noting.debug("something_else", x=1)
    noting.warning("docker_lost", endpoint="unix:///x", error=OSError("a" * 1000))
    assert log.names() == ["override", "something_else", "docker_lost"]
    override, lost = journal.read()
    assert (override.type, override.detail) == ("override", {"subjects": ["web"], "mode": "off"})
    assert len(str(lost.detail["error"])) == 300
    json.dumps([each.to_json() for each in journal.read()])


def test_long_lists_are_cut(journal: Journal, log: Log) -> None:
    NotingLog(log, journal).info("override", subjects=["web"] * 1000, deep={"a": [1, None, True]})
    (record,) = journal.read()
    assert len(record.detail["subjects"]) == 20
    assert record.detail["deep"] == {"a": [1, None, True]}


def test_every_type_has_a_sentence() -> None:
    assert set(LOGGED.values()) <= set(EVENTS)


# -- answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def handler(journal: Journal, kernel: Kernel) -> EventHandler:
    return EventHandler(journal, Owners(), kernel.find_raw_pair)  # type: ignore[arg-type]


def ask(handler: EventHandler, **request: Any) -> list[tuple[str, int]]:
    return [(row["type"], row["number"]) for part in handler.answer(request).parts for row in part]


def test_limits(journal: Journal, handler: EventHandler) -> None:
    for number in range(300):
        journal.note(str(number))
    assert len(ask(handler)) == 300
    assert ask(handler, limit=2) == [("298", 299), ("299", 300)]
    assert ask(handler, after=298, daemon=journal.daemon) == [("298", 299), ("299", 300)]
    assert len(ask(handler, after=298, daemon="another")) == 300, "numbers of another daemon mean nothing"
    assert len(ask(handler, limit=-1, after="x")) == 300


def test_what_is_missing_is_said(kernel: Kernel) -> None:
    journal = Journal(most_of_connections=3, most_others=3)
    handler = EventHandler(journal, Owners(), kernel.find_raw_pair)  # type: ignore[arg-type]
    journal.note("paused")
    for _ in range(10):
        journal.note("refused", of_connections=True)
    kinds = ["paused", MISSED, "refused", "refused", "refused"]
    assert [each[0] for each in ask(handler)] == kinds
    assert [each[0] for each in ask(handler, after=4, daemon=journal.daemon)] == kinds[1:]
    assert [each[0] for each in ask(handler, limit=2)] == kinds[3:], "those were not asked for"
    assert [each[0] for each in ask(handler, limit=4)] == kinds


def test_who_follows_hears_what_comes_and_what_was_missed(kernel: Kernel) -> None:
    journal = Journal(most_of_connections=3, most_others=3)
    handler = EventHandler(journal, Owners(), kernel.find_raw_pair)  # type: ignore[arg-type]
    journal.note("paused")
    rows = handler.answer({"follow": True, "stream": True})
    assert rows.waits
    parts = iter(rows.parts)
    assert [row["type"] for row in next(parts)] == ["paused"]
    assert next(parts) == [], "it is told that it is still followed"
    for _ in range(10):
        journal.note("refused", of_connections=True)
    part = next(parts)
    assert [(row["type"], row["count"]) for row in part] == [(MISSED, 7), *[("refused", 1)] * 3]
    assert journal.last == part[-1]["number"]


def test_only_so_many_may_follow(handler: EventHandler) -> None:
    """However one has ended, also before it took anything, its place is free."""
    request = {"follow": True, "stream": True}
    following = [handler.answer(request) for _ in range(FOLLOWERS)]
    with pytest.raises(SplicerError, match="already"):
        handler.answer(request)
    next(iter(following[0].parts))
    for rows in following[:2]:
        rows.close()
        rows.close()
    handler.answer(request)
    handler.answer(request)
    with pytest.raises(SplicerError, match="already"):
        handler.answer(request)


def test_following_wants_a_stream(handler: EventHandler) -> None:
    with pytest.raises(SplicerError, match="stream"):
        handler.answer({"follow": True})


def test_who_was_not_read_is_read_when_somebody_asks(
    journal: Journal, handler: EventHandler, kernel: Kernel
) -> None:
    journal.note("spliced", name=7, of_connections=True)
    kernel.pairs[7] = record_of(2)
    (part,) = handler.answer({}).parts
    assert part[0]["client"]["container"] == "web"


def test_events_of_the_same_parties_share_them(
    journal: Journal, handler: EventHandler, kernel: Kernel
) -> None:
    """However often they are asked about."""
    for name in (7, 8):
        kernel.pairs[name] = record_of(2)
        journal.note("spliced", name=name, of_connections=True)
        list(handler.answer({}).parts)
    first, second = journal.read(0, 0)
    assert first.client is first.server is second.client is second.server


def test_at_the_end_who_follows_has_everything(journal: Journal, handler: EventHandler) -> None:
    rows = handler.answer({"follow": True, "stream": True})
    parts = iter(rows.parts)
    assert next(parts) == []
    journal.note("drained")
    handler._ended.set()
    assert [row["type"] for part in parts for row in part] == ["drained"]
    rows.close()
    handler.end()
    with pytest.raises(SplicerError, match="stopping"):
        handler.answer({"follow": True, "stream": True})
