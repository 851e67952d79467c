# SPDX-License-Identifier: Apache-2.0
"""How soon busy connections are spliced, and what that costs the daemon."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from splicer.bench import nginx
from splicer.bench.model import Record
from splicer.bench.splicing import Splicer, cpu_seconds
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import LOADS, SERVER_ADDRESS, Testbed, TestbedError

PORT = 9000
# So many seconds after the load has begun it is counted which connections are spliced.
MOMENTS = (0.3, 0.6, 1.0, 2.0, 4.0)
SIZES = (64, 1024, 16384)
COUNTS = (1, 16, 64, 256, 1000)
ROWS = 4 + len(COUNTS)
GLANCE = 0.005  # seconds
WORKERS = 4


@dataclass
class Row:
    """The part of the connections that was spliced at each of MOMENTS; how old those were, in ms, when they
    were; and the daemon's share of one CPU."""

    title: str
    connections: int
    shares: list[float] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    cpu_percent: float = 0.0
    rescued: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "p50_ms": self._quantile(0.5), "p95_ms": self._quantile(0.95)}

    def _quantile(self, part: float) -> float | None:
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None

    def to_line(self) -> str:
        shares = "".join(f"{share:6.0%}" for share in self.shares)
        found = (self._quantile(0.5), self._quantile(0.95), max(self.times_ms, default=None))
        times = "".join("      -" if each is None else f"{each:7.1f}" for each in found)
        line = f"{self.title:<28}{shares}{times}"
        return f"{line}\n  {self.rescued} rescued" if self.rescued else line


HEAD = (
    f"{'spliced after':<28}{''.join(f'{moment:5g}s' for moment in MOMENTS)}{'p50':>7}{'p95':>7}{'max ms':>7}"
)


@contextlib.contextmanager
def busy(bed: Testbed, loops: int) -> Iterator[None]:
    """So many processes for each CPU that never wait."""
    children = [
        bed.start([sys.executable, "-I", "-c", "while True: pass"], cpu=cpu)
        for cpu, _ in itertools.product(range(len(os.sched_getaffinity(0))), range(loops))
    ]
    try:
        yield
    finally:
        for child in children:
            bed.stop(child)


class Bench:
    """The rows, of one splicer. So many `trials` are made of each ping-pong."""

    def __init__(self, splicer: Splicer, trials: int) -> None:
        self._splicer = splicer
        self._bed = splicer.bed
        self._trials = trials

    def rows(self) -> Iterator[Row]:
        for loops, beside in ((0, ""), (1, ", busy loops")):
            with busy(self._bed, loops):
                yield self._ping(f"one ping-pong{beside}")
        for number in COUNTS:
            yield self._wrk(f"wrk, small responses, {number}", "/small", number)
        with busy(self._bed, 1):
            yield self._wrk("the same, busy loops, 256", "/small", 256)
            yield self._wrk("1 MB bodies, busy loops, 24", "/1m", 24)

    def _ping(self, title: str) -> Row:
        """One connection after the other, each until it is spliced or for as long as the last of MOMENTS."""
        row = Row(title, len(SIZES) * 2 * self._trials)
        spliced_after: list[float] = []
        with self._measuring(row), self._splicer.reading_pairs() as read:
            for size, nodelay, _ in itertools.product(SIZES, (0, 1), range(self._trials)):
                begun, record = self._play(size, nodelay, read)
                if record is not None:
                    spliced_after.append(record.changed_ns / 1e9 - begun)
                    row.times_ms.append(record.age_ms)
        row.shares = [
            sum(1 for each in spliced_after if each <= moment) / row.connections for moment in MOMENTS
        ]
        return row

    def _play(self, size: int, nodelay: int, read: Callable[[], list[Record]]) -> tuple[float, Record | None]:
        """When the driver was started, and its connection if that was spliced."""
        program = [sys.executable, "-I", str(LOADS / "load.py")]
        words = [nginx.LOOPBACK, str(PORT)]
        serve, drive = [*program, "serve", *words], [*program, "drive", *words, "rr"]
        # Both are ended in the middle of a read, and say so.
        silent = subprocess.DEVNULL
        server = self._bed.start(serve, self._bed.server, subprocess.PIPE, stderr=silent)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            begun = time.monotonic()
            drive += [str(size), str(nodelay), str(MOMENTS[-1])]
            driver = self._bed.start(drive, self._bed.server, stderr=silent)
            try:
                found = None
                while found is None and time.monotonic() < begun + MOMENTS[-1]:
                    time.sleep(GLANCE)
                    found = next((record for record in read() if record.spliced), None)
            finally:
                self._bed.stop(driver)
        finally:
            self._bed.stop(server)
        deadline = time.monotonic() + 5
        while read():
            if time.monotonic() > deadline:
                raise TestbedError("splicer does not forget a connection that has ended")
            time.sleep(GLANCE)
        return begun, found

    def _wrk(self, title: str, path: str, number: int) -> Row:
        row = Row(title, number)
        address = f"http://{SERVER_ADDRESS}:{nginx.ORIGIN_PORT}{path}"
        command = ["wrk", "-t1", f"-c{number}", f"-d{math.ceil(MOMENTS[-1]) + 1}s", address]
        with (
            self._measuring(row),
            nginx.running(self._bed, WORKERS),
            self._splicer.reading_pairs() as read,
        ):
            begun = time.monotonic()
            driver = self._bed.start(command, self._bed.client)
            try:
                records: Sequence[Record] = ()
                for moment in MOMENTS:
                    time.sleep(max(0.0, begun + moment - time.monotonic()))
                    records = [record for record in read() if record.spliced]
                    row.shares.append(len(records) / number)
                row.times_ms = [record.age_ms for record in records]
            finally:
                self._bed.stop(driver)
        return row

    @contextlib.contextmanager
    def _measuring(self, row: Row) -> Iterator[None]:
        with self._splicer.running() as daemon:
            cpu, begun = cpu_seconds(daemon.pid), time.monotonic()
            yield
            row.cpu_percent = 100 * (cpu_seconds(daemon.pid) - cpu) / (time.monotonic() - begun)
            row.rescued = self._splicer.status()["totals"]["rescued"]


def run(workshop: Workshop) -> Findings:
    """The suite `adopt`."""
    rows = []
    workshop.progress.begin(ROWS)
    with workshop.splicing() as splicer:
        workshop.write(HEAD)
        workshop.progress.step("one ping-pong")
        for row in Bench(splicer, workshop.options.pairs).rows():
            rows.append(row)
            workshop.write(row.to_line())
            workshop.progress.step(f"after: {row.title}")
    busiest = max(row.cpu_percent for row in rows)
    workshop.write(f"the daemon took {busiest:.1f} % of a CPU at most")
    return Findings("adoption", [row.to_json() for row in rows], failures=splicer.failures)
