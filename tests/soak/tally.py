# SPDX-License-Identifier: Apache-2.0
"""What one worker counts, as JSON that can be added up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

WORST = 8  # stalls kept with their circumstances, of each class
STEPS = 8  # buckets for each doubling
# "denied": readers that trust FIONREAD and were told for long that nothing is there. "no_memory": sends that
# failed with ENOMEM.
COUNTERS = ("connections", "ended", "messages", "bytes", "stalls", "denied", "no_memory")


def bucket_of(seconds: float) -> int:
    """Number of a stall's bucket; 0 is everything below a microsecond."""
    return 0 if seconds < 1e-6 else 1 + int(math.log2(seconds * 1e6) * STEPS)


def upper_bound(bucket: int) -> float:
    """The longest stall in a bucket, in seconds."""
    return 0.0 if bucket == 0 else 2 ** (bucket / STEPS) / 1e6


class Tally:
    """Counters by class ("plain" or "spliced", for connections made without or with splicer) and kind."""

    def __init__(self) -> None:
        self.counters: dict[str, Counter[str]] = {name: Counter() for name in COUNTERS}
        self.worst: dict[str, list[dict[str, Any]]] = {"plain": [], "spliced": []}

    def count(self, counter: str, spliced: bool, what: str, n: int = 1) -> None:
        self.counters[counter][f"{class_of(spliced)} {what}"] += n

    def stall(self, spliced: bool, seconds: float) -> bool:
        """Count a stall; true if it is among the worst, and `remember` wants to know more."""
        self.count("stalls", spliced, str(bucket_of(seconds)))
        worst = self.worst[class_of(spliced)]
        return seconds > 0.005 and (len(worst) < WORST or seconds > worst[-1]["seconds"])

    def remember(self, spliced: bool, record: dict[str, Any]) -> None:
        worst = self.worst[class_of(spliced)]
        worst.append(record)
        worst.sort(key=lambda each: -each["seconds"])
        del worst[WORST:]

    def to_json(self) -> dict[str, Any]:
        return {**self.counters, "worst": self.worst}


def class_of(spliced: bool) -> str:
    return "spliced" if spliced else "plain"


def add_up(documents: Iterable[dict[str, Any]]) -> Tally:
    """The sum of tallies as `to_json` gives them."""
    total = Tally()
    for document in documents:
        for name in COUNTERS:
            total.counters[name].update(document[name])
        for kind, worst in document["worst"].items():
            for record in worst:
                total.remember(kind == "spliced", record)
    return total


def pick(counter: Counter[str], kind: str) -> dict[str, int]:
    """The part of a counter that is about one class."""
    return {key.partition(" ")[2]: n for key, n in sorted(counter.items()) if key.startswith(f"{kind} ")}


def percentile(stalls: dict[str, int], share: float) -> float:
    """The stall, in seconds, below which `share` of the measurements are; buckets' upper bounds."""
    wanted = share * sum(stalls.values())
    passed = 0
    for bucket, n in sorted((int(key), n) for key, n in stalls.items()):
        passed += n
        if passed >= wanted:
            return upper_bound(bucket)
    return 0.0
