# SPDX-License-Identifier: Apache-2.0
"""Tapped legs between untapped ones, and how much of it the tap had."""

from __future__ import annotations

from splicer.bench.model import Sample
from splicer.bench.tapping import SIZES, Leg, Taken, Tapped, list_workloads, read_summary
from splicer.bench.workloads import WRK_WORKLOADS
from splicer.cli.capture import Totals, summarise


def sample(rate: float, **errors: int) -> Sample:
    return Sample({"rate": rate, "p50_us": 1, "p99_us": 1, "cpu_us": 1}, errors, 10)


def tapped(*rates: float, recorded: int = 9, missed: int = 1, **errors: int) -> Tapped:
    untapped = [sample(100) for _ in range(len(rates) + 1)]
    return Tapped(
        WRK_WORKLOADS[0], untapped, [Leg(sample(rate, **errors), Taken(recorded, missed)) for rate in rates]
    )


def test_tapped_against_untapped() -> None:
    found = tapped(95, 90, 85)
    assert found.rows[0].ratios.median == 0.9
    assert found.share == 0.9
    assert "0.90 (0.85 - 0.95)" in found.to_text() and "90.0 % of the messages" in found.to_text()
    assert found.to_json()["metrics"]["rate"]["tapped_to_untapped"]["median"] == 0.9


def test_what_makes_it_fail() -> None:
    assert tapped(90, 90, 90).failures(check=True) == []
    assert tapped(80, 80, 80).failures(check=False) == []
    assert tapped(80, 80, 80).failures(check=True) == ["keep-alive: tapped 0.80 of untapped, wanted >= 0.9"]
    nothing = "keep-alive: a tap recorded nothing, and missed"
    assert tapped(90, recorded=0, missed=1).failures(check=False) == [f"{nothing} 1 message"]
    assert tapped(90, recorded=0, missed=0).failures(check=False) == [f"{nothing} 0 messages"], "none spliced"
    assert tapped(90, timeout=1).failures(check=False) == ["keep-alive: errors in a leg"]


def test_what_a_tap_says_at_its_end() -> None:
    """The sentences are another room's."""
    said = summarise(Totals(pieces=1_234_567, bytes=5 << 20, connections=3))
    assert read_summary("tapping; Ctrl-C ends it\n" + "\n".join(said)) == Taken(1_230_000, 0)
    said = summarise(Totals(pieces=1, bytes=64, connections=1, lost={"web -> db": (20_000, 1 << 20)}))
    assert read_summary("\n".join(said)) == Taken(1, 20_000)
    assert read_summary("splicer: not running") == Taken(0, 0)


def test_its_workloads() -> None:
    assert len({each.name for each in list_workloads()}) == len(SIZES) + 1
