# SPDX-License-Identifier: Apache-2.0
"""When leases end, whose are renewed, and that it takes no more than it may."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from splicer.daemon.lease import RENEW_SHARE, RENEWALS, LeaseKeeper
from splicer.daemon.patrol import PERIOD_S
from splicer.host.keepalive import Probe
from splicer.kernel.layout import End
from splicer.kernel.sweep import Caller

NETNS, PID = 7, 4711
LEASE = 20.0


@dataclass
class Log:
    warnings: list[str] = field(default_factory=list)

    def warning(self, event: str, **_keys: object) -> None:
        self.warnings.append(event)


class World:
    """A clock, pairs that talk or do not, and what was sent for whom at what time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.talkers: set[int] = set()
        self.gone: set[int] = set()
        self.paths: dict[int, str] = {NETNS: "path"}
        self.cost = 0.0
        self.asked: list[int] = []
        self.renewed: list[tuple[float, int]] = []
        self.sends: list[tuple[str, int, int]] = []
        self.may_send = True
        self.log = Log()

    def __call__(self) -> float:
        return self.now

    def find_talkers(self, names: Sequence[int]) -> list[int]:
        self.asked += names
        return [name for name in names if name in self.talkers]

    def read_caller(self, name: int) -> Caller | None:
        if name in self.gone:
            return None
        end = End("10.0.0.1:4000", "10.0.0.2:80", NETNS + name % 2 * (len(self.paths) - 1), 0, 0, PID, 0)
        return Caller(end, name, 5, 3, 9)

    def find(self, cookie: int, pids: Iterable[int] = ()) -> str | None:
        assert set(pids) == {PID}
        return self.paths.get(cookie)

    def send(self, path: str, netns: int, probes: Iterable[Probe]) -> int:
        probes = list(probes)
        self.renewed += [(self.now, probe.sent) for probe in probes]
        self.sends.append((path, netns, len(probes)))
        self.now += self.cost * len(probes)
        return len(probes)

    def keeper(self, lease: float = LEASE) -> LeaseKeeper:
        return LeaseKeeper(
            lease,
            self,
            self,
            self.log,
            self,
            self.send,
            lambda: self.may_send,  # type: ignore[arg-type]
        )

    def times(self, name: int) -> list[float]:
        return [when for when, other in self.renewed if other == name]


@pytest.fixture
def world() -> World:
    return World()


def _go_round(world: World, keeper: LeaseKeeper, names: list[int], rounds: int, steps: int = 3) -> None:
    """So many rounds of a patrol, each late by a little, in steps that take part of its time."""
    chance = random.Random(1)
    size = -(-len(names) // steps)
    for _ in range(rounds):
        begun = world.now
        for step in range(steps):
            keeper.receive(names[step * size : (step + 1) * size], begun, ())
            while keeper.deadline <= world.now:
                keeper.work()
            world.now = max(world.now, begun + (step + 1) * 0.1)
        end = begun + PERIOD_S + chance.random() * 0.2
        while keeper.deadline < end:
            world.now = max(world.now, keeper.deadline)
            keeper.work()
        world.now = max(world.now, end)


def test_who_talks_is_renewed_within_each_lease(world: World) -> None:
    names = [random.Random(7).getrandbits(64) + n for n in range(100)]
    world.talkers = set(names)
    begun = world.now
    _go_round(world, world.keeper(), names, 100)
    for name in names:
        times = [begun, *world.times(name), world.now]
        assert all(after - before <= LEASE for before, after in pairwise(times))
        assert all(after - before > LEASE - 4 * PERIOD_S for before, after in pairwise(times[1:-1]))


def test_leases_are_spread(world: World) -> None:
    """Of many that were spliced at once each second's share is renewed each second."""
    names = [random.Random(n).getrandbits(64) for n in range(2000)]
    world.talkers = set(names)
    _go_round(world, world.keeper(), names, 18)
    seconds = [int(when) for when, _ in world.renewed]
    assert len(set(world.renewed)) >= len(names)
    assert max(seconds.count(second) for second in set(seconds)) < 3 * len(names) / LEASE


def test_who_is_silent_is_asked_about_and_no_more(world: World) -> None:
    _go_round(world, world.keeper(), [1, 2, 3], 40)
    assert set(world.asked) == {1, 2, 3}
    assert len(world.asked) < 3 * 4
    assert world.renewed == []


def test_who_begins_to_talk_is_renewed_at_once(world: World) -> None:
    keeper = world.keeper()
    keeper.receive((), None, {5})
    assert keeper.deadline <= world.now
    keeper.work()
    assert world.renewed == [(world.now, 5)]
    assert world.sends == [("path", NETNS, 1)]
    assert keeper.describe() == {"state": "kept", "seconds": LEASE, "renewed": 1, "failed": 0}


def test_what_looks_say_between_rounds_moves_no_round(world: World) -> None:
    keeper = world.keeper()
    keeper.receive([1], world.now, ())
    for _ in range(100):
        keeper.receive((), None, ())
    world.now += PERIOD_S
    keeper.receive(list(range(1000)), world.now, ())
    assert len(world.asked) < 3 * 1000 / LEASE


@pytest.mark.parametrize("lease", [0.1, 1.0, 3.0])
def test_short_leases_end_in_each_round(world: World, lease: float) -> None:
    world.talkers = {1, 2}
    _go_round(world, world.keeper(lease), [1, 2], 10)
    assert [len(world.times(name)) for name in (1, 2)] == [10, 10]


def test_zero_is_never(world: World) -> None:
    world.talkers = {1, 2}
    keeper = world.keeper(0)
    keeper.receive((), None, {1})
    _go_round(world, keeper, [1, 2], 50)
    assert (world.asked, world.renewed) == ([], [])
    assert keeper.describe()["state"] == "off"
    keeper.lease = LEASE
    _go_round(world, keeper, [1, 2], 50)
    assert world.renewed


def test_rounds_that_take_long_leave_nobody_out(world: World) -> None:
    names = list(range(100))
    world.talkers = set(names)
    keeper = world.keeper()
    for _ in range(20):
        keeper.receive(names, world.now, ())
        while keeper.deadline <= world.now + 7:
            world.now = max(world.now, keeper.deadline)
            keeper.work()
        world.now += 7
    for name in names:
        assert all(after - before <= LEASE + 7 for before, after in pairwise(world.times(name)))


def test_it_keeps_to_its_share(world: World) -> None:
    world.talkers = set(range(1000))
    world.cost = 0.0005
    keeper = world.keeper()
    keeper.receive((), None, world.talkers)
    begun = world.now
    while keeper.deadline < begun + 60:
        world.now = max(world.now, keeper.deadline)
        before = len(world.renewed)
        keeper.work()
        assert len(world.renewed) - before <= RENEWALS
    assert len(world.renewed) == 1000
    assert world.now - begun > 0.8 * 1000 * world.cost / RENEW_SHARE


def test_each_namespace_is_entered_once(world: World) -> None:
    world.paths = {NETNS: "even", NETNS + 1: "odd"}
    keeper = world.keeper()
    keeper.receive((), None, range(10))
    keeper.work()
    assert sorted(world.sends) == [("even", NETNS, 5), ("odd", NETNS + 1, 5)]


def test_who_cannot_be_reached_is_counted(world: World) -> None:
    world.paths = {NETNS: "even", NETNS + 99: "of somebody else"}
    world.gone = {2}
    keeper = world.keeper()
    keeper.receive((), None, range(4))
    keeper.work()
    assert [name for _, name in world.renewed] == [0]
    assert keeper.describe() == {"state": "kept", "seconds": LEASE, "renewed": 1, "failed": 2}


def test_without_the_capability_it_is_said_once(world: World) -> None:
    world.may_send = False
    world.talkers = {1, 2}
    keeper = world.keeper()
    _go_round(world, keeper, [1, 2], 100)
    assert world.log.warnings == ["leases_not_kept"]
    assert world.renewed == []
    assert keeper.describe()["state"] == "forbidden"
