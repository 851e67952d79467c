# SPDX-License-Identifier: Apache-2.0
"""Suites that are groups of workloads, each measured plain and spliced by turns."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from splicer.bench.apps import APP_WORKLOADS
from splicer.bench.cells import matrix, streams
from splicer.bench.model import Load, Sample, Workload
from splicer.bench.progress import Progress
from splicer.bench.relays import RELAY_WORKLOADS
from splicer.bench.results import TABLE_HEAD, Leg, Result
from splicer.bench.splicing import Splicer
from splicer.bench.suite import Comparison, Findings, Workshop
from splicer.bench.testbed import Testbed
from splicer.bench.workloads import LIFE_WORKLOADS, REFUSED_WORKLOADS, WRK_WORKLOADS, missing_programs
from splicer.errors import SplicerError
from splicer.text import legend, plural

T = TypeVar("T")

CONNECTIONS = 16
# What programs are in, on Debian, where it is called otherwise.
_PACKAGES = {
    "ip": "iproute2",
    "redis-benchmark": "redis-tools",
    "pgbench": "postgresql",
    "varnishd": "varnish",
    "grpcio": "python3-grpcio",
}
# What is printed in the same way as the default: --only finds it without its suite.
_FOUND_BY_NAME = ("wrk", "plain", "lives")


def list_groups() -> dict[str, list[Workload]]:
    """The workloads of each suite that has some."""
    return {
        "wrk": list(WRK_WORKLOADS),
        "plain": list(REFUSED_WORKLOADS),
        "matrix": list(matrix()),
        "streams": list(streams()),
        "relays": list(RELAY_WORKLOADS),
        "lives": list(LIFE_WORKLOADS),
        "apps": list(APP_WORKLOADS),
    }


def select(group: str | None, only: Sequence[str]) -> list[Workload]:
    """Those of a suite, or of the default, whose names match one of the patterns; all without a pattern.

    Raises SplicerError for a pattern that names nothing.
    """
    groups = list_groups()
    if not only:
        return groups[group or "wrk"]
    every = groups[group] if group else [each for name in _FOUND_BY_NAME for each in groups[name]]
    for pattern in only:
        if not fnmatch.filter([workload.name for workload in every], pattern):
            raise SplicerError(f"no workload of that name ({pattern})", hint="splicer bench --list")
    return [each for each in every if any(fnmatch.fnmatch(each.name, pattern) for pattern in only)]


def list_lines(group: str | None, only: Sequence[str]) -> list[str]:
    """Names and titles, for people."""
    found = {group or "": select(group, only)} if group or only else list_groups()
    lines = []
    for name, workloads in found.items():
        lines += ["", f"{name}:"] if len(found) > 1 else []
        lines += legend({workload.name: workload.title for workload in workloads}).splitlines()
    return lines[1:] if len(found) > 1 else lines


def alternate(
    name: str,
    pairs: int,
    progress: Progress,
    plain: Callable[[], Sample],
    spliced: Callable[[], T],
    *,
    kinds: tuple[str, str] = ("plain", "spliced"),
) -> tuple[list[Sample], list[T]]:
    """So many spliced legs, with a plain one before and after each: 2 * `pairs` + 1 steps. `kinds` are what
    the two are called."""
    progress.step(f"{name}: {kinds[0]}")
    plains, splices = [plain()], []
    for turn in range(pairs):
        progress.step(f"{name}: {kinds[1]}, {turn + 1} of {pairs}")
        splices.append(spliced())
        progress.step(f"{name}: {kinds[0]}, {turn + 1} of {pairs}")
        plains.append(plain())
    return plains, splices


def measure(
    splicer: Splicer | None, workload: Workload, bed: Testbed, load: Load, pairs: int, progress: Progress
) -> Result:
    """Without a splicer the spliced legs are plain as well."""

    def measure_spliced() -> Leg:
        if splicer is None:
            return Leg(workload.measure(bed, load), None)
        return Leg(*splicer.measure(workload, load))

    legs = alternate(workload.name, pairs, progress, lambda: workload.measure(bed, load), measure_spliced)
    return Result(workload, *legs)


def compare(result: Result) -> Comparison:
    """What verdict and pictures want of it."""
    redirected = None
    if result.splicings and result.workload.expected != "refused":
        redirected = sum(each.redirected_messages for each in result.splicings)
    return Comparison(result.workload.name, result.workload.title, result.rows, redirected)


def run(workshop: Workshop, group: str, *, tabular: bool) -> Findings:
    """All workloads of a suite that were asked for, one after the other; a line of a table for each if it is
    `tabular`. Raises SplicerError."""
    options, progress = workshop.options, workshop.progress
    workloads = select(None if group == "wrk" and options.only else group, options.only)
    workloads = [workload for workload in workloads if not _is_left_out(group, workload, workshop)]
    missing = sorted({program for workload in workloads for program in missing_programs(workload)})
    if missing or not workloads:
        raise SplicerError(
            f"missing programs ({', '.join(missing) or 'all'})",
            hint=f"apt-get install {' '.join(_PACKAGES.get(each, each) for each in missing or _PACKAGES)}",
        )
    seconds = options.seconds or (2.0 if tabular else 3.0)
    load = Load(seconds, options.connections or CONNECTIONS, options.threads, options.workers)
    results: list[Result] = []
    progress.begin(len(workloads) * (2 * options.pairs + 1))
    with workshop.splicing(timed=options.programs) as splicer:
        workshop.write(
            f"{plural(options.pairs, 'spliced leg')} of {seconds:g} s, a plain one before and after each"
        )
        if tabular:
            workshop.write(f"rr: exchanges/s; streams: Gbit/s; others: requests/s\n\n{TABLE_HEAD}")
        for workload in workloads:
            measured = None if options.baseline else splicer
            results.append(measure(measured, workload, splicer.bed, load, options.pairs, progress))
            workshop.write(results[-1].to_line() if tabular else results[-1].to_text())
        failures = [failure for result in results for failure in result.failures(options.check)]
        failures += splicer.failures
    return Findings(
        "workloads",
        [result.to_json(options.check) for result in results],
        [compare(result) for result in results],
        failures,
        load=asdict(load),
    )


def _is_left_out(group: str, workload: Workload, workshop: Workshop) -> bool:
    """Of programs with loads of their own those that are not installed, unless somebody named them."""
    if group != "apps" or workshop.options.only or not (missing := missing_programs(workload)):
        return False
    workshop.write(f"{workload.name}: left out, without {', '.join(missing)}")
    return True
