# SPDX-License-Identifier: Apache-2.0
"""The suite `tap`: what `splicer tap` costs those whom it taps.

All legs are spliced, and in every second one somebody taps all connections, whole, into a file that keeps
nothing (/dev/null): writing to a disk would measure that. A tap that gives way misses what it has no time
for, so beside the ratio stands what part of the messages it had.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from splicer.bench.cells import Cell
from splicer.bench.chains import CONNECTIONS, alternate
from splicer.bench.model import Load, Sample, Workload
from splicer.bench.results import Row, format_number
from splicer.bench.splicing import READY_SECONDS, Splicer
from splicer.bench.suite import Comparison, Findings, Workshop
from splicer.bench.testbed import TestbedError
from splicer.bench.workloads import WRK_WORKLOADS
from splicer.text import plural

SIZES = (64, 1024, 16384)
# Of the first metric, where more is better; beyond the noise, as any bound is.
BOUND = 0.9
_COUNT = re.compile(r"^(?:missed: )?([\d.]+)(?: ([kMG]))? messages?\b", re.MULTILINE)
_FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}


def list_workloads() -> list[Workload]:
    """Ping-pong of one connection, by size of message, and wrk."""
    return [*(Cell("bridge", "rr", size, False, bound=BOUND) for size in SIZES), WRK_WORKLOADS[0]]


@dataclass(frozen=True)
class Taken:
    """How many messages a tap had, and how many it missed."""

    recorded: int
    missed: int

    @property
    def share(self) -> float:
        """Of those that were redirected, those that it had."""
        return self.recorded / max(self.recorded + self.missed, 1)


@dataclass(frozen=True)
class Leg:
    """A tapped one."""

    sample: Sample
    taken: Taken


@dataclass(frozen=True)
class Tapped:
    """One workload. `untapped` are one leg more than `tapped`."""

    workload: Workload
    untapped: Sequence[Sample]
    tapped: Sequence[Leg]

    @property
    def rows(self) -> list[Row]:
        return [
            Row(
                metric,
                [sample.metrics[metric.key] for sample in self.untapped],
                [leg.sample.metrics[metric.key] for leg in self.tapped],
            )
            for metric in self.workload.metrics
        ]

    @property
    def share(self) -> float:
        return median(leg.taken.share for leg in self.tapped)

    def failures(self, check: bool) -> list[str]:
        """Errors, and taps that recorded nothing; the bound with `check`."""
        found = []
        if any(sample.errors for sample in (*self.untapped, *(leg.sample for leg in self.tapped))):
            found.append("errors in a leg")
        for leg in self.tapped:
            if not leg.taken.recorded:
                missed = plural(leg.taken.missed, "message")
                found.append(f"a tap recorded nothing, and missed {missed}")
        row = self.rows[0]
        noise = median(abs(each - 1) for each in row.noises.values)
        if check and row.ratios.median < BOUND * (1 - noise):
            found.append(f"tapped {row.ratios.median:.2f} of untapped, wanted >= {BOUND:g}")
        return [f"{self.workload.name}: {each}" for each in found]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.workload.name,
            "recorded": [leg.taken.recorded for leg in self.tapped],
            "missed": [leg.taken.missed for leg in self.tapped],
            "metrics": {
                row.metric.key: {
                    "untapped_samples": row.plains,
                    "tapped_samples": row.splices,
                    "tapped_to_untapped": row.ratios.to_json(),
                    "noise": row.noises.to_json(),
                }
                for row in self.rows
            },
        }

    def to_text(self) -> str:
        lines = ["", f"{self.workload.name}: {self.workload.title}"]
        lines.append(f"  {'':<14}{'untapped':>10}{'tapped':>10}  {'ratio (min - max)':<20}untapped/untapped")
        lines += [
            f"  {row.metric.label:<14}{format_number(row.plain):>10}{format_number(row.spliced):>10}"
            f"  {row.ratios!s:<20}{row.noises}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"  it had {100 * self.share:.1f} % of the messages"])


def read_summary(text: str) -> Taken:
    """What `splicer tap` says at its end: three digits of what it had, and what it missed to the message."""
    counts = [round(float(number) * _FACTORS[factor]) for number, factor in _COUNT.findall(text)]
    return Taken(counts[0] if counts else 0, counts[1] if len(counts) > 1 else 0)


@contextmanager
def tapping(splicer: Splicer) -> Iterator[list[Taken]]:
    """Meanwhile everything is tapped; what was taken is in the list when the context is left. Raises
    TestbedError."""
    bed, taken = splicer.bed, list[Taken]()
    log = bed.directory / "tap.log"
    command = [*splicer.command, "tap", "-w", "/dev/null", "--run-dir", str(splicer.run_dir)]
    command += ["--pin-dir", str(bed.bpffs / "splicer"), "--cache-dir", str(bed.directory / "cache")]
    with log.open("wb") as said:
        child = bed.start(command, stderr=said)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while "tapping" not in (words := log.read_text(errors="replace")):
            if child.poll() is not None or time.monotonic() > deadline:
                raise TestbedError(f"splicer tap failed: {words.strip() or 'not a word'}")
            time.sleep(0.02)
        yield taken
    finally:
        bed.stop(child)
    taken.append(read_summary(log.read_text(errors="replace")))


def measure(splicer: Splicer, workload: Workload, load: Load, workshop: Workshop) -> Tapped:
    """All legs with one daemon."""

    def measure_tapped() -> Leg:
        with tapping(splicer) as taken:
            sample = workload.measure(splicer.bed, load)
        return Leg(sample, *taken)

    with splicer.running(workload.daemon_options):
        legs = alternate(
            workload.name,
            workshop.options.pairs,
            workshop.progress,
            lambda: workload.measure(splicer.bed, load),
            measure_tapped,
            kinds=("untapped", "tapped"),
        )
    return Tapped(workload, *legs)


def run(workshop: Workshop) -> Findings:
    """The suite. Raises SplicerError."""
    options, found = workshop.options, list[Tapped]()
    load = Load(options.seconds or 3.0, options.connections or CONNECTIONS, options.threads, options.workers)
    workloads = list_workloads()
    workshop.progress.begin(len(workloads) * (2 * options.pairs + 1))
    with workshop.splicing() as splicer:
        workshop.write(f"{plural(options.pairs, 'tapped leg')} of {load.seconds:g} s, between others")
        for workload in workloads:
            found.append(measure(splicer, workload, load, workshop))
            workshop.write(found[-1].to_text())
        failures = [failure for each in found for failure in each.failures(options.check)]
        failures += splicer.failures
    return Findings(
        "tap",
        [each.to_json() for each in found],
        [Comparison(f"{each.workload.name}, tapped", each.workload.title, each.rows) for each in found],
        failures,
    )
