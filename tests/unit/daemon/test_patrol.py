# SPDX-License-Identifier: Apache-2.0
"""When pairs are looked at, how often the SOCKHASH is searched, and that neither takes more than it may."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest

from splicer.daemon import patrol
from splicer.daemon.patrol import PERIOD_S, SEARCH_ENDS, SOON_S, STEP_PAIRS, STEPS, Patrol, PatrolReport
from splicer.kernel.layout import PAIR, STATE_PAIRED, STATE_SPLICED
from splicer.kernel.sweep import WatchFindings

PLAIN, READER = 1 << 40, 4711


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.cpu = 0.0

    def __call__(self) -> float:
        return self.now


class Walk:
    def __init__(self, names: list[int], states: dict[int, int]) -> None:
        self._names = names
        self._states = states

    def step(self, wanted: int) -> tuple[memoryview, memoryview] | None:
        if not self._names:
            return None
        some, self._names = self._names[:wanted], self._names[wanted:]
        rest = bytes(PAIR.size - 12)
        states = [self._states.get(name, STATE_SPLICED) for name in some]
        values = b"".join(struct.pack("=Q I", *each) + rest for each in zip(some, states, strict=True))
        return memoryview(b""), memoryview(values)


class Sweeper:
    """What a patrol asks for, written down with the time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.names: list[int] = []
        self.states: dict[int, int] = {}
        self.ends: list[tuple[int, int]] = []
        self.orphans = self.news = self.listings = 0
        self.again: set[int] = set()
        self.talking: set[int] = set()
        self.rescued = 0
        self.readers: dict[int, list[int]] = {}
        # Seconds that a look at one pair, and at one end, takes.
        self.cost = self.search_cost = 0.0
        self.looks: list[tuple[float, list[int]]] = []
        self.searches: list[float] = []
        # How many names were asked about at a time.
        self.asked_about: list[int] = []

    def watch_all(self) -> WatchFindings:
        return self.watch_pairs(self.names)

    def watch_pairs(self, names: Iterable[int]) -> WatchFindings:
        names = list(names)
        if names:
            self.looks.append((self.clock.now, names))
        self.clock.now += self.cost * len(names)
        self.clock.cpu += self.cost * len(names)
        again, talking = (frozenset(each & set(names)) for each in (self.again, self.talking))
        return WatchFindings(len(names), again, self.rescued, talking)

    def find_readers(self, tgids: set[int]) -> list[int]:
        return [name for tgid in tgids for name in self.readers.get(tgid, ())]

    def walk_pairs(self) -> Walk:
        self.listings += 1
        return Walk(list(self.names), self.states)

    def read_splice_stamp(self) -> int:
        return self.news

    def read_orphan_stamp(self) -> int:
        return self.orphans

    def walk_ends(self) -> Iterator[tuple[int, int]]:
        self.searches.append(self.clock.now)
        for end in self.ends:
            self.clock.now += self.search_cost
            yield end

    def find_unknown(self, names: Iterable[int]) -> set[int]:
        self.asked_about.append(len(set(names)))
        return set(names) - set(self.names)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sweeper(clock: Clock) -> Sweeper:
    return Sweeper(clock)


def _run(made: Patrol, clock: Clock, seconds: float) -> list[PatrolReport]:
    """Work whenever something is due, for so long."""
    reports = []
    end = clock.now + seconds
    while made.deadline < end:
        clock.now = max(clock.now, made.deadline)
        reports.append(made.work())
    clock.now = max(clock.now, end)
    return reports


def _times(sweeper: Sweeper, name: int) -> list[float]:
    return [when for when, names in sweeper.looks if name in names]


# the round


def test_namespaces_are_told_once_when_all_are_listed(clock: Clock, sweeper: Sweeper) -> None:
    sweeper.names = list(range(1, 2 * STEP_PAIRS + 10))
    sweeper.states = {1: STATE_PAIRED}
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    told = [report.namespaces for report in _run(made, clock, PERIOD_S)]
    assert [each for each in told if each is not None] == [{0: {0}}]
    sweeper.news += 1
    sweeper.names = [1]
    told = [report.namespaces for report in _run(made, clock, PERIOD_S)]
    assert [each for each in told if each is not None] == [{}]


def test_who_was_looked_at_is_told_with_the_beginning_of_the_round(clock: Clock, sweeper: Sweeper) -> None:
    sweeper.names = list(range(1, 2 * STEP_PAIRS + 10))
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    begun = clock.now
    reports = _run(made, clock, PERIOD_S)
    told = [(report.begun, name) for report in reports for name in report.names]
    assert told == [(begun, name) for name in sweeper.names]
    assert len(reports) > 2


def test_who_talks_again_is_told_whatever_the_look(clock: Clock, sweeper: Sweeper) -> None:
    sweeper.names = [1, 2, 3]
    sweeper.talking = {2}
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    assert [report.talking for report in _run(made, clock, 1.5 * PERIOD_S)] == [{2}, {2}]
    made.ask(2)
    clock.now += SOON_S
    assert (made.work().talking, made.work().begun) == ({2}, None)


def test_each_spliced_pair_is_looked_at_once_a_second(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = [1, 2, 3, PLAIN]
    sweeper.states[PLAIN] = STATE_PAIRED
    _run(Patrol(sweeper, clock, lambda: clock.cpu), clock, 10 * PERIOD_S)
    assert [len(_times(sweeper, name)) for name in (1, 2, 3)] == [10, 10, 10]
    assert _times(sweeper, PLAIN) == []
    # All at once: a daemon with little to do sleeps.
    assert len(sweeper.looks) == 10


@pytest.mark.parametrize("number", [5_000, 10_000, 100_000])
def test_many_pairs_are_spread_over_the_second(sweeper: Sweeper, clock: Clock, number: int) -> None:
    sweeper.names = list(range(1, number + 1))
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 3 * PERIOD_S)  # it has to find out how many there are
    sweeper.looks.clear()
    _run(made, clock, 4 * PERIOD_S)
    assert max(len(names) for _, names in sweeper.looks) <= max(STEP_PAIRS, number // STEPS + 1)
    for name in (1, number // 2, number):
        times = _times(sweeper, name)
        assert len(times) == 4
        assert all(0.9 < b - a < 1.1 for a, b in pairwise(times))


@pytest.mark.parametrize("number", [1_000, 10_000, 100_000])
def test_a_round_takes_longer_where_there_are_many(sweeper: Sweeper, clock: Clock, number: int) -> None:
    """The share of a CPU stays what it is; each pair is looked at all the same, in turn."""
    sweeper.names = list(range(1, number + 1))
    sweeper.cost = 2e-6
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 3 * PERIOD_S)
    sweeper.looks.clear()
    begun, spent = clock.now, clock.cpu
    _run(made, clock, 60 * PERIOD_S)
    wanted = number * sweeper.cost / PERIOD_S
    share = (clock.cpu - spent) / (clock.now - begun)
    assert share == pytest.approx(min(wanted, patrol.ROUND_SHARE), rel=0.1)
    assert share < 0.02
    looks = [len(_times(sweeper, name)) for name in (1, number // 2, number)]
    expected = 60 * min(1.0, patrol.ROUND_SHARE / wanted)
    assert all(expected - 2.5 <= each <= expected + 1.1 for each in looks)
    # None of them holds anything up.
    assert max(len(names) for _, names in sweeper.looks) <= patrol.STEP_PAIRS_MAX


def test_a_flood_of_new_pairs_is_looked_at_within_the_second_or_nearly(
    sweeper: Sweeper, clock: Clock
) -> None:
    """The first round over them does not know how many to expect, and has to go faster."""
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 3 * PERIOD_S)
    sweeper.names = list(range(1, 100_001))
    sweeper.news += 100_000
    begun = clock.now
    _run(made, clock, 2 * PERIOD_S)
    assert _times(sweeper, 100_000)[0] - begun < 2 * PERIOD_S


def test_pairs_are_listed_again_when_some_were_spliced(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = list(range(1, 6_001))
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 5 * PERIOD_S)
    assert sweeper.listings == 1
    # Spliced while a round goes on, and where that has been already: not missed, but for this round.
    sweeper.names.insert(0, 10_000)
    sweeper.news += 1
    _run(made, clock, 2.5 * PERIOD_S)
    assert sweeper.listings == 2
    assert _times(sweeper, 10_000)
    # One that has gone is no harm, and forgotten at the next occasion.
    sweeper.names.remove(1)
    _run(made, clock, 3 * PERIOD_S)
    sweeper.news += 1
    _run(made, clock, 2 * PERIOD_S)
    sweeper.looks.clear()
    _run(made, clock, 2 * PERIOD_S)
    assert not _times(sweeper, 1)
    assert len(_times(sweeper, 6_000)) == len(_times(sweeper, 10_000)) == 2
    assert sweeper.listings == 3
    # Nobody said so, and it is found all the same.
    sweeper.names.append(20_000)
    _run(made, clock, patrol.LIST_ROUNDS * PERIOD_S)
    assert _times(sweeper, 20_000)


def test_without_connections_it_wakes_up_once_a_second(sweeper: Sweeper, clock: Clock) -> None:
    reports = _run(Patrol(sweeper, clock, lambda: clock.cpu), clock, 20 * PERIOD_S)
    assert len(reports) <= 21
    assert sweeper.looks == []


# urgent looks


def test_who_asks_is_looked_at_soon_and_nobody_else(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = list(range(1, 1001))
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 1.5 * PERIOD_S)
    sweeper.looks.clear()
    asked = clock.now
    for name in (7, 11, 7):
        made.ask(name)
    _run(made, clock, 0.1 * PERIOD_S)
    assert [(when, sorted(names)) for when, names in sweeper.looks] == [(asked + SOON_S, [7, 11])]


def test_bytes_that_still_wait_are_looked_at_until_they_do_not(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = [1, 2]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 1.5 * PERIOD_S)
    sweeper.looks.clear()
    begun = clock.now
    sweeper.again = {2}
    made.ask(2)
    _run(made, clock, 5.5 * SOON_S)
    assert _times(sweeper, 2) == pytest.approx([begun + n * SOON_S for n in range(1, 6)])
    sweeper.again = set()
    _run(made, clock, 5 * SOON_S)
    assert len(_times(sweeper, 2)) == 6
    assert _times(sweeper, 1) == []


def test_what_a_round_finds_is_looked_at_soon(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = [1, 2]
    sweeper.again = {1}
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    begun = clock.now
    _run(made, clock, 1.5 * SOON_S)
    assert _times(sweeper, 1) == pytest.approx([begun, begun + SOON_S])
    assert _times(sweeper, 2) == pytest.approx([begun])


def test_all_that_a_process_reads(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = list(range(1, 101))
    sweeper.readers[READER] = [3, 4]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 1.5 * PERIOD_S)
    sweeper.looks.clear()
    made.ask_for_readers(READER)
    _run(made, clock, 2 * SOON_S)
    assert [sorted(names) for _, names in sweeper.looks] == [[3, 4]]


def test_all_at_once(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = list(range(1, 10_001))
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 2.5 * PERIOD_S)
    sweeper.looks.clear()
    made.ask_for_all()
    assert made.deadline <= clock.now
    made.work()
    assert len(sweeper.looks[0][1]) == 10_000
    assert made.deadline > clock.now


def test_urgent_looks_leave_time_for_others(sweeper: Sweeper, clock: Clock) -> None:
    """Whatever asks, and however often: a fifth of a CPU."""
    sweeper.names = list(range(1, 20_001))
    sweeper.again = set(sweeper.names)
    sweeper.cost = 1e-6
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 5 * PERIOD_S)
    sweeper.looks.clear()
    begun = clock.now
    _run(made, clock, 10 * PERIOD_S)
    spent = sum(len(names) for _, names in sweeper.looks) * sweeper.cost
    # The rounds are not urgent.
    rounds = 10 * len(sweeper.names) * sweeper.cost
    assert (spent - rounds) / (clock.now - begun) < patrol.URGENT_SHARE * 1.05


def test_rescued_ends_are_reported(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names = [1]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 1.5 * PERIOD_S)
    sweeper.rescued = 2
    made.ask(1)
    clock.now += SOON_S
    assert made.work().rescued == 2


# the search


def test_the_first_round_searches_for_what_somebody_left(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names, sweeper.ends = [1], [(100, 1), (100, 1), (200, 2)]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    reports = _run(made, clock, 0.5 * PERIOD_S)
    assert [report.orphaned for report in reports if report.orphaned] == [{200}]


def test_without_orphans_it_does_not_search_again(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names, sweeper.ends = [1], [(100, 1), (200, 1)]
    _run(Patrol(sweeper, clock, lambda: clock.cpu), clock, 1000 * PERIOD_S)
    assert len(sweeper.searches) == 1


def test_it_searches_within_a_second_when_there_can_be_orphans(sweeper: Sweeper, clock: Clock) -> None:
    sweeper.names, sweeper.ends = [1], [(100, 1), (200, 1)]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 10.3 * PERIOD_S)
    for _ in range(3):
        sweeper.orphans -= 1  # any change will do
        changed = clock.now
        sweeper.ends = [(100, 1), (300, 3)]
        reports = _run(made, clock, 1.01 * PERIOD_S)
        assert {300} in [report.orphaned for report in reports]
        assert sweeper.searches[-1] - changed < PERIOD_S * 1.01
        sweeper.ends = [(100, 1), (200, 1)]


def test_an_orphan_that_cannot_be_taken_out_is_found_again_later_and_later(
    sweeper: Sweeper, clock: Clock
) -> None:
    sweeper.ends = [(100, 1)]
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    reports = _run(made, clock, 1000 * PERIOD_S)
    pauses = [b - a for a, b in pairwise(sweeper.searches)]
    assert pauses[0] == pytest.approx(PERIOD_S, abs=0.1)
    assert all(b >= a - 0.1 for a, b in pairwise(pauses))
    assert pauses[-1] == pytest.approx(patrol.SEARCH_PAUSE_MAX_S, abs=PERIOD_S)
    assert sum(bool(report.orphaned) for report in reports) == len(sweeper.searches)
    # Gone: nothing is left to look for.
    sweeper.ends = []
    _run(made, clock, 70 * PERIOD_S)
    searched = len(sweeper.searches)
    _run(made, clock, 1000 * PERIOD_S)
    assert len(sweeper.searches) == searched


def test_a_long_search_is_made_in_pieces_and_seldom(sweeper: Sweeper, clock: Clock) -> None:
    """It holds nobody up, and takes next to nothing though there is always a reason to search."""
    sweeper.names = list(range(1, 10_001))
    sweeper.ends = [(100, name) for name in sweeper.names] + [(200, name) for name in sweeper.names]
    sweeper.search_cost = 2e-6
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    begun = clock.now
    longest = 0.0
    while clock.now < begun + 100:
        sweeper.orphans += 1
        clock.now = max(clock.now, made.deadline)
        before = clock.now
        report = made.work()
        assert not report.orphaned
        longest = max(longest, clock.now - before)
    assert longest <= 1.1 * SEARCH_ENDS * sweeper.search_cost
    spent = len(sweeper.searches) * len(sweeper.ends) * sweeper.search_cost
    assert len(sweeper.searches) > 2
    assert spent / (clock.now - begun) < 1.3 * patrol.SEARCH_SHARE


def test_a_connection_that_is_adopted_during_the_search_is_no_orphan(
    sweeper: Sweeper, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper.names = [1]
    made = Patrol(sweeper, clock, lambda: clock.cpu)

    def walk() -> Iterator[tuple[int, int]]:
        sweeper.names.append(2)
        yield 100, 1
        yield 100, 2

    monkeypatch.setattr(sweeper, "walk_ends", walk)
    assert not any(report.orphaned for report in _run(made, clock, 0.5 * PERIOD_S))


def test_nothing_to_do_means_the_next_round(sweeper: Sweeper, clock: Clock) -> None:
    made = Patrol(sweeper, clock, lambda: clock.cpu)
    _run(made, clock, 0.5 * PERIOD_S)
    assert clock.now < made.deadline < math.inf
