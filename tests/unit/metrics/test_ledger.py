# SPDX-License-Identifier: Apache-2.0
"""Sums are right and never go back: played against a kernel that forgets, while a look takes its time."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from splicer.metrics import store
from splicer.metrics.ledger import NAME_PATIENCE_S, Ledger
from splicer.metrics.services import Services
from splicer.model import Owner


def make() -> tuple[Ledger, Services]:
    services = Services(lambda cgroup: Owner(container=f"c{cgroup % 7}"))
    return Ledger(services), services


class Kernel:
    """Connections of cgroups, an LRU map of what is closed, and the exact total."""

    def __init__(self, seed: int, room: int) -> None:
        self.random = random.Random(seed)
        self.room = room
        self.closed: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        self.open: list[list[int]] = []
        self.total = 0

    def work(self) -> None:
        for _ in range(self.random.randrange(4)):
            self.open.append([self.random.randrange(9), self.random.randrange(9), 0])
        for connection in self.open:
            size = self.random.randrange(1000)
            connection[2] += size
            self.total += size
        self.random.shuffle(self.open)
        for _ in range(min(len(self.open), self.random.randrange(4))):
            self.close()

    def close(self) -> None:
        client, server, size = self.open.pop()
        key = client, server, self.random.randrange(2)
        self.closed[key] = self.closed.pop(key, 0) + size
        while len(self.closed) > self.room:
            self.closed.popitem(last=False)

    def look(self, ledger: Ledger, during: Any = lambda: None) -> None:
        total = self.total
        rows = dict(self.closed)
        during()
        passing: dict[tuple[int, int], int] = {}
        for client, server, size in self.open:
            passing[client, server] = passing.get((client, server), 0) + size
        ledger.update(rows, passing, total)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("room", [1000, 6])
def test_sums_against_a_kernel_that_forgets(seed: int, room: int) -> None:
    ledger, _ = make()
    kernel = Kernel(seed, room)
    before: dict[Any, int] = {}
    for step in range(120):
        kernel.work()
        # Now and then one closes between the two halves of a look.
        kernel.look(ledger, kernel.close if kernel.open and step % 5 == 0 else lambda: None)
        assert all(ledger.sums[pair] >= value for pair, value in before.items()), "a sum went back"
        assert sum(ledger.sums.values()) <= kernel.total, "something counts twice"
        before = dict(ledger.sums)
    for _ in range(3):
        kernel.look(ledger)
    assert sum(ledger.sums.values()) == kernel.total


def test_what_is_forgotten_unseen_is_the_others() -> None:
    ledger, _ = make()
    for _ in range(3):
        ledger.update({(1, 2, 0): 10}, {}, 15)
    assert ledger.sums == {("c1", "c2"): 10, ("other", "other"): 5}


def test_a_row_that_was_forgotten_and_begun_anew() -> None:
    ledger, _ = make()
    ledger.update({(1, 2, 0): 100}, {}, 100)
    ledger.update({(1, 2, 0): 30}, {}, 130)
    assert ledger.sums == {("c1", "c2"): 130}


def test_what_a_look_missed_is_not_the_others() -> None:
    """It was open, closed during the look, and is found by the next one."""
    ledger, _ = make()
    ledger.update({}, {(1, 2): 100}, 100)
    for _ in range(5):
        ledger.update({}, {}, 200)
        ledger.update({(1, 2, 0): 200}, {}, 200)
        assert ledger.sums == {("c1", "c2"): 200}


def make_nameless() -> tuple[Ledger, dict[int, Owner], list[float]]:
    """With names that come later, and a clock."""
    owners: dict[int, Owner] = {}
    now = [0.0]
    services = Services(lambda cgroup: owners.get(cgroup, Owner()))
    return Ledger(services, lambda: now[0]), owners, now


def test_a_name_that_comes_a_moment_later() -> None:
    """What waits for it is nobody's yet, and not the others' either."""
    ledger, owners, now = make_nameless()
    owners[1] = Owner(container="c1")
    for _ in range(5):
        ledger.update({}, {(1, 2): 100}, 100)
        assert not ledger.sums
    now[0] += NAME_PATIENCE_S / 2
    owners[2] = Owner(container="late")
    ledger.update({}, {(1, 2): 150}, 150)
    assert ledger.sums == {("c1", "late"): 150}


def test_a_name_that_never_comes() -> None:
    ledger, _, now = make_nameless()
    ledger.update({}, {(1, 2): 100, (0, 0): 7}, 107)
    assert ledger.sums == {("unknown", "unknown"): 7}, "nobody will tell of cgroup 0"
    now[0] += NAME_PATIENCE_S
    ledger.update({}, {(1, 2): 100, (0, 0): 7}, 107)
    assert ledger.sums == {("unknown", "unknown"): 107}


def test_forgotten_before_it_had_a_name() -> None:
    ledger, _, _ = make_nameless()
    ledger.update({(1, 2, 0): 100}, {}, 100)
    for _ in range(4):
        ledger.update({}, {}, 100)
    assert ledger.sums == {("unknown", "unknown"): 100}


def test_nothing_is_kept_of_those_that_are_gone() -> None:
    ledger, _ = make()
    for number in range(1, 2000):
        ledger.update({}, {(number, number): 5}, 5 * number)
    document = ledger.to_json()
    assert len(document["seen"]) <= 3 and len(document["closed"]) <= 3 and not document["rows"]
    assert sum(ledger.sums.values()) == 5 * 1999 and len(ledger.sums) <= 8


def test_the_next_daemon_goes_on(tmp_path: Path) -> None:
    ledger, _ = make()
    kernel = Kernel(1, 6)
    for _ in range(30):
        kernel.work()
        kernel.look(ledger)
    store.save(str(tmp_path), "these", {"x": ledger})
    fresh, services = make()
    assert store.load(str(tmp_path), "these", {"x": fresh}, services)
    before = dict(ledger.sums)
    assert fresh.sums == before
    kernel.look(fresh)
    assert fresh.sums == before
    kernel.work()
    for _ in range(3):
        kernel.look(fresh)
    assert sum(fresh.sums.values()) == kernel.total


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"schema": 1}', '{"schema": 2, "programs": "these", "ledgers": {}}'),
        '{"schema": 1, "programs": "these", "ledgers": {"x": {"sums": 3}}}',
        '{"schema": 1, "programs": "these", "ledgers": {"x": {"sums": [["a", 1]], "rows": [], "closed": [],'
        ' "seen": []}}}',
        '{"schema": 1, "programs": "these", "ledgers": {"x": {"sums": [], "rows": [["a", "b", 1]],'
        ' "closed": [], "seen": []}}}',
    ],
)
def test_a_file_that_is_damaged_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / store.FILE_NAME).write_text(text)
    ledger, services = make()
    assert not store.load(str(tmp_path), "these", {"x": ledger}, services)
    assert not ledger.sums


def test_a_file_of_other_programs_is_as_none(tmp_path: Path) -> None:
    ledger, services = make()
    ledger.update({(1, 2, 0): 10}, {}, 10)
    store.save(str(tmp_path), "these", {"x": ledger})
    assert json.loads((tmp_path / store.FILE_NAME).read_text())["programs"] == "these"
    assert (tmp_path / store.FILE_NAME).stat().st_mode & 0o777 == 0o600
    fresh, _ = make()
    assert not store.load(str(tmp_path), "others", {"x": fresh}, services)
    store.remove(str(tmp_path))
    store.remove(str(tmp_path))
    assert not list(tmp_path.iterdir())
