# SPDX-License-Identifier: Apache-2.0
"""Whom the engine is asked about, in which order and how often; without an engine, or threads."""

from __future__ import annotations

import math
from typing import cast

import pytest

from splicer.containers.engine import Engine, EngineError, InspectedContainer, ListedContainer
from splicer.containers.inventory import Hint, Hints
from splicer.containers.reconciler import _ATTEMPTS, _BATCH, InventoryReconciler
from splicer.host.scopes import Scopes
from splicer.model import Container

from ..conftest import Log

PAUSE = 0.25


class Answers:
    """An engine with containers of some pid each, that writes down who was asked about."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.failing: dict[str, str] = {}
        self.asked: list[str] = []

    def list_running(self) -> tuple[ListedContainer, ...]:
        return tuple(ListedContainer(each, 0) for each in self.pids)

    def inspect(self, identifier: str) -> InspectedContainer | None:
        self.asked.append(identifier)
        if identifier in self.failing:
            raise EngineError(self.failing[identifier], "no")  # type: ignore[arg-type]
        pid = self.pids.get(identifier)
        return None if pid is None else InspectedContainer(identifier, identifier, "", {}, pid, "bridge", ())


class Bench:
    def __init__(self) -> None:
        self.answers = Answers()
        self.engine = cast(Engine, self.answers)
        self.incomplete: set[str] = set()
        self.now = 1000.0
        self.reconciler = InventoryReconciler(
            Scopes("/nowhere"), Log(), PAUSE, self.locate, self.is_current, lambda: self.now
        )

    def is_current(self, container: Container) -> bool:
        return container.pid == self.pid(container.id)

    def pid(self, identifier: str) -> int:
        return self.answers.pids.get(identifier, 0)

    def locate(self, found: InspectedContainer, _scopes: Scopes) -> Container:
        netns = 0 if found.id in self.incomplete else 1
        return Container(found.id, found.name, "", {}, found.pid, cgroup_id=1, netns=netns)

    def turn(self, **dirty: Hint) -> list[str]:
        """Who is asked about in one round."""
        self.answers.asked.clear()
        self.reconciler.queue(Hints(dirty))
        self.reconciler.inspect(self.engine)
        return list(self.answers.asked)

    def sync(self, *identifiers: str) -> None:
        """Begin with these containers, all of them known."""
        self.answers.pids = {each: 100 + number for number, each in enumerate(identifiers)}
        assert self.reconciler.compare(self.engine) == len(identifiers)
        self.turn()
        assert not self.reconciler.is_behind


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_long_list_is_inspected_in_parts_and_hints_come_first(bench: Bench) -> None:
    bench.answers.pids = {f"c{number:02}": number + 1 for number in range(3 * _BATCH)}
    bench.reconciler.compare(bench.engine)
    names = list(bench.answers.pids)
    assert bench.turn() == names[:_BATCH]
    last = names[-1]
    assert bench.turn(**{last: Hint.STARTED}) == [last, *names[_BATCH : 2 * _BATCH - 1]]
    assert bench.reconciler.is_behind
    assert bench.turn() == names[2 * _BATCH - 1 : -1]
    assert not bench.reconciler.is_behind
    assert set(bench.reconciler.inventory) == set(names)


def test_the_list_brings_up_what_changed_only(bench: Bench) -> None:
    bench.sync("a", "b", "c")
    before = bench.reconciler.inventory
    bench.reconciler.compare(bench.engine)
    assert bench.turn() == []
    assert bench.reconciler.inventory is before
    bench.answers.pids = {"b": 999, "c": bench.pid("c"), "d": 5}
    bench.reconciler.compare(bench.engine)
    assert set(bench.reconciler.inventory) == {"b", "c"}
    assert bench.turn() == ["b", "d"]
    assert {each.id: each.pid for each in bench.reconciler.inventory.values()} == bench.answers.pids


def test_a_hint_that_came_before_the_list_is_kept(bench: Bench) -> None:
    bench.sync("a")
    bench.reconciler.queue(Hints({"a": Hint.STARTED}))
    bench.reconciler.compare(bench.engine)
    assert bench.turn() == ["a"]
    assert bench.turn() == []
    bench.reconciler.compare(bench.engine)
    assert bench.turn() == ["a"], "what was known was older than the hint"


@pytest.mark.parametrize("reason", ["incomplete", "failing"])
def test_one_that_is_not_all_there_is_asked_about_again_a_few_times(bench: Bench, reason: str) -> None:
    bench.sync("a", "b")
    if reason == "failing":
        bench.answers.failing["a"] = "failed"
    bench.incomplete.add("a")
    assert bench.turn(a=Hint.STARTED) == ["a"]
    assert "a" in bench.reconciler.inventory
    for attempt in range(1, _ATTEMPTS + 1):
        assert bench.reconciler.retry_at == bench.now + PAUSE * 2**attempt
        assert bench.turn() == []
        bench.now = bench.reconciler.retry_at
        assert bench.turn() == ["a"]
    assert bench.reconciler.retry_at == math.inf
    bench.incomplete.clear()
    bench.answers.failing.clear()
    assert bench.turn(a=Hint.STARTED) == ["a"]
    assert bench.reconciler.inventory["a"].netns


def test_an_engine_in_trouble_ends_the_round_and_changes_nothing(bench: Bench) -> None:
    bench.sync("a", "b")
    before = bench.reconciler.inventory
    bench.answers.pids["a"] = 999
    bench.answers.failing["b"] = "lost"
    with pytest.raises(EngineError):
        bench.turn(a=Hint.STARTED, b=Hint.STARTED)
    assert bench.reconciler.inventory is before
    bench.answers.failing.clear()
    bench.reconciler.begin_anew()
    bench.reconciler.compare(bench.engine)
    assert bench.turn() == ["a", "b"], "neither is known any more as it was"
