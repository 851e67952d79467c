# SPDX-License-Identifier: Apache-2.0
"""Rates between parties and of connections, from counts of a kernel that is made up."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from splicer.daemon.rates import FORGET_S, LOOK_PAUSE_S, LOOK_SHARE, MOST_CONNECTIONS, RateReporter
from splicer.errors import SplicerError
from splicer.kernel.layout import (
    _DIRECTIONS,
    _END_CGROUP,
    PAIR,
    TRAFFIC,
    TRAFFIC_KEY,
    Pair,
    read_pair,
)
from splicer.kernel.volume import Volume, VolumeKey, Volumes
from splicer.model import Owner


def record(name: int, state: int, ends: tuple[int, int], sent: int = 0, messages: int = 0) -> bytes:
    value = bytearray(PAIR.size)
    struct.pack_into("=Q2I", value, 0, name, state, 0)
    for place, cgroup in zip(_END_CGROUP, ends, strict=True):
        struct.pack_into("=Q", value, place, cgroup)
    struct.pack_into("=2Q", value, _DIRECTIONS, sent, messages)
    return bytes(value)


class Kernel:
    """Connections, sums of closed ones, and what TCP has carried."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu = 0.0
        self.cost = 0.0
        self.records: dict[int, bytes] = {}
        self.closed: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.plain: dict[tuple[int, int], int] = {}
        self.plain_ones: dict[int, int] = {}
        self.looks = 0

    def walk_pairs(self) -> Any:
        self.looks += 1
        self.cpu += self.cost
        some = list(self.records.values())
        return Walk([b"".join(some[start : start + 2]) for start in range(0, len(some), 2)])

    def find_pair(self, name: int) -> Pair | None:
        return read_pair(self.records[name]) if name in self.records else None

    def items(self) -> list[tuple[bytes, bytes]]:
        return [(TRAFFIC_KEY.pack(*ends), TRAFFIC.pack(*sums)) for ends, sums in self.closed.items()]

    def read(self) -> Volumes:
        plain = {VolumeKey(*ends, 1): Volume(1, size) for ends, size in self.plain.items()}
        return Volumes(0.0, 0, plain, True)

    def read_each(self, wanted: Any) -> dict[int, int]:
        return {name: self.plain_ones.get(name, 0) for name, _ in wanted}

    def find_owner(self, end: Any, found: Any) -> Owner:
        return Owner(container=f"c{end.cgroup}")


class Walk:
    def __init__(self, steps: list[bytes]) -> None:
        self._steps = iter(steps)

    def step(self, wanted: int) -> tuple[memoryview, memoryview] | None:
        step = next(self._steps, None)
        return None if step is None else (memoryview(b""), memoryview(bytearray(step)))


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def reporter(kernel: Kernel) -> RateReporter:
    whole: Any = kernel
    return RateReporter(
        whole,
        whole,
        whole,
        whole,
        lambda cgroup: Owner(container=f"c{cgroup}"),
        lambda: kernel.now,
        lambda: kernel.cpu,
    )


def pairs(answer: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        f"{row['client']['container']}>{row['server']['container']}": (
            row["connections"],
            row["spliced"],
            row["redirected_bytes_per_second"],
            row["redirected_messages_per_second"],
            row["plain_bytes_per_second"],
        )
        for row in answer["pairs"]
    }


def test_between_parties(kernel: Kernel, reporter: RateReporter) -> None:
    """Open connections and closed ones, redirected and plain; nothing is known at first."""
    kernel.records = {1: record(1, 2, (7, 8), 1000, 10), 2: record(2, 1, (7, 8)), 3: record(3, 2, (7, 9))}
    kernel.closed = {(7, 8): (5, 500, 5)}
    kernel.plain = {(7, 8): 300}
    first = reporter.answer({})
    assert first["seconds"] == 0
    assert pairs(first)["c7>c8"] == (2, 1, 0, 0, 0)
    kernel.now += 2
    kernel.records[1] = record(1, 2, (7, 8), 3000, 30)
    kernel.closed = {(7, 8): (6, 600, 6)}
    kernel.plain = {(7, 8): 1300}
    second = reporter.answer({})
    assert second["seconds"] == 2
    assert pairs(second) == {"c7>c8": (2, 1, 1050, 10.5, 500), "c7>c9": (1, 1, 0, 0, 0)}
    assert second["total"]["redirected_bytes_per_second"] == 1050
    assert second["total"]["connections"] == 3


def test_one_that_closes_is_counted_once(kernel: Kernel, reporter: RateReporter) -> None:
    """It is missing in one look, and no flood in the next one."""
    kernel.records = {1: record(1, 2, (7, 8), 10**9, 10)}
    reporter.answer({})
    kernel.now += 1
    kernel.records = {}
    assert pairs(reporter.answer({}))["c7>c8"][2] == 0
    kernel.now += 1
    kernel.closed = {(7, 8): (1, 10**9 + 50, 11)}
    assert pairs(reporter.answer({}))["c7>c8"][2] == 50


def test_sums_that_the_kernel_has_forgotten(kernel: Kernel, reporter: RateReporter) -> None:
    """They are held against it for one look only."""
    kernel.closed = {(7, 8): (1, 10**9, 11)}
    reporter.answer({})
    rates = []
    for sum_ in (1000, 2000, 3500):
        kernel.now += 1
        kernel.closed = {(7, 8): (1, sum_, 11)}
        rates.append(pairs(reporter.answer({}))["c7>c8"][2])
    assert rates == [0, 0, 1500]


def test_the_busiest_connections(kernel: Kernel, reporter: RateReporter) -> None:
    kernel.records = {n: record(n, 2, (7, 8), 1000 * n, n) for n in range(1, 6)} | {9: record(9, 1, (7, 8))}
    kernel.plain_ones = {9: 10}
    assert reporter.answer({"connections": 3})["connections"] == []
    kernel.now += 1
    kernel.records[1] = record(1, 2, (7, 8), 1000 + 70, 1 + 9)
    kernel.records[2] = record(2, 2, (7, 8), 2000 + 60, 2 + 8)
    kernel.records[10] = record(10, 2, (7, 8), 5, 1)
    kernel.plain_ones = {9: 10 + 65}
    answer = reporter.answer({"connections": 3})
    assert answer["compared"] is True
    rates = [(c["redirected_bytes_per_second"], c["plain_bytes_per_second"]) for c in answer["connections"]]
    assert rates == [(70, 0), (0, 65), (60, 0)]
    assert [c["plain_bytes"] for c in answer["connections"]] == [None, 75, None]
    assert len(reporter.answer({"connections": 9})["connections"]) == 4
    (busiest,) = reporter.answer({"connections": 1, "sort": "messages"})["connections"]
    assert busiest["redirected_messages_per_second"] == 9


def test_one_that_goes_back_to_tcp_has_no_flood(kernel: Kernel, reporter: RateReporter) -> None:
    """What TCP carried of it before was not looked up."""
    kernel.records = {1: record(1, 2, (7, 8))}
    reporter.answer({"connections": 1})
    kernel.now += 1
    kernel.records = {1: record(1, 1, (7, 8))}
    kernel.plain_ones = {1: 10**9}
    assert reporter.answer({"connections": 1})["connections"] == []
    kernel.now += 1
    kernel.plain_ones = {1: 10**9 + 5}
    (row,) = reporter.answer({"connections": 1})["connections"]
    assert row["plain_bytes_per_second"] == 5


def test_connections_are_remembered_only_while_somebody_wants_them(
    kernel: Kernel, reporter: RateReporter
) -> None:
    kernel.records = {n: record(n, 2, (7, 8)) for n in range(1, 6)}
    reporter.answer({})
    assert reporter._look is not None and reporter._look.connections is None
    kernel.now += 1
    assert reporter.answer({"connections": 10**9})["compared"] is False
    assert len(reporter._look.connections or ()) == 5
    kernel.now += 1
    reporter.answer({})
    assert reporter._look.connections is None
    assert MOST_CONNECTIONS <= 200
    kernel.now += FORGET_S + 1
    reporter.forget()
    assert reporter._look is None


def test_looks_are_shared_and_cost_no_more_than_their_share(kernel: Kernel, reporter: RateReporter) -> None:
    kernel.cost = 0.1
    reporter.answer({})
    kernel.now += LOOK_PAUSE_S
    reporter.answer({})
    assert kernel.looks == 1
    kernel.now += 0.1 / LOOK_SHARE
    answers = [reporter.answer({}) for _ in range(5)]
    assert kernel.looks == 2
    assert answers[0]["seconds"] == pytest.approx(LOOK_PAUSE_S + 0.1 / LOOK_SHARE)


def test_rows_are_bounded(kernel: Kernel, reporter: RateReporter) -> None:
    kernel.records = {n: record(n, 2, (n, 1), n, 1) for n in range(1, 301)}
    reporter.answer({})
    kernel.now += 1
    kernel.records = {n: record(n, 2, (n, 1), 2 * n, 1) for n in range(1, 301)}
    answer = reporter.answer({})
    assert len(answer["pairs"]) == 100
    assert answer["pairs"][0]["client"]["container"] == "c300"
    assert answer["others"]["connections"] == 200
    assert answer["others"]["redirected_bytes_per_second"] == sum(range(1, 201))


def test_an_unknown_key(reporter: RateReporter) -> None:
    with pytest.raises(SplicerError, match="unknown key"):
        reporter.answer({"sort": "colour"})
