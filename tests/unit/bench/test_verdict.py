# SPDX-License-Identifier: Apache-2.0
"""What is called a difference, and in which words. The pairs are made up; what a ratio is says class Row."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from splicer.bench.model import Metric
from splicer.bench.results import Row
from splicer.bench.suite import Comparison
from splicer.bench.verdict import Verdict, find_direction, find_noise, judge, name_metric, phrase, sum_up

from .conftest import METRICS, Compare

STEADY = [100, 104, 100, 104, 100, 104]


def _row(key: str, plains: Sequence[float], splices: Sequence[float]) -> Row:
    return Row(METRICS[key], plains, splices)


def _around(ratio: float) -> list[float]:
    """Five spliced legs among STEADY ones, each with about this ratio."""
    return [102 * ratio * factor for factor in (0.99, 1, 1.01, 1, 0.99)]


def test_a_faster_service(compare: Compare) -> None:
    verdict = judge(compare(rate=(STEADY, _around(1.9)), p50_us=(STEADY, _around(0.5))))
    assert verdict.words == "1.9 times the requests, half the latency, noise 4 %"
    assert verdict.direction == "better"


def test_a_slower_service(compare: Compare) -> None:
    verdict = judge(compare(rate=(STEADY, _around(0.8)), p50_us=(STEADY, _around(1.25))))
    assert verdict.words == "slower: 20 % fewer requests, 25 % more latency, noise 4 %"
    assert verdict.direction == "worse"


def test_the_same_service(compare: Compare) -> None:
    verdict = judge(compare(rate=(STEADY, _around(1.02)), p50_us=(STEADY, _around(0.99))))
    assert verdict.words == "no difference beyond noise (4 %)"
    assert verdict.direction == "same"


def test_what_was_not_spliced_says_so_first(compare: Compare) -> None:
    verdict = judge(compare(redirected=0, rate=(STEADY, _around(1.0))))
    assert verdict.words == "nothing was spliced; no difference beyond noise (4 %)"


def test_latency_alone(compare: Compare) -> None:
    """A load that is not at its limit does as many requests, each sooner or later."""
    verdict = judge(compare(rate=(STEADY, _around(1.0)), p50_us=(STEADY, _around(0.7))))
    assert (verdict.words, verdict.direction) == ("30 % less latency, noise 4 %", "better")
    verdict = judge(compare(rate=(STEADY, _around(1.0)), p50_us=(STEADY, _around(1.3))))
    assert (verdict.words, verdict.direction) == ("slower: 30 % more latency, noise 4 %", "worse")


def test_too_few_pairs_are_no_verdict(compare: Compare) -> None:
    verdict = judge(compare(rate=([100, 100, 100], [200, 200])))
    assert verdict.words == "too few pairs for a verdict (2); in the median 2.0 times the requests"
    assert verdict.direction == "same"


def test_both_sides_are_said(compare: Compare) -> None:
    verdict = judge(
        compare(rate=(STEADY, _around(1.2)), p50_us=(STEADY, _around(1.0)), p99_us=(STEADY, _around(1.6)))
    )
    assert verdict.words == "20 % more requests, but 1.6 times the p99 latency, noise 4 %"
    verdict = judge(compare(rate=(STEADY, _around(0.8)), cpu_us=(STEADY, _around(0.6))))
    assert verdict.words == "slower: 20 % fewer requests, but 0.60 of the CPU time, noise 4 %"
    verdict = judge(
        compare(rate=(STEADY, _around(1.0)), p50_us=(STEADY, _around(0.8)), cpu_us=(STEADY, _around(1.2)))
    )
    assert verdict.words == "no difference beyond noise (4 %); 20 % less latency, but 20 % more CPU time"


@pytest.mark.parametrize(
    ("plains", "splices", "direction"),
    [
        # As far from 1 as plain legs are from each other.
        ([100, 110, 100, 110], [112, 112, 112], "same"),
        ([100, 110, 100, 110], [120, 120, 120], "better"),
        ([100, 110, 100, 110], [90, 90, 90], "worse"),
        # A machine that drifts, and takes both with it.
        ([100, 110, 121, 133.1], [105, 115.5, 127.05], "same"),
        ([100, 50, 100, 50, 100, 50], [75, 75, 75, 75, 75], "same"),
        # The median is beyond the noise, and the pairs do not agree.
        ([100, 100, 100, 100, 100, 100], [130, 130, 130, 80, 80], "same"),
        ([100] * 6, [130, 130, 130, 130, 80], "same"),
        ([100] * 11, [130] * 9 + [80], "better"),
        # One leg that somebody disturbed, of five and of three.
        ([100, 100, 100, 40, 100, 100], [150, 150, 150, 150, 150], "same"),
        ([100, 100, 100, 100, 100, 40], [150, 150, 150, 150, 150], "better"),
        ([100, 100, 100, 40], [150, 150, 150], "same"),
        # Exact repetition is not exactness.
        ([100, 100, 100, 100], [100.9, 100.9, 100.9], "same"),
        ([100, 100, 100, 100], [101.1, 101.1, 101.1], "better"),
        # Too few.
        ([100, 100, 100], [150, 150], "same"),
        ([0, 0, 0, 0], [0, 0, 0], "same"),
    ],
)
def test_a_difference_is_beyond_noise_and_agreed_upon(
    plains: list[float], splices: list[float], direction: str
) -> None:
    assert find_direction(_row("rate", plains, splices)) == direction
    mirrored = {"better": "worse", "worse": "better", "same": "same"}[direction]
    assert find_direction(_row("p50_us", plains, splices)) == mirrored


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_plain_against_plain_is_hardly_ever_a_difference(spread: float) -> None:
    """Of many runs in which all legs are of one kind."""
    dice = random.Random(18)
    claims = 0
    for _ in range(500):
        legs = [dice.gauss(100, 100 * spread) for _ in range(11)]
        claims += find_direction(_row("rate", legs[0::2], legs[1::2])) != "same"
    assert claims <= 20  # it is 11 of 500 in the long run


def test_noise_is_the_second_furthest_of_five_and_more() -> None:
    assert find_noise(_row("rate", [100, 110, 110], [1, 1])) == pytest.approx(0.1)
    assert find_noise(_row("rate", [100, 110, 110, 110, 110, 55], [1] * 5)) == pytest.approx(0.1)
    assert find_noise(_row("rate", [100, 110, 110, 110, 55], [1] * 4)) == pytest.approx(1)
    assert find_noise(_row("rate", [100, 100], [1])) == 0.01
    # The same for a ratio and its inverse.
    assert find_noise(_row("rate", [100, 50], [1])) == find_noise(_row("rate", [50, 100], [1])) == 1


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (12.4, "12 times the requests"),
        (1.94, "1.9 times the requests"),
        (1.49, "49 % more requests"),
        (1.08, "8 % more requests"),
        (0.95, "5 % fewer requests"),
        (0.6, "0.60 of the requests"),
        (0.5, "half the requests"),
        (0.33, "a third of the requests"),
    ],
)
def test_phrases(ratio: float, words: str) -> None:
    assert phrase(_row("rate", [100, 100], [100 * ratio])) == words


@pytest.mark.parametrize(
    ("metric", "named"),
    [
        (Metric("rate", "exchanges/s"), ("exchanges", True)),
        (Metric("rate", "Gbit/s"), ("throughput", False)),
        (Metric("megabytes", "MB/s"), ("throughput", False)),
        (Metric("p50_us", "latency us", False), ("latency", False)),
        (Metric("number", "number"), ("number", False)),
    ],
)
def test_names(metric: Metric, named: tuple[str, bool]) -> None:
    assert name_metric(metric) == named


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(1.3, "30 % greater number, noise 1 %"), (0.5, "worse: half the number, noise 1 %")],
)
def test_a_number_of_whatever(ratio: float, words: str) -> None:
    row = Row(Metric("number", "number"), [100] * 6, [100 * ratio] * 5)
    assert judge(Comparison("command", "echo 1", [row])).words == words


def test_one_verdict_some_and_many() -> None:
    better, worse, same = (
        Verdict(name, name, f"it is {name}", 0.01)  # type: ignore[arg-type]
        for name in ("better", "worse", "same")
    )
    assert sum_up([]) == []
    assert sum_up([better]) == ["it is better"]
    assert sum_up([better, same]) == ["better: it is better", "same: it is same"]
    assert sum_up([better] * 5 + [worse] + [same] * 3) == [
        "5 of 9 better, 1 worse, 3 the same within noise",
        "worse: it is worse",
    ]
