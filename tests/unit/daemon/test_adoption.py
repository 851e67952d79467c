# SPDX-License-Identifier: Apache-2.0
"""Namespaces stay queued until nothing waits in them, and sweeps keep to their share of a CPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest

from splicer.daemon.adoption import (
    ADOPT_BEGINNINGS,
    ADOPT_PAUSE_MAX_S,
    ADOPT_PAUSE_S,
    ADOPT_SHARE,
    ADOPT_TURNS,
    DRAIN_PAUSE_MAX_S,
    DRAIN_PAUSE_S,
    SweepQueues,
)
from splicer.kernel.layout import (
    ANNOUNCED_BY_WALK,
    STATE_PAIRED,
    STATE_SPLICED,
    Direction,
    End,
    Event,
    EventType,
    Pair,
)
from splicer.kernel.sweep import SweepCounts
from splicer.model import REASON_NAMES, STATES

DRAINING = next(number for number, name in STATES.items() if name == "draining")
PENDING = REASON_NAMES.index("pending")


class Sweeper:
    """A sweeper that is told what its sweeps find, and writes down when they were made and where."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.cost = 0.0  # seconds that a sweep takes
        self.counts = SweepCounts()
        self.sweeps: list[tuple[float, dict[int, set[int]]]] = []
        self.written: list[tuple[int, dict[str, bool]]] = []  # after so many sweeps

    @property
    def settings(self) -> Sweeper:
        return self

    def clock(self) -> float:
        return self.now

    def write(self, **changes: bool) -> None:
        self.written.append((len(self.sweeps), changes))

    def sweep(self, namespaces: Mapping[int, Iterable[int]]) -> SweepCounts:
        self.sweeps.append((self.now, {cookie: set(pids) for cookie, pids in namespaces.items()}))
        self.now += self.cost
        return self.counts

    @property
    def times(self) -> list[float]:
        return [when for when, _ in self.sweeps]


@pytest.fixture
def sweeper() -> Sweeper:
    return Sweeper()


@pytest.fixture
def queues(sweeper: Sweeper) -> SweepQueues:
    return SweepQueues(sweeper, sweeper.clock)


def event(kind: EventType, netns: tuple[int, int] = (7, 8), tgid: tuple[int, int] = (70, 80)) -> Event:
    return Event(kind, 0, 1, netns, tgid)


def tell(queues: SweepQueues, told: Event) -> None:
    """What the loop does with an event; a pair that can be adopted is one that is not found by name."""
    if told.type == EventType.ADOPT:
        queues.adopt(told.netns, told.tgid)
    else:
        queues.receive(told)


def run(queues: SweepQueues, sweeper: Sweeper, seconds: float) -> None:
    """Work whenever something is due, for so long."""
    end = sweeper.now + seconds
    while queues.deadline < end:
        sweeper.now = max(sweeper.now, queues.deadline)
        queues.work(sweeper.now)
    sweeper.now = max(sweeper.now, end)


def test_nothing_to_do(queues: SweepQueues, sweeper: Sweeper) -> None:
    assert queues.deadline == math.inf
    queues.work(sweeper.now)
    assert sweeper.sweeps == []


@pytest.mark.parametrize(
    ("kind", "waits"),
    [(EventType.ADOPT, SweepCounts(to_adopt=1)), (EventType.DRAIN, SweepCounts(to_drain=1))],
)
def test_a_namespace_is_swept_until_nothing_waits_in_it(
    queues: SweepQueues, sweeper: Sweeper, kind: EventType, waits: SweepCounts
) -> None:
    tell(queues, event(kind, (7, 8), (70, 0)))
    tell(queues, event(kind, (7, 9), (71, 90)))
    for counts in (waits, SweepCounts(held=1)):
        sweeper.counts = counts
        before = len(sweeper.sweeps)
        run(queues, sweeper, 1.0)
        assert len(sweeper.sweeps) > before + 1
        everybody = {70, 71, 90}
        assert sweeper.sweeps[-1][1] == {7: everybody, 8: {70}, 9: {71, 90}}
        assert queues.deadline < math.inf
    sweeper.counts = SweepCounts()
    run(queues, sweeper, 1.0)
    assert queues.deadline == math.inf
    before = len(sweeper.sweeps)
    run(queues, sweeper, 10.0)
    assert len(sweeper.sweeps) == before


def test_what_comes_during_the_pause_is_not_lost(queues: SweepQueues, sweeper: Sweeper) -> None:
    sweeper.cost = 0.001
    tell(queues, event(EventType.ADOPT, (7, 7)))
    queues.work(sweeper.now)
    tell(queues, event(EventType.ADOPT, (9, 9)))
    assert sweeper.now < queues.deadline < sweeper.now + 1.0
    sweeper.now = queues.deadline
    queues.work(sweeper.now)
    assert sweeper.sweeps[-2][1] == {9: {70, 80}}


@pytest.mark.parametrize("kind", [EventType.ADOPT, EventType.DRAIN])
def test_nothing_is_swept_before_it_is_due(queues: SweepQueues, sweeper: Sweeper, kind: EventType) -> None:
    sweeper.counts = SweepCounts(to_adopt=1, to_drain=1)
    tell(queues, event(kind))
    queues.work(sweeper.now)
    before = len(sweeper.sweeps)
    queues.work(sweeper.now)
    assert len(sweeper.sweeps) == before


def test_draining_comes_first(queues: SweepQueues, sweeper: Sweeper) -> None:
    tell(queues, event(EventType.ADOPT, (1, 1)))
    tell(queues, event(EventType.DRAIN, (2, 2)))
    queues.work(sweeper.now)
    assert [set(where) for _, where in sweeper.sweeps] == [{2}, {1}, set()]


def test_draining_waits_longer_and_longer_until_somebody_is_in_a_hurry(
    queues: SweepQueues, sweeper: Sweeper
) -> None:
    sweeper.counts = SweepCounts(to_drain=1)
    tell(queues, event(EventType.DRAIN))
    run(queues, sweeper, 3.0)
    pauses = [after - before for before, after in pairwise(sweeper.times)]
    assert pauses[0] == pytest.approx(DRAIN_PAUSE_S)
    for before, after in pairwise(pauses):
        assert after == pytest.approx(min(2 * before, DRAIN_PAUSE_MAX_S))
    for hurry in (lambda: tell(queues, event(EventType.DRAIN)), lambda: queues.drain(9)):
        hurry()
        assert queues.deadline <= sweeper.now + DRAIN_PAUSE_S
        before = len(sweeper.sweeps)
        run(queues, sweeper, 1.0)
        first, second, third = sweeper.times[before : before + 3]
        assert (second - first, third - second) == pytest.approx((DRAIN_PAUSE_S, 2 * DRAIN_PAUSE_S))
    assert sweeper.sweeps[-1][1] == {7: {70, 80}, 8: {70, 80}, 9: set()}


@pytest.mark.parametrize("cost", [0.0, 0.0002, 0.002])
def test_adoption_keeps_to_its_share(queues: SweepQueues, sweeper: Sweeper, cost: float) -> None:
    sweeper.cost, sweeper.counts = cost, SweepCounts(to_adopt=1)
    tell(queues, event(EventType.ADOPT))
    run(queues, sweeper, 10.0)
    # A second turn says that nobody is left alone; none is longer away than the longest pause.
    assert len(sweeper.sweeps) * cost <= 1.05 * ADOPT_SHARE * 10.0
    gaps = [after - before for before, after in pairwise(sweeper.times[::2])]
    assert min(gaps) + 1e-9 >= ADOPT_PAUSE_S
    assert max(gaps) <= ADOPT_PAUSE_MAX_S + 2 * cost + 1e-9


def test_no_end_is_left_alone_during_a_pause(queues: SweepQueues, sweeper: Sweeper) -> None:
    sweeper.counts = SweepCounts(to_adopt=1, half=1)
    tell(queues, event(EventType.ADOPT))
    queues.work(sweeper.now)
    assert len(sweeper.sweeps) == ADOPT_TURNS
    assert sweeper.written == [
        (ADOPT_BEGINNINGS, {"finishing": True}),
        (ADOPT_TURNS, {"finishing": False}),
    ]
    sweeper.counts, sweeper.written = SweepCounts(to_adopt=1), []
    run(queues, sweeper, 1.0)
    assert sweeper.written == []


def test_what_an_earlier_daemon_left(queues: SweepQueues, sweeper: Sweeper) -> None:
    end = End("", "", netns=1, cgroup=0, reads=0, tgid=10, flags=0)
    none = Direction(0, 0, 0)
    pending = Pair((1, 1), STATE_PAIRED, PENDING, end, end, 0, 0, ANNOUNCED_BY_WALK, none, none)
    for pair, adopted, drained in (
        (pending, True, False),
        (replace(pending, announced=0), False, False),
        (replace(pending, announced=1), False, False),  # enlist's
        (replace(pending, reason=PENDING - 1), False, False),
        (replace(pending, state=STATE_SPLICED), False, False),
        (replace(pending, state=DRAINING), False, True),
    ):
        sweeper.sweeps.clear()
        queues.take_over([pair])
        assert (queues.deadline < math.inf) == (adopted or drained)
        run(queues, sweeper, 1.0)
        # A sweep for adoption has a second turn.
        assert [where for _, where in sweeper.sweeps] == (
            [{1: {10}}, {}] if adopted else [{1: {10}}] if drained else []
        )
