# SPDX-License-Identifier: Apache-2.0
"""What a connection of one request pays for being looked at, though it is never spliced.

wrk's legs of seconds cannot show a few percent on a machine that drifts. Here three processes on one CPU take
turns of a few milliseconds, in an order that is drawn anew each time: one in the watched cgroup, and two
outside of it, whose ratio is the noise. Where a process happens to lie in memory makes a difference of a
percent, so there are new ones now and then.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splicer.bench.splicing import Splicer
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import LOADS, Testbed, TestbedError

ROUNDS, BATCH = 300, 60  # rounds for each of the alternations; connections in a turn
ROUNDS_OF_ONE = 100  # then there are new processes
WARM_UP = 200  # connections
# What the daemon is started with, and how it is called in the table.
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (("as it is", ()), ("--default off", ("--default", "off")))
HEAD = f"{'':<15}{'plain us':>9}{'watched us':>12}  {'ratio (quartiles)':<22}plain/plain"

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """Medians of the time for a connection, in microseconds. Quartiles, of all rounds, of the ratio of plain
    time (the mean of both) to time in the watched cgroup, where more is better; and of plain time to plain
    time."""

    name: str
    rounds: int
    plain_us: float
    watched_us: float
    ratio: Quartiles
    noise: Quartiles

    def to_line(self) -> str:
        return (
            f"{self.name:<15}{self.plain_us:>9.1f}{self.watched_us:>12.1f}  "
            f"{_show(self.ratio):<22}{_show(self.noise)}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _show(found: Quartiles) -> str:
    return f"{found[1]:.3f} ({found[0]:.2f} - {found[2]:.2f})"


def _quartiles(values: Sequence[float]) -> Quartiles:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


class _Worker:
    """A process that makes connections to itself."""

    def __init__(self, bed: Testbed, *, watched: bool) -> None:
        self._bed = bed
        command = [sys.executable, "-I", str(LOADS / "brief.py")]
        pipe = subprocess.PIPE
        self._child = bed.start(command, bed.server, stdin=pipe, stdout=pipe, cpu=1, watched=watched)
        self._read()

    def _read(self) -> bytes:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise TestbedError("brief.py has ended")
        return line

    def take(self, connections: int) -> int:
        """Make so many; the time in nanoseconds."""
        assert self._child.stdin is not None
        self._child.stdin.write(b"%d\n" % connections)
        self._child.stdin.flush()
        return int(self._read())

    def stop(self) -> None:
        self._bed.stop(self._child)


def measure(splicer: Splicer, name: str, options: Sequence[str], rounds: int) -> Row:
    """One row, with a daemon started with these options."""
    times: list[list[int]] = [[], [], []]
    with splicer.running(options):
        for _ in range(0, rounds, ROUNDS_OF_ONE):
            _take_turns(splicer.bed, times)
    watched, plain, other = times
    return Row(
        name,
        len(watched),
        statistics.median(plain) / BATCH / 1e3,
        statistics.median(watched) / BATCH / 1e3,
        _quartiles([(a + b) / 2 / c for a, b, c in zip(plain, other, watched, strict=True)]),
        _quartiles([one / two for one, two in zip(plain, other, strict=True)]),
    )


def _take_turns(bed: Testbed, times: list[list[int]]) -> None:
    """Add what each of three new processes takes for its turns; the first one is watched."""
    workers = [_Worker(bed, watched=place == 0) for place in range(3)]
    try:
        for worker in workers:
            worker.take(WARM_UP)
        for _ in range(ROUNDS_OF_ONE):
            for place in random.sample(range(3), 3):
                times[place].append(workers[place].take(BATCH))
    finally:
        for worker in workers:
            worker.stop()


def run(workshop: Workshop) -> Findings:
    """The suite `connecting`."""
    rounds = workshop.options.pairs * ROUNDS
    rows = []
    workshop.progress.begin(len(ROWS))
    with workshop.splicing() as splicer:
        workshop.write(HEAD)
        for name, options in ROWS:
            workshop.progress.step(name)
            rows.append(measure(splicer, name, options, rounds))
            workshop.write(rows[-1].to_line())
    return Findings("connecting", [row.to_json() for row in rows], failures=splicer.failures)
