# SPDX-License-Identifier: Apache-2.0
"""What ratios mean, in words. A difference is claimed only beyond the noise of plain against plain.

The noise of a metric is how far apart two plain legs were that followed each other: of five and more such
ratios the one that is furthest out counts for nothing, of the others the furthest is the noise. A difference
is beyond it if the median ratio is further from 1, and nine of ten pairs, so all of fewer, show it in the
same direction. Legs that differ by chance alone (normally distributed) are called different once in 16 runs
of three pairs, once in 46 of five, and once in 800 of ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splicer.bench.model import Metric
from splicer.bench.results import Row
from splicer.bench.suite import Comparison

Direction = Literal["better", "worse", "same"]

# A machine that repeats itself exactly is none that this was tried on.
LEAST_NOISE = 0.01
AGREEMENT = 0.9
OUTLIERS_FROM = 5
FEWEST_PAIRS = 3
NOUNS = {
    "p50_us": "latency",
    "p99_us": "p99 latency",
    "max_us": "longest latency",
    "cpu_us": "CPU time",
    "per_second": "requests",
}
_TAILS = ("p99_us", "max_us")
# So many lines before they are counted instead.
MOST_LINES = 8


def _distance(ratio: float) -> float:
    """How far from 1, the same for a ratio and its inverse."""
    return max(ratio, 1 / ratio) - 1 if ratio > 0 else float("inf")


def find_noise(row: Row) -> float:
    """As a share: 0.04 for plain legs that differ by 4 %."""
    distances = sorted(_distance(ratio) for ratio in row.noises.values)
    if len(distances) >= OUTLIERS_FROM:
        distances.pop()
    return max(LEAST_NOISE, distances[-1])


def find_direction(row: Row) -> Direction:
    """Beyond the noise, or the same; the same as well where there are too few pairs."""
    ratios, middle = row.ratios.values, row.ratios.median
    agreeing = sum((ratio > 1) == (middle > 1) for ratio in ratios) / len(ratios)
    if len(ratios) < FEWEST_PAIRS or agreeing < AGREEMENT or _distance(middle) <= find_noise(row):
        return "same"
    return "better" if (middle > 1) == row.metric.higher_is_better else "worse"


def name_metric(metric: Metric) -> tuple[str, bool]:
    """What it measures, and whether that can be counted: fewer requests, less latency."""
    if metric.key in NOUNS:
        return NOUNS[metric.key], metric.key == "per_second"
    noun, slash, _ = metric.label.partition("/s")
    if noun in ("Gbit", "MB"):
        return "throughput", False
    return noun, bool(slash)


def phrase(row: Row) -> str:
    """The median ratio: `1.9 times the requests`, `half the latency`, `8 % fewer requests`."""
    ratio = row.ratios.median
    noun, countable = name_metric(row.metric)
    if ratio >= 1.5:
        return f"{ratio:.1f} times the {noun}" if ratio < 10 else f"{ratio:.0f} times the {noun}"
    if 0.47 <= ratio <= 0.53:
        return f"half the {noun}"
    if 0.31 <= ratio <= 0.36:
        return f"a third of the {noun}"
    if ratio < 0.67:
        return f"{ratio:.2f} of the {noun}"
    percent = abs(ratio - 1)
    if row.metric.key == "number":
        comparative = "greater" if ratio > 1 else "smaller"
    else:
        comparative = "more" if ratio > 1 else "fewer" if countable else "less"
    return f"{percent:.0%} {comparative} {noun}".replace("%", " %")


@dataclass(frozen=True)
class Verdict:
    """About one comparison."""

    name: str
    direction: Direction
    words: str
    noise: float

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "direction": self.direction,
            "words": self.words,
            "noise": round(self.noise, 4),
        }


def judge(comparison: Comparison) -> Verdict:
    """In words. The direction is that of the first metric; of the others where that shows nothing."""
    main = comparison.rows[0]
    noise = find_noise(main)
    by_direction: dict[Direction, list[Row]] = {"better": [], "worse": [], "same": []}
    for row in comparison.rows:
        by_direction[find_direction(row)].append(row)
    better, worse = by_direction["better"], by_direction["worse"]
    direction: Direction = find_direction(main)
    if direction == "same" and bool(better) != bool(worse):
        direction = "better" if better else "worse"
    in_percent = f"noise {noise:.0%}".replace("%", " %")
    # Of what is better the median stands for the tail; what is worse is said in full.
    better = [row for row in better if row.metric.key not in _TAILS or len(better) == 1]
    good, bad = (", ".join(phrase(row) for row in rows) for rows in (better, worse))
    if len(main.splices) < FEWEST_PAIRS:
        words = f"too few pairs for a verdict ({len(main.splices)}); in the median {phrase(main)}"
    elif direction == "same":
        words = f"no difference beyond noise ({noise:.0%})".replace("%", " %")
        if better:  # and worse, of other metrics
            words += f"; {good}, but {bad}"
    elif direction == "better":
        words = f"{good}{f', but {bad}' if bad else ''}, {in_percent}"
    else:
        # Nobody knows what the number of a command is about.
        adverb = "worse" if main.metric.key == "number" else "slower"
        words = f"{adverb}: {bad}{f', but {good}' if good else ''}, {in_percent}"
    if comparison.redirected == 0:
        words = f"nothing was spliced; {words}"
    return Verdict(comparison.name, direction, words, noise)


def sum_up(verdicts: Sequence[Verdict]) -> list[str]:
    """Lines for the end of a run: each verdict, or how many of which kind there are."""
    if len(verdicts) <= 1:
        return [each.words for each in verdicts]
    if len(verdicts) <= MOST_LINES:
        return [f"{each.name}: {each.words}" for each in verdicts]
    better, worse, same = (
        [each for each in verdicts if each.direction == direction]
        for direction in ("better", "worse", "same")
    )
    lines = [
        f"{len(better)} of {len(verdicts)} better, {len(worse)} worse, {len(same)} the same within noise"
    ]
    return lines + [f"{each.name}: {each.words}" for each in worse]
