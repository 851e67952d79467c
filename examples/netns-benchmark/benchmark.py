# SPDX-License-Identifier: Apache-2.0
"""Plain against spliced TCP, alternately, in one run. See README.md beside this file."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import watching
from programs import Cost, counting, read_costs
from testbed import Interrupted, Testbed, TestbedError, interrupt_on_signals
from workloads import WRK_WORKLOADS, Load, Metric, Sample, Workload, matrix, missing_programs

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
READY_SECONDS = 30.0
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Splicing:
    """What the daemon said and cost during the spliced leg."""

    spliced: int
    redirected_messages: int
    passed_messages: int
    rescued: int
    cpu_percent: float
    rss_kib: int
    programs: dict[str, Cost]  # with --programs


@dataclass(frozen=True)
class Pair:
    plain: Sample
    spliced: Sample
    splicing: Splicing | None

    def ratio(self, key: str) -> float:
        return self.spliced.metrics[key] / self.plain.metrics[key]


class Splicer:
    """The daemon under test, on the test bed's own cgroup, run directory and bpffs."""

    def __init__(self, bed: Testbed, command: str, arguments: Sequence[str], timed: bool) -> None:
        self._bed = bed
        self._command = command
        self._arguments = arguments
        self._timed = timed
        self._run_dir = bed.directory / "run"
        self.failures: list[str] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        ready = self._bed.directory / "ready"
        ready.unlink(missing_ok=True)
        log_path = self._bed.directory / "splicer.log"
        command = [self._command, "run", "--cgroup", str(self._bed.cgroup), "--run-dir", str(self._run_dir)]
        command += ["--pin-dir", str(self._bed.bpffs / "splicer"), "--ready-file", str(ready)]
        with log_path.open("wb") as log:
            daemon = self._bed.start([*command, *self._arguments], stderr=log)
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if daemon.poll() is not None:
                raise TestbedError(f"splicer run failed ({daemon.returncode}): {_tail(log_path)}")
            if time.monotonic() > deadline:
                raise TestbedError(f"splicer run is not ready after {READY_SECONDS:g} s: {_tail(log_path)}")
            time.sleep(0.02)
        try:
            yield daemon
        finally:
            if (status := self._bed.stop(daemon)) != OK:
                # Not an exception: it would hide the one that may be on its way.
                self.failures.append(f"splicer run ended with {status}: {_tail(log_path)}")

    @contextlib.contextmanager
    def timed(self) -> Iterator[dict[str, Cost]]:
        """What each program cost in the context, known when it is left; nothing without --programs."""
        costs: dict[str, Cost] = {}
        if not self._timed:
            yield costs
            return
        with counting():
            before = read_costs(self._bed.bpffs)
            yield costs
            after = read_costs(self._bed.bpffs)
        costs.update({name: cost - before[name] for name, cost in after.items()})

    def status(self) -> dict[str, Any]:
        command = [self._command, "status", "--json", "--run-dir", str(self._run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TestbedError(f"splicer status failed ({done.returncode}): {done.stderr.strip()}")
        status: dict[str, Any] = json.loads(done.stdout)
        return status


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-8:]) or "no output"


def _cpu_seconds(pid: int) -> float:
    # Fields after the command name, which may itself contain spaces: utime and stime are the 12th and 13th.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def measure_spliced(
    splicer: Splicer, workload: Workload, bed: Testbed, load: Load
) -> tuple[Sample, Splicing]:
    with splicer.running() as daemon:
        before, cpu, begin = splicer.status()["totals"], _cpu_seconds(daemon.pid), time.monotonic()
        with splicer.timed() as programs:
            sample = workload.measure(bed, load)
        busy = (_cpu_seconds(daemon.pid) - cpu) / (time.monotonic() - begin)
        totals = splicer.status()["totals"]
        keys = ("spliced", "redirected_messages", "passed_messages", "rescued")
        counts = {key: totals[key] - before[key] for key in keys}
        percent = round(100 * busy, 1)
        return sample, Splicing(
            **counts, cpu_percent=percent, rss_kib=_rss_kib(daemon.pid), programs=programs
        )


def measure_pair(splicer: Splicer | None, workload: Workload, bed: Testbed, load: Load, number: int) -> Pair:
    """One plain and one spliced leg; every other pair the other way round, so that drift cancels out."""
    plain: list[Sample] = []
    spliced: list[tuple[Sample, Splicing | None]] = []

    def plain_leg() -> None:
        plain.append(workload.measure(bed, load))

    def spliced_leg() -> None:
        if splicer is None:
            spliced.append((workload.measure(bed, load), None))
        else:
            spliced.append(measure_spliced(splicer, workload, bed, load))

    for leg in (plain_leg, spliced_leg) if number % 2 == 0 else (spliced_leg, plain_leg):
        leg()
    return Pair(plain[0], *spliced[0])


@dataclass(frozen=True)
class Row:
    """One metric over all pairs."""

    metric: Metric
    pairs: Sequence[Pair]

    @property
    def plain(self) -> float:
        return median(pair.plain.metrics[self.metric.key] for pair in self.pairs)

    @property
    def spliced(self) -> float:
        return median(pair.spliced.metrics[self.metric.key] for pair in self.pairs)

    @property
    def ratios(self) -> list[float]:
        return sorted(pair.ratio(self.metric.key) for pair in self.pairs)

    @property
    def ratio(self) -> float:
        return median(self.ratios)


@dataclass(frozen=True)
class Result:
    workload: Workload
    pairs: Sequence[Pair]

    @property
    def rows(self) -> list[Row]:
        return [Row(metric, self.pairs) for metric in self.workload.metrics]

    @property
    def splicings(self) -> list[Splicing]:
        return [pair.splicing for pair in self.pairs if pair.splicing is not None]

    def errors(self, leg: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for pair in self.pairs:
            sample: Sample = getattr(pair, leg)
            for kind, count in sample.errors.items():
                total[kind] = total.get(kind, 0) + count
        return total

    def failures(self, check: bool) -> list[str]:
        """What makes the run fail: errors and missing splices always, the bounds with --check."""
        found = [f"errors in the {leg} legs" for leg in ("plain", "spliced") if self.errors(leg)]
        if self.workload.expects_splices and any(not s.redirected_messages for s in self.splicings):
            found.append("a spliced leg redirected nothing")
        if check and self.splicings:
            for row in self.rows:
                if not row.metric.holds(row.ratio):
                    sign = ">=" if row.metric.higher_is_better else "<="
                    found.append(f"{row.metric.label}: {row.ratio:.2f}, wanted {sign} {row.metric.bound}")
        return [f"{self.workload.name}: {what}" for what in found]

    def to_json(self, check: bool) -> dict[str, Any]:
        keys = self.pairs[0].plain.metrics
        metrics = {}
        for key in keys:
            row = Row(Metric(key, key), self.pairs)
            metrics[key] = {
                "plain": row.plain,
                "spliced": row.spliced,
                "ratio": {"median": row.ratio, "min": row.ratios[0], "max": row.ratios[-1]},
                "plain_samples": [pair.plain.metrics[key] for pair in self.pairs],
                "spliced_samples": [pair.spliced.metrics[key] for pair in self.pairs],
            }
        return {
            "name": self.workload.name,
            "title": self.workload.title,
            "metrics": metrics,
            "requests": {
                "plain": [pair.plain.requests for pair in self.pairs],
                "spliced": [pair.spliced.requests for pair in self.pairs],
            },
            "errors": {leg: self.errors(leg) for leg in ("plain", "spliced")},
            "splicing": [asdict(splicing) for splicing in self.splicings],
            "failures": self.failures(check),
        }

    def to_line(self) -> str:
        """The first metric alone, for tables with a line per workload."""
        row = self.rows[0]
        low, high = row.ratios[0], row.ratios[-1]
        redirected = median([s.redirected_messages for s in self.splicings] or [0])
        return (
            f"{self.workload.name:<28}{_number(row.plain):>9}{_number(row.spliced):>9}"
            f"  {row.ratio:.2f} ({low:.2f} - {high:.2f}){_number(redirected):>12}"
        )

    def to_text(self) -> str:
        lines = ["", f"{self.workload.name}: {self.workload.title}"]
        lines.append(f"  {'':<14}{'plain':>11}{'spliced':>11}   {'ratio':>5} (min - max)")
        for row in self.rows:
            low, high = row.ratios[0], row.ratios[-1]
            lines.append(
                f"  {row.metric.label:<14}{_number(row.plain):>11}{_number(row.spliced):>11}"
                f"   {row.ratio:>5.2f} ({low:.2f} - {high:.2f})"
            )
        for leg in ("plain", "spliced"):
            if errors := self.errors(leg):
                lines.append(f"  ERRORS {leg}: " + ", ".join(f"{kind} {n}" for kind, n in errors.items()))
        lines.append(f"  spliced legs: {self._splicing_text()}")
        if text := self._programs_text():
            lines.append(f"  programs, for a request: {text}")
        return "\n".join(lines)

    def _programs_text(self) -> str:
        """Calls of each program for a request, and the time of one: medians of the legs."""
        found: dict[str, list[tuple[float, float]]] = {}
        for pair in self.pairs:
            for name, cost in (pair.splicing.programs if pair.splicing else {}).items():
                if cost.calls:
                    each = cost.calls / pair.spliced.requests, cost.nanoseconds / cost.calls
                    found.setdefault(name, []).append(each)
        parts, total = [], 0.0
        for name, costs in found.items():
            calls, nanoseconds = median(c for c, _ in costs), median(n for _, n in costs)
            total += calls * nanoseconds / 1000
            if calls >= 0.05:
                parts.append(f"{name} {calls:.1f} x {nanoseconds:.0f} ns")
        return ", ".join(parts) + f";\n    {total:.2f} us in all" if parts else ""

    def _splicing_text(self) -> str:
        if not self.splicings:
            return "plain as well (--baseline)"
        keys = [key for key in asdict(self.splicings[0]) if key != "programs"]
        middle = {key: median(asdict(s)[key] for s in self.splicings) for key in keys}
        rescued = sum(s.rescued for s in self.splicings)
        return (
            f"{_number(middle['redirected_messages'])} messages redirected, "
            f"{_number(middle['passed_messages'])} passed,\n    {middle['spliced']:g} connections spliced, "
            f"{rescued} rescued; daemon {middle['cpu_percent']:.1f} % CPU, {middle['rss_kib'] / 1024:.0f} MiB"
        )


def _number(value: float) -> str:
    """Four significant digits, thousands apart."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Measures plain and spliced TCP alternately, in network namespaces of its own.",
        epilog="wrk's legs are rounded up to whole seconds. Exit code 1: wrk reported errors, "
        "a leg that should be spliced was not, splicer failed, or --check did.",
    )
    add = parser.add_argument
    add("-n", "--alternations", type=_positive_int, default=5, metavar="N", help="pairs of legs (5)")
    add("-t", "--seconds", type=_positive, metavar="T", help="length of a leg (3; 1 with --matrix)")
    add("--only", action="append", metavar="NAME", help="these workloads; shell patterns, repeatable")
    add("--matrix", action="store_true", help="ping-pong and stream on one connection, instead of wrk")
    add("--watch", action="store_true", help="what looking after spliced connections costs the daemon")
    add("--list", action="store_true", help="list the workloads and stop")
    add("--check", action="store_true", help="fail where a ratio is worse than the workload's bound")
    add("--baseline", action="store_true", help="both legs plain: shows the noise of the ratios")
    add("--programs", action="store_true", help="time the BPF programs as well (wrk only; some 40 ns a call)")
    add("--json", action="store_true", help="the result as JSON")
    add("--splicer", metavar="PATH", help="the command to test (the repository's .venv/bin/splicer)")
    add("--mode", choices=("adaptive", "eager"), help="passed on to splicer run")
    add("--connections", type=_positive_int, metavar="N", help="wrk's connections (16; 10000 with --watch)")
    add("--threads", type=_positive_int, default=1, metavar="N", help="wrk's threads (1)")
    add("--workers", type=_positive_int, default=1, metavar="N", help="nginx's workers (1)")
    options = parser.parse_args(arguments)
    if options.programs and (options.matrix or options.baseline):
        parser.error("--programs is for wrk's workloads, and not for --baseline")
    if options.watch and (options.matrix or options.baseline or options.only):
        parser.error("--watch is measured by itself")
    if options.connections is None:
        options.connections = watching.CONNECTIONS if options.watch else 16
    return options


def _positive(text: str) -> float:
    if (value := float(text)) <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _positive_int(text: str) -> int:
    return int(_positive(str(int(text))))


def select_workloads(options: argparse.Namespace) -> list[Workload]:
    """Raises TestbedError for a pattern that names nothing."""
    every: list[Workload] = list(matrix()) if options.matrix else list(WRK_WORKLOADS)
    if not options.only:
        return every
    for pattern in options.only:
        if not fnmatch.filter([workload.name for workload in every], pattern):
            raise TestbedError(f"no workload is called {pattern}; --list names them")
    return [w for w in every if any(fnmatch.fnmatch(w.name, pattern) for pattern in options.only)]


def find_splicer(path: str | None) -> str:
    candidates = [path] if path else [str(REPOSITORY / ".venv/bin/splicer"), "splicer"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return str(Path(found).absolute())
    raise TestbedError(f"no such command: {candidates[0]}; try: make setup")


def refuse_company(command: str) -> None:
    """A splicer that serves the whole host would splice the plain legs as well."""
    done = subprocess.run([command, "status", "--json"], capture_output=True, text=True, check=False)
    if done.returncode == OK:
        status = json.loads(done.stdout)
        where = f"pid {status['pid']}, {status['cgroup']}"
        raise TestbedError(f"splicer already runs here ({where}); stop it first")


def describe_machine() -> dict[str, Any]:
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "nginx": nginx.strip().rpartition("/")[2],
    }


def run(options: argparse.Namespace) -> int:
    workloads = select_workloads(options)
    if options.list:
        print("\n".join(f"{workload.name:<28}{workload.title}" for workload in workloads))
        return OK
    if missing := missing_programs():
        raise TestbedError(f"missing: {', '.join(missing)}; try: make setup-test")
    if options.watch:
        return run_watch(options)
    seconds = options.seconds or (1.0 if options.matrix else 3.0)
    load = Load(seconds, options.connections, options.threads, options.workers)
    machine = describe_machine()
    results: list[Result] = []
    splicer: Splicer | None = None
    with Testbed() as bed:
        if not options.baseline:
            command = find_splicer(options.splicer)
            refuse_company(command)
            splicer = Splicer(
                bed, command, ["--mode", options.mode] if options.mode else [], options.programs
            )
        if not options.json:
            print(
                f"Linux {machine['kernel']}, {machine['cpus']} CPUs, nginx {machine['nginx']}; "
                f"{options.alternations} alternations of {seconds:g} s"
            )
            if options.matrix:
                print("rr: exchanges/s; stream: Gbit/s; redirected: messages in a spliced leg\n")
                print(f"{'':<28}{'plain':>9}{'spliced':>9}  ratio (min - max){'redirected':>11}")
        for workload in workloads:
            pairs = []
            for number in range(options.alternations):
                _progress(f"{workload.name} {number + 1}/{options.alternations}")
                pairs.append(measure_pair(splicer, workload, bed, load, number))
            _progress("")
            results.append(Result(workload, pairs))
            if not options.json:
                print(results[-1].to_line() if options.matrix else results[-1].to_text(), flush=True)
    failures = [failure for result in results for failure in result.failures(options.check)]
    failures += splicer.failures if splicer else []
    if options.json:
        document = {
            "schema": 1,
            "ok": not failures,
            "machine": machine,
            "load": {**asdict(load), "alternations": options.alternations, "mode": options.mode or "default"},
            "workloads": [result.to_json(options.check) for result in results],
        }
        print(json.dumps(document, indent=2))
    for failure in failures:
        print(f"benchmark: {failure}", file=sys.stderr)
    return FAILURE if failures else OK


def run_watch(options: argparse.Namespace) -> int:
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        room = max(options.connections * 2, 1024)
        splicer = Splicer(bed, command, ["--mode=eager", f"--max-connections={room}"], timed=True)
        seconds = options.seconds or 10.0
        found = watching.measure(splicer, bed, options.connections, seconds, _cpu_seconds)
    print(watching.report(found, options.json))
    failures = splicer.failures + (found.failures() if options.check else [])
    for failure in failures:
        print(f"benchmark: {failure}", file=sys.stderr)
    return FAILURE if failures else OK


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    interrupt_on_signals()
    try:
        return run(options)
    except TestbedError as error:
        _progress("")
        print(f"benchmark: {error}", file=sys.stderr)
        return FAILURE
    except Interrupted as signal_name:
        _progress("")
        print(f"benchmark: {signal_name}: cleaned up", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
