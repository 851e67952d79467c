# SPDX-License-Identifier: Apache-2.0
"""Three kinds of legs by turns: each is compared with those of the kind before it that are around it."""

from __future__ import annotations

from dataclasses import replace

from splicer.bench.model import Sample, Splicing
from splicer.bench.naive import NAMES, Trio
from splicer.bench.workloads import WRK_WORKLOADS
from splicer.kernel.costs import Cost


def sample(rate: float, **errors: int) -> Sample:
    return Sample({"rate": rate, "p50_us": 1, "p99_us": 1, "cpu_us": 1}, errors, 10)


def splicing(redirected: int) -> Splicing:
    return Splicing(1, redirected, redirected, 0, 0, 0.0, 0, {}, {})


def trio(*, redirected: int = 5, **errors: int) -> Trio:
    plains = [sample(100), sample(200), sample(100)]
    always = [sample(300), sample(300), sample(500)]
    splices = [sample(270, **errors), sample(360)]
    return Trio(WRK_WORKLOADS[0], plains, always, splices, [splicing(redirected)] * 2)


def test_each_against_those_around_it() -> None:
    rate = trio().workload.metrics[0]
    assert trio().against_plain(rate).ratios.values == [2.0, 2.0]
    assert trio().against_always(rate).ratios.values == [0.9, 0.9]
    assert trio().rows[0].noises.values == [1.0, 500 / 300]
    assert "2.00 (2.00 - 2.00)" in trio().to_text() and "0.90 (0.90 - 0.90)" in trio().to_text()
    assert trio().to_json()["metrics"]["rate"]["spliced_to_always"]["median"] == 0.9


def test_the_two_programs_beside_each_other() -> None:
    assert "programs" not in trio().to_text()
    timed = replace(
        trio(),
        splicings=[replace(splicing(5), programs={"verdict": Cost(20, 20 * ns)}) for ns in (200, 240)],
        redirects=[Cost(10, 1000), Cost(10, 1200), Cost(10, 1100)],
    )
    assert "programs, for each request: verdict 2.0 x 220 ns, always 1.0 x 110 ns" in timed.to_text()
    assert timed.to_json()["redirects"][1] == {"calls": 10, "nanoseconds": 1200}


def test_what_makes_it_fail() -> None:
    assert trio().failures == []
    assert trio(redirected=0).failures == ["keep-alive: a spliced leg redirected nothing"]
    assert trio(timeout=1).failures == ["keep-alive: errors in a leg"]


def test_its_workloads_are_there() -> None:
    assert set(NAMES) <= {workload.name for workload in WRK_WORKLOADS}
