# SPDX-License-Identifier: Apache-2.0
"""Comparisons of numbers that nobody has measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from splicer.bench.model import Metric
from splicer.bench.results import Row
from splicer.bench.suite import Comparison

Compare = Callable[..., Comparison]
METRICS = {
    "rate": Metric("rate", "requests/s"),
    "p50_us": Metric("p50_us", "p50 us", higher_is_better=False),
    "p99_us": Metric("p99_us", "p99 us", higher_is_better=False),
    "cpu_us": Metric("cpu_us", "CPU us/request", higher_is_better=False),
}


@pytest.fixture
def compare() -> Compare:
    """Metrics to the samples of plain legs and of spliced ones."""

    def make(
        name: str = "web", redirected: int | None = 1, **samples: tuple[Sequence[float], Sequence[float]]
    ) -> Comparison:
        rows = [Row(METRICS[key], *each) for key, each in samples.items()]
        return Comparison(name, f"what {name} is", rows, redirected)

    return make
