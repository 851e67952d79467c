# SPDX-License-Identifier: Apache-2.0
"""What a workload is, and what measuring it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from testbed import Testbed

# Of a spliced leg: something has to be redirected; nothing may be, for it is refused; or both are right.
Expected = Literal["spliced", "refused", "either"]


@dataclass(frozen=True)
class Metric:
    """One number of a workload; `bound` is what --check asks of the median of its ratios."""

    key: str
    label: str
    higher_is_better: bool = True
    bound: float | None = None

    def holds(self, ratio: float, noise: float) -> bool:
        """`noise`: how far the ratio of two plain legs is from 1; beyond the bound a ratio may be so far."""
        if self.bound is None:
            return True
        if self.higher_is_better:
            return ratio >= self.bound * (1 - noise)
        return ratio <= self.bound * (1 + noise)


@dataclass(frozen=True)
class Sample:
    """One leg: metrics by key, what went wrong by kind (wrk's own kinds), and how much there was of what is
    counted (requests, exchanges or messages). `sent_bytes` is 0 where nobody knows it."""

    metrics: dict[str, float]
    errors: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class Load:
    """How hard: seconds per leg, and the numbers of processes and threads."""

    seconds: float
    connections: int
    threads: int
    workers: int


class Workload(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def metrics(self) -> tuple[Metric, ...]: ...
    @property
    def expected(self) -> Expected: ...
    @property
    def unit(self) -> str:
        """What a sample's `requests` are, in the singular."""

    @property
    def daemon_options(self) -> tuple[str, ...]:
        """Further options of splicer run."""

    @property
    def always_redirects(self) -> bool:
        """Without the rules by which splicer lets go of a stream."""

    def measure(self, bed: Testbed, load: Load) -> Sample: ...
