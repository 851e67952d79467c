# SPDX-License-Identifier: Apache-2.0
"""One connection under load, by size of message: the matrix, the table of streams, and one that spins."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from splicer.bench.model import Expected, Load, Metric, Sample
from splicer.bench.nginx import LOOPBACK
from splicer.bench.testbed import LOADS, SERVER_ADDRESS, Testbed, run_load

LOAD_PORT = 9000
MATRIX_SIZES = (64, 1024, 16384, 262144)
STREAM_SIZES = (1024, 4096, 16384, 65536, 262144, 1048576)
BOUND = 0.97
PATTERNS = {"rr": "ping-pong", "stream": "stream", "always": "stream"}


@dataclass(frozen=True)
class Cell:
    """One connection, driven by load.py. Patterns: `rr` is a ping-pong, `stream` goes one way,
    and so does `always`, of which splicer never lets go.

    The two processes of a ping-pong share a CPU, those of the others do not. Left to the scheduler
    they do now one and now the other, and that decides the result more than anything under test.
    """

    path: str
    pattern: str
    size: int
    nagle: bool
    bound: float | None = BOUND

    @property
    def name(self) -> str:
        return f"{self.path}-{self.pattern}-{self.size}-{'nagle' if self.nagle else 'nodelay'}"

    @property
    def programs(self) -> tuple[str, ...]:
        return ("ip",)

    @property
    def title(self) -> str:
        always = ", always redirected" if self.always_redirects else ""
        return (
            f"{PATTERNS[self.pattern]} of {self.size} bytes over {self.path}, "
            f"Nagle {'on' if self.nagle else 'off'}{always}"
        )

    @property
    def is_stream(self) -> bool:
        return self.pattern in ("stream", "always")

    @property
    def always_redirects(self) -> bool:
        return self.pattern == "always"

    @property
    def daemon_options(self) -> tuple[str, ...]:
        # Adoption needs a quiet moment, which the greeting may or may not give.
        return ("--mode", "eager") if self.always_redirects else ()

    @property
    def expected(self) -> Expected:
        # A stream that TCP serves better is rightly taken out.
        return "spliced" if self.always_redirects else "either"

    @property
    def unit(self) -> str:
        return "message" if self.is_stream else "exchange"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.is_stream:
            return (Metric("rate", "Gbit/s", bound=self.bound),)
        return (Metric("rate", "exchanges/s", bound=self.bound), Metric("p50_us", "p50 us", False))

    def measure(self, bed: Testbed, load: Load) -> Sample:
        where, address = bed.client, SERVER_ADDRESS
        if self.path == "loopback":
            where, address = bed.server, LOOPBACK
        program = [sys.executable, "-I", str(LOADS / "load.py")]
        nodelay = "0" if self.nagle else "1"
        drive = ["drive", address, str(LOAD_PORT), self._pattern, str(self.size), nodelay, str(load.seconds)]
        with self._credits(bed) as credits:
            server = bed.start(
                [*program, "serve", address, str(LOAD_PORT), *credits], bed.server, subprocess.PIPE, cpu=1
            )
            try:
                assert server.stdout is not None
                server.stdout.readline()
                cpu = 1 if self.pattern == "rr" else 0
                found = json.loads(run_load(bed, [*program, *drive, *credits], where, cpu))
            finally:
                bed.stop(server)
        return _make_sample(found)

    @property
    def _pattern(self) -> str:
        """load.py's word for it."""
        return "stream" if self.always_redirects else self.pattern

    @contextlib.contextmanager
    def _credits(self, bed: Testbed) -> Iterator[tuple[str, ...]]:
        """Where nothing else bounds what waits to be read, a FIFO by which the reader does."""
        if not self.always_redirects:
            yield ()
            return
        path = bed.directory / "credits"
        os.mkfifo(path)
        try:
            yield (str(path),)
        finally:
            path.unlink()


@dataclass(frozen=True)
class Spin:
    """A ping-pong whose ends call recv again and again, each on a CPU of its own: spin.lua, run by wrk."""

    bound: float
    name: str = "spin"
    title: str = "ping-pong of 64 bytes over loopback, both ends spin on recv"
    expected: Expected = "either"
    unit: str = "exchange"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    programs: tuple[str, ...] = ("ip", "wrk")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("rate", "exchanges/s", bound=self.bound), Metric("p50_us", "p50 us", False))

    def measure(self, bed: Testbed, load: Load) -> Sample:
        server = bed.start(make_spin("serve", LOAD_PORT), bed.server, subprocess.PIPE, cpu=1)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            drive = make_spin("drive", LOAD_PORT, 64, load.seconds)
            found = json.loads(run_load(bed, drive, bed.server, 0))
        finally:
            bed.stop(server)
        return _make_sample(found)


def make_spin(*words: object) -> list[str]:
    """The command; see spin.lua. wrk wants a URL, and does not get so far as to look at it."""
    spin = "SPIN=" + " ".join(str(word) for word in words)
    return ["env", spin, "wrk", "-s", str(LOADS / "spin.lua"), "http://-/"]


def _make_sample(found: dict[str, Any]) -> Sample:
    requests, sent_bytes = found.pop("requests"), found.pop("sent_bytes")
    return Sample(found, requests=requests, sent_bytes=sent_bytes)


def matrix() -> Iterator[Cell]:
    axes = (("loopback", "bridge"), ("rr", "stream"), MATRIX_SIZES, (True, False))
    for path, pattern, size, nagle in itertools.product(*axes):
        yield Cell(path, pattern, size, nagle)


def streams() -> Iterator[Cell]:
    """Without bounds: what the table is for is to see where redirecting loses."""
    for path, size, nagle in itertools.product(("loopback", "bridge"), STREAM_SIZES, (True, False)):
        yield Cell(path, "always", size, nagle, bound=None)
