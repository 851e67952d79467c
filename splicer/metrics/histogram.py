# SPDX-License-Identifier: Apache-2.0
"""How long something takes, counted in classes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Seconds. From a turn that has one pair to look at to one that others notice.
BOUNDS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Distribution:
    """How many took at most so many seconds, by BOUNDS, and at last how many there were; and all their
    seconds."""

    counts: tuple[int, ...]
    seconds: float


class Histogram:
    """One thread observes, and any may read."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Observes how long the block takes."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.observe(time.monotonic() - begun)

    def read(self) -> Distribution:
        counts, seconds = list(self._counts), self._seconds
        for index in range(1, len(counts)):
            counts[index] += counts[index - 1]
        return Distribution(tuple(counts), seconds)


class Timings:
    """What the daemon's loop spends its time on."""

    def __init__(self) -> None:
        self.turns = Histogram()
        self.sweeps = Histogram()
        self.rounds = Histogram()
