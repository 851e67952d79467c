# SPDX-License-Identifier: Apache-2.0
"""What a workload is, and what measuring it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from splicer.bench.testbed import Testbed
from splicer.kernel.costs import Cost

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


class Record(NamedTuple):
    """What splicer knows of a connection. Times are in nanoseconds of CLOCK_MONOTONIC."""

    spliced: bool
    born_ns: int
    changed_ns: int

    @property
    def age_ms(self) -> float:
        """How old it was when its state changed."""
        return (self.changed_ns - self.born_ns) / 1e6


@dataclass(frozen=True)
class Splicing:
    """What the daemon said and cost during the spliced leg. `refused`: how often it refused, by reason."""

    spliced: int
    redirected_messages: int
    redirected_bytes: int
    passed_messages: int
    rescued: int
    cpu_percent: float
    rss_kib: int
    programs: dict[str, Cost]  # with --programs
    refused: dict[str, int]


class Subject(Protocol):
    """What is compared, however it is measured."""

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


class Workload(Subject, Protocol):
    """What is measured on a test bed."""

    @property
    def daemon_options(self) -> tuple[str, ...]:
        """Further options of splicer run."""

    @property
    def always_redirects(self) -> bool:
        """Without the rules by which splicer lets go of a stream."""

    @property
    def programs(self) -> tuple[str, ...]:
        """What has to be installed."""

    def measure(self, bed: Testbed, load: Load) -> Sample: ...
