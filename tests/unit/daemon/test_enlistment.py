# SPDX-License-Identifier: Apache-2.0
"""A pair is tried until it is in or there is no hope, and looked at when it is. All that keeps to a share of
a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from splicer.daemon.enlistment import (
    ENLIST_BURST_S,
    ENLIST_SHARE,
    FIRST_SHARE,
    LOOK_PAUSE_S,
    LOOKS,
    MOST_WAITING,
    STRICT_TRIES,
    TRY_FOR_S,
    TRY_PAUSE_MAX_S,
    TRY_PAUSE_S,
    Enlistment,
)
from splicer.kernel.enlist import EnlistRequest
from splicer.kernel.layout import (
    ANNOUNCED_BY_WALK,
    STATE_PAIRED,
    STATE_SPLICED,
    Direction,
    End,
    EnlistOutcome,
    EnlistTask,
    Event,
    EventType,
    Pair,
)
from splicer.model import REASON_NAMES

PENDING = REASON_NAMES.index("pending")
TRIES = (EnlistTask.TRY, EnlistTask.TRY_EASED)


class Kernel:
    """An enlist that answers as it is told, and writes down what it was asked; and what is called for."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.spent = 0.0
        self.cost = 0.0  # seconds that a call takes
        self.answer: Callable[[EnlistRequest], EnlistOutcome] = lambda _: EnlistOutcome.LATER
        self.asked: list[tuple[float, EnlistRequest]] = []
        self.calls = 0
        self.walked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.watched: list[int] = []
        self.broken = False
        # What find() knows, by name.
        self.pairs: dict[int, Pair] = {}

    def find(self, name: int) -> Pair | None:
        return self.pairs.get(name)

    def work(self, requests: Sequence[EnlistRequest]) -> list[EnlistOutcome]:
        if self.broken:
            raise OSError("not any more")
        self.calls += 1
        self.spent += self.cost
        self.now += self.cost
        self.asked += [(self.now, request) for request in requests]
        return [self.answer(request) for request in requests]

    def adopt(self, netns: Iterable[int], tgid: Iterable[int]) -> None:
        self.walked.append((tuple(netns), tuple(tgid)))

    def tasks(self, *wanted: EnlistTask) -> list[float]:
        return [when for when, request in self.asked if request.task in wanted]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def enlistment(kernel: Kernel) -> Enlistment:
    return Enlistment(
        kernel, kernel, kernel.watched.append, kernel.find, lambda: kernel.now, lambda: kernel.spent
    )


def announced(name: int = 1) -> Event:
    return Event(EventType.ADOPT, 0, name, (7, 8), (70, 80))


def run(enlistment: Enlistment, kernel: Kernel, until: float = math.inf) -> None:
    """Until there is nothing to do, or that moment."""
    for _ in range(10_000):
        due = enlistment.deadline
        if due > until or due == math.inf:
            return
        kernel.now = max(kernel.now, due)
        enlistment.work(kernel.now)
    raise AssertionError("it never ends")


def make_pair(name: int = 1, state: int = STATE_PAIRED, reason: int = PENDING, announced: int = 1) -> Pair:
    end = End("", "", 7, 0, 0, 70, 0)
    none = Direction(0, 0, 0)
    return Pair((name, 0), state, reason, end, replace(end, netns=8, tgid=80), 0, 0, announced, none, none)


def test_nothing_to_do(enlistment: Enlistment, kernel: Kernel) -> None:
    assert enlistment.deadline == math.inf
    enlistment.work(kernel.now)
    assert not kernel.calls


def test_tried_at_once(enlistment: Enlistment, kernel: Kernel) -> None:
    enlistment.receive(announced())
    assert enlistment.deadline <= kernel.now
    enlistment.work(kernel.now)
    assert kernel.asked == [(kernel.now, EnlistRequest(1, (7, 8), (70, 80), EnlistTask.TRY))]


def test_many_in_one_call(enlistment: Enlistment, kernel: Kernel) -> None:
    for name in range(50):
        enlistment.receive(announced(name))
    enlistment.work(kernel.now)
    assert (kernel.calls, [request.name for _, request in kernel.asked]) == (1, list(range(50)))


def test_tried_again_and_again_then_given_up(enlistment: Enlistment, kernel: Kernel) -> None:
    """Later and later, the first times strictly, and for a second."""
    begun = kernel.now
    enlistment.receive(announced())
    kernel.answer = lambda request: (
        EnlistOutcome.OVER if request.task == EnlistTask.GIVE_UP else EnlistOutcome.LATER
    )
    run(enlistment, kernel)
    times = kernel.tasks(*TRIES)
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(TRY_PAUSE_S)
    assert pauses[-1] == pytest.approx(TRY_PAUSE_MAX_S)
    assert times[-1] - begun == pytest.approx(TRY_FOR_S, abs=2 * TRY_PAUSE_MAX_S)
    assert len(kernel.tasks(EnlistTask.TRY)) == STRICT_TRIES
    assert [request.task for _, request in kernel.asked[STRICT_TRIES:-1]] == (
        [EnlistTask.TRY_EASED] * (len(kernel.asked) - STRICT_TRIES - 1)
    )
    assert kernel.asked[-1][1].task == EnlistTask.GIVE_UP
    assert (kernel.walked, kernel.watched) == ([], [])


def test_looked_at_when_it_is_in(enlistment: Enlistment, kernel: Kernel) -> None:
    """After a millisecond and another one; and watch looks at it too."""
    answers = {
        EnlistTask.TRY: [EnlistOutcome.IN],
        EnlistTask.LOOK: [EnlistOutcome.LATER, EnlistOutcome.OVER],
    }
    kernel.answer = lambda request: answers[request.task].pop(0)
    enlistment.receive(announced())
    run(enlistment, kernel)
    begun, *looks = (when for when, _ in kernel.asked)
    assert [look - begun for look in looks] == pytest.approx([LOOK_PAUSE_S, 2 * LOOK_PAUSE_S])
    assert kernel.watched == [1]


def test_looks_end(enlistment: Enlistment, kernel: Kernel) -> None:
    """Whoever is always in a system call is left to watch."""
    kernel.answer = lambda request: (
        EnlistOutcome.IN if request.task == EnlistTask.TRY else EnlistOutcome.LATER
    )
    enlistment.receive(announced())
    run(enlistment, kernel)
    assert len(kernel.tasks(EnlistTask.LOOK)) == LOOKS
    assert kernel.watched == [1]


def test_left_to_the_walk(enlistment: Enlistment, kernel: Kernel) -> None:
    kernel.answer = lambda _: EnlistOutcome.WALK
    enlistment.receive(announced())
    run(enlistment, kernel)
    assert kernel.walked == [((7, 8), (70, 80))]
    assert kernel.calls == 1


def test_over_at_once(enlistment: Enlistment, kernel: Kernel) -> None:
    kernel.answer = lambda _: EnlistOutcome.OVER
    enlistment.receive(announced())
    run(enlistment, kernel)
    assert (kernel.calls, kernel.walked, kernel.watched) == (1, [], [])


def test_share_of_a_cpu(enlistment: Enlistment, kernel: Kernel) -> None:
    """What a crowd of pairs that never rest may cost, a burst at the start aside."""
    kernel.cost = 0.004
    begun = kernel.now
    for name in range(1000):
        enlistment.receive(announced(name))
    run(enlistment, kernel, begun + 10)
    # The first try is not one in vain yet.
    allowed = ENLIST_SHARE * (kernel.now - begun) + ENLIST_BURST_S + 2 * kernel.cost
    assert ENLIST_SHARE * 5 <= kernel.spent <= allowed


def test_what_each_pair_takes_once_has_a_share_of_its_own(enlistment: Enlistment, kernel: Kernel) -> None:
    """A crowd that is hot all at once is in soon: first tries, and looks, are not what keeps on costing."""
    kernel.cost = 0.004
    kernel.answer = lambda request: EnlistOutcome.IN if request.task == EnlistTask.TRY else EnlistOutcome.OVER
    begun = kernel.now
    for name in range(3 * MOST_WAITING):
        kernel.pairs[name] = make_pair(name)
        enlistment.receive(announced(name))
        if name % 100 == 0:
            enlistment.work(kernel.now)
    run(enlistment, kernel)
    assert sorted(kernel.watched) == list(range(3 * MOST_WAITING))
    lasted = kernel.now - begun
    share = kernel.spent / lasted
    assert 3 * ENLIST_SHARE < share <= FIRST_SHARE + ENLIST_BURST_S / ENLIST_SHARE / lasted


def test_more_than_may_wait(enlistment: Enlistment, kernel: Kernel) -> None:
    """Of further ones no more is kept than a name: they come later, in order, and only if they still wait."""
    number = 3 * MOST_WAITING
    kernel.pairs = {name: make_pair(name) for name in range(number)}
    kernel.answer = lambda _: EnlistOutcome.OVER
    for name in range(number):
        enlistment.receive(announced(name))
    assert len(enlistment) == number
    gone, plain = MOST_WAITING + 5, MOST_WAITING + 7
    del kernel.pairs[gone]
    kernel.pairs[plain] = make_pair(plain, announced=0)
    enlistment.work(kernel.now)
    assert len(kernel.asked) == MOST_WAITING
    run(enlistment, kernel)
    names = [request.name for _, request in kernel.asked]
    assert names == [name for name in range(number) if name not in (gone, plain)]
    assert len(enlistment) == 0


def test_the_backlog_is_left_to_the_walks_as_well(enlistment: Enlistment, kernel: Kernel) -> None:
    kernel.pairs = {name: make_pair(name) for name in range(MOST_WAITING + 2)}
    for name in range(MOST_WAITING + 2):
        enlistment.receive(announced(name))
    enlistment.give_up()
    assert len(kernel.walked) == MOST_WAITING + 2
    assert enlistment.deadline == math.inf


def test_looks_before_tries(enlistment: Enlistment, kernel: Kernel) -> None:
    kernel.answer = lambda request: EnlistOutcome.IN if request.name == 1 else EnlistOutcome.LATER
    enlistment.receive(announced(1))
    enlistment.work(kernel.now)
    enlistment.receive(announced(2))
    kernel.now += 2 * LOOK_PAUSE_S
    enlistment.work(kernel.now)
    assert [(request.name, request.task) for _, request in kernel.asked[1:]] == [
        (1, EnlistTask.LOOK),
        (2, EnlistTask.TRY),
    ]


def test_pairs_of_the_daemon_before(enlistment: Enlistment, kernel: Kernel) -> None:
    enlistment.take_over(
        [
            make_pair(1),
            make_pair(2, announced=0),
            make_pair(3, reason=0),
            make_pair(4, state=STATE_SPLICED),
        ]
    )
    enlistment.work(kernel.now)
    assert [request.name for _, request in kernel.asked] == [1]


def test_no_enlist(kernel: Kernel) -> None:
    enlistment = Enlistment(None, kernel, kernel.watched.append, kernel.find, lambda: kernel.now)
    enlistment.receive(announced())
    assert kernel.walked == [((7, 8), (70, 80))]
    assert enlistment.deadline == math.inf


def test_enlist_that_cannot_be_run_any_more(enlistment: Enlistment, kernel: Kernel) -> None:
    """Nothing is lost: what waits, and what comes later, is walked for."""
    enlistment.receive(announced())
    kernel.broken = True
    with pytest.raises(OSError, match="not any more"):
        enlistment.work(kernel.now)
    enlistment.give_up()
    enlistment.receive(announced(2))
    assert kernel.walked == [((7, 8), (70, 80))] * 2
    assert enlistment.deadline == math.inf


def test_pairs_that_a_walk_has_to_put_in_stay_its_own(enlistment: Enlistment, kernel: Kernel) -> None:
    """enlist found no way to their sockets, and would find none now."""
    enlistment.take_over([make_pair(1, announced=ANNOUNCED_BY_WALK)])
    enlistment.work(kernel.now)
    assert not kernel.calls
