# SPDX-License-Identifier: Apache-2.0
"""The suite `naive`: what is left of the gain that a program would give which always redirects?

Such a program is a few lines (loads/naive.c), and asks nothing: whether the reader can read what was
redirected, whether anything is on its way through TCP, whether the reader keeps up. Legs are plain,
always redirected and spliced by turns: P A S P A S ... P A. Each has two of the kind before it around it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from splicer.bench.chains import CONNECTIONS, select
from splicer.bench.model import Load, Metric, Sample, Splicing, Subject, Workload
from splicer.bench.results import Row, format_number
from splicer.bench.splicing import Splicer
from splicer.bench.suite import Comparison, Findings, Workshop
from splicer.bench.testbed import LOADS, Testbed, TestbedError
from splicer.errors import SplicerError
from splicer.kernel.compiler import find_sources
from splicer.kernel.costs import Cost, counting
from splicer.text import plural

NAMES = ("keep-alive", "keep-alive-1", "keep-alive-128", "proxy-20k", "proxy-1m")
_HEAD = f"  {'':<14}{'plain':>9}{'always':>9}{'spliced':>9}"
_HEAD += f"  {'always/plain':<19}{'spliced/always':<19}always/always"


@dataclass(frozen=True)
class Trio:
    """One workload. `always` and `plains` are one leg more than `splices`. `redirects`: what the program that
    always redirects cost in each of its legs, with --programs."""

    workload: Subject
    plains: Sequence[Sample]
    always: Sequence[Sample]
    splices: Sequence[Sample]
    splicings: Sequence[Splicing]
    redirects: Sequence[Cost] = ()

    def against_plain(self, metric: Metric) -> Row:
        return Row(metric, _pick(self.plains, metric), _pick(self.always[:-1], metric))

    def against_always(self, metric: Metric) -> Row:
        return Row(metric, _pick(self.always, metric), _pick(self.splices, metric))

    @property
    def rows(self) -> list[Row]:
        return [self.against_always(metric) for metric in self.workload.metrics]

    @property
    def failures(self) -> list[str]:
        found = []
        if any(sample.errors for sample in (*self.plains, *self.always, *self.splices)):
            found.append(f"{self.workload.name}: errors in a leg")
        if not all(each.redirected_messages for each in self.splicings):
            found.append(f"{self.workload.name}: a spliced leg redirected nothing")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.workload.name,
            "metrics": {
                metric.key: {
                    "plain_samples": _pick(self.plains, metric),
                    "always_samples": _pick(self.always, metric),
                    "spliced_samples": _pick(self.splices, metric),
                    "always_to_plain": self.against_plain(metric).ratios.to_json(),
                    "spliced_to_always": self.against_always(metric).ratios.to_json(),
                    "noise": self.against_always(metric).noises.to_json(),
                }
                for metric in self.workload.metrics
            },
            "redirects": [asdict(cost) for cost in self.redirects],
            "verdicts": [asdict(cost) for cost in self._verdicts],
        }

    @property
    def _verdicts(self) -> list[Cost]:
        return [each.programs["verdict"] for each in self.splicings if "verdict" in each.programs]

    def _programs_text(self) -> str:
        """How often the two programs ran for a request, and for how long: medians of the legs."""
        parts = []
        for name, legs, costs in (
            ("verdict", self.splices, self._verdicts),
            ("always", self.always, self.redirects),
        ):
            runs = median(cost.calls / leg.requests for leg, cost in zip(legs, costs, strict=True))
            time = median(cost.nanoseconds / max(cost.calls, 1) for cost in costs)
            parts.append(f"{name} {runs:.1f} x {time:.0f} ns")
        return f"programs, for each {self.workload.unit}: {', '.join(parts)}"

    def to_text(self) -> str:
        lines = ["", f"{self.workload.name}: {self.workload.title}", _HEAD]
        for metric in self.workload.metrics:
            naive, ours = self.against_plain(metric), self.against_always(metric)
            numbers = (naive.plain, ours.plain, ours.spliced)
            lines.append(
                f"  {metric.label:<14}{''.join(f'{format_number(each):>9}' for each in numbers)}"
                f"  {naive.ratios!s:<19}{ours.ratios!s:<19}{ours.noises}"
            )
        if self.redirects:
            lines.append(f"  {self._programs_text()}")
        return "\n".join(lines)


def _pick(samples: Sequence[Sample], metric: Metric) -> list[float]:
    return [sample.metrics[metric.key] for sample in samples]


@contextmanager
def redirecting_always(bed: Testbed, timed: bool = False) -> Iterator[list[Cost]]:
    """Meanwhile each message below the test bed's cgroup is. What it gives has the program's cost at the end,
    if it is `timed`. Raises TestbedError, also if there was none."""
    log = bed.directory / "naive.log"
    with log.open("wb") as said:
        child = bed.start(
            [sys.executable, str(LOADS / "naive.py"), str(bed.cgroup), str(find_sources() / "kernel")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
    try:
        assert child.stdin is not None and child.stdout is not None
        if child.stdout.readline() != b"ready\n":
            child.wait(30)
            words = log.read_text(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
            raise TestbedError(f"cannot redirect always: {words[-1]}")
        costs: list[Cost] = []
        with counting() if timed else nullcontext():
            yield costs
        child.stdin.close()
        redirected, calls, nanoseconds = map(int, child.stdout.readline().split() or (0, 0, 0))
        if not redirected:
            raise TestbedError("nothing was redirected where everything should be")
        if timed:
            costs.append(Cost(calls, nanoseconds))
    finally:
        bed.stop(child)
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()


def measure(splicer: Splicer, workload: Workload, load: Load, workshop: Workshop) -> Trio:
    """So many trios of legs as there are pairs, and one leg of each other kind at the end."""
    plains, always, splices, splicings, redirects = [], [], [], [], []
    for turn in range(workshop.options.pairs + 1):
        where = f"{turn + 1} of {workshop.options.pairs}"
        workshop.progress.step(f"{workload.name}: plain, {where}")
        plains.append(workload.measure(splicer.bed, load))
        workshop.progress.step(f"{workload.name}: always redirected, {where}")
        with redirecting_always(splicer.bed, workshop.options.programs) as costs:
            always.append(workload.measure(splicer.bed, load))
        redirects += costs
        if turn < workshop.options.pairs:
            workshop.progress.step(f"{workload.name}: spliced, {where}")
            sample, splicing = splicer.measure(workload, load)
            splices.append(sample)
            splicings.append(splicing)
    return Trio(workload, plains, always, splices, splicings, redirects)


def run(workshop: Workshop) -> Findings:
    """The suite. Raises SplicerError."""
    options = workshop.options
    workloads = [each for each in select("wrk", options.only) if each.name in NAMES]
    if not workloads:
        raise SplicerError("none of these can be redirected always", hint=f"there are {', '.join(NAMES)}")
    load = Load(options.seconds or 3.0, options.connections or CONNECTIONS, options.threads, options.workers)
    trios: list[Trio] = []
    workshop.progress.begin(len(workloads) * (3 * options.pairs + 2))
    with workshop.splicing(timed=options.programs) as splicer:
        workshop.write(f"{plural(options.pairs, 'spliced leg')} of {load.seconds:g} s, between others")
        for workload in workloads:
            trios.append(measure(splicer, workload, load, workshop))
            workshop.write(trios[-1].to_text())
        failures = [failure for trio in trios for failure in trio.failures] + splicer.failures
    return Findings(
        "naive",
        [trio.to_json() for trio in trios],
        [
            Comparison(f"{trio.workload.name}, against always", trio.workload.title, trio.rows)
            for trio in trios
        ],
        failures,
    )
