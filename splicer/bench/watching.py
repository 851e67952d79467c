# SPDX-License-Identifier: Apache-2.0
"""What looking at spliced connections costs the daemon: all of them once a second, and those that ask."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from splicer.bench.progress import Progress
from splicer.bench.splicing import Splicer, cpu_seconds
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import LOADS, Testbed, TestbedError
from splicer.kernel.costs import Cost, counting, read_costs

CONNECTIONS = 10_000
# Below the ports that clients are given.
PORT = 900
# Processes that share them: a process may have only so many files.
CROWDS = 4
# Messages a second that have splicer look at a connection: each is a look of its own, 20 ms later.
RATE = 25.0
# Share of one CPU, in percent, that the looks once a second may take with CONNECTIONS.
BOUND = 3.0
TURNS = 4
PATIENCE = 10.0  # seconds
# So long after it was spliced a connection is looked at more closely (NEW_NS in bpf/watch.c).
NEW = 4.0


@dataclass(frozen=True)
class Leg:
    """The daemon's CPU time (percent of one CPU) and the runs of the watch program, over some seconds."""

    cpu_percent: float
    runs_per_second: float
    ns_per_run: float


@dataclass(frozen=True)
class Watching:
    """`idle`: no connection; `quiet`: all are spliced, and silent; `asking`: some ask to be looked at."""

    connections: int
    seconds: float
    asks_per_second: float
    idle: Leg
    quiet: Leg
    asking: Leg

    @property
    def percent_for_all(self) -> float:
        return self.quiet.cpu_percent - self.idle.cpu_percent

    @property
    def percent_for_asking(self) -> float:
        return self.asking.cpu_percent - self.quiet.cpu_percent

    @property
    def runs_per_ask(self) -> float:
        return (self.asking.runs_per_second - self.quiet.runs_per_second) / self.asks_per_second

    def failures(self) -> list[str]:
        """The bound, for CONNECTIONS of them."""
        wanted = BOUND * self.connections / CONNECTIONS
        if self.percent_for_all <= wanted:
            return []
        return [f"watch: {self.percent_for_all:.1f} % of a CPU once a second, wanted <= {wanted:g}"]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "percent_for_all": self.percent_for_all,
            "percent_for_asking": self.percent_for_asking,
            "runs_per_ask": self.runs_per_ask,
        }

    def to_text(self) -> str:
        quiet, asking = self.quiet, self.asking
        return "\n".join(
            (
                f"{self.connections} spliced connections, {self.seconds:g} s each; percent of one CPU",
                f"  all of them once a second   {self.percent_for_all:6.2f} % "
                f"(beside {self.idle.cpu_percent:.2f} % without connections)",
                f"                              {quiet.runs_per_second:6.0f} runs/s of watch, "
                f"{quiet.ns_per_run:.0f} ns each",
                f"  {self.asks_per_second:.0f} of them ask in a second {self.percent_for_asking:8.2f} % more",
                f"                              {self.runs_per_ask:6.1f} runs of watch for each, "
                f"{asking.ns_per_run:.0f} ns each",
            )
        )


@contextlib.contextmanager
def crowd(bed: Testbed, number: int) -> Iterator[subprocess.Popen[bytes]]:
    """So many connections, made and silent; one of the processes that hold them."""
    shares = [len(range(start, number, CROWDS)) for start in range(min(CROWDS, number))]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for place, share in enumerate(shares):
            command = [
                sys.executable,
                "-I",
                str(LOADS / "crowd.py"),
                str(PORT + place),
                str(share),
                str(RATE),
            ]
            children.append(bed.start(command, bed.server, stdout=subprocess.PIPE, stdin=subprocess.PIPE))
        for child in children:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise TestbedError(
                    f"{number} connections cannot be made",
                    hint="ulimit -Hn says how many files a process may have",
                )
        yield children[0]
    finally:
        for child in children:
            bed.stop(child)


def _wait_spliced(splicer: Splicer, number: int) -> None:
    # A few may stay plain: at the rendezvous one client may take the place of another.
    deadline = time.monotonic() + PATIENCE
    while (spliced := splicer.status()["connections"]["spliced"]) < 0.99 * number:
        if time.monotonic() > deadline:
            raise TestbedError(f"{spliced} of {number} connections are spliced")
        time.sleep(0.2)


def measure(splicer: Splicer, number: int, seconds: float, progress: Progress) -> Watching:
    """With one daemon: without connections, then all quiet and some asking in turn, for machines drift."""
    bed = splicer.bed
    progress.begin(3 * TURNS)

    def look_on(asking: subprocess.Popen[bytes] | None = None) -> _Sum:
        progress.step("watching")
        if asking:
            _toggle(asking)
        before, begun = cpu_seconds(daemon.pid), time.monotonic()
        costs = read_costs(bed.bpffs)["watch"]
        time.sleep(seconds / TURNS)
        found = _Sum(
            time.monotonic() - begun, cpu_seconds(daemon.pid) - before, read_costs(bed.bpffs)["watch"] - costs
        )
        if asking:
            _toggle(asking)
        return found

    quiet: list[_Sum] = []
    asking: list[_Sum] = []
    with splicer.running() as daemon, counting():
        time.sleep(2)
        idle = [look_on() for _ in range(TURNS)]
        with crowd(bed, number) as child:
            _wait_spliced(splicer, number)
            time.sleep(NEW)
            for _ in range(TURNS):
                quiet.append(look_on())
                asking.append(look_on(child))
            _wait_spliced(splicer, number)
    return Watching(number, seconds, RATE, _make_leg(idle), _make_leg(quiet), _make_leg(asking))


@dataclass(frozen=True)
class _Sum:
    seconds: float
    cpu_seconds: float
    runs: Cost


def _make_leg(turns: list[_Sum]) -> Leg:
    seconds = sum(turn.seconds for turn in turns)
    calls = sum(turn.runs.calls for turn in turns)
    return Leg(
        100 * sum(turn.cpu_seconds for turn in turns) / seconds,
        calls / seconds,
        sum(turn.runs.nanoseconds for turn in turns) / max(calls, 1),
    )


def _toggle(child: subprocess.Popen[bytes]) -> None:
    """Have some of the connections that it holds ask to be looked at, or have them end it."""
    assert child.stdin is not None
    child.stdin.write(b".")
    child.stdin.flush()


def run(workshop: Workshop) -> Findings:
    """The suite `watch`."""
    options = workshop.options
    number = options.connections or CONNECTIONS
    room = f"--max-connections={max(number * 2, 1024)}"
    with workshop.splicing(["--mode=eager", room], timed=True) as splicer:
        found = measure(splicer, number, options.seconds or 10.0, workshop.progress)
    workshop.write(found.to_text())
    failures = splicer.failures + (found.failures() if options.check else [])
    return Findings("watch", found.to_json(), failures=failures)
