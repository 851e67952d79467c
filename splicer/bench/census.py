# SPDX-License-Identifier: Apache-2.0
"""How long it takes to find the connections that are older than splicer, and whether they notice."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from splicer.bench.progress import Progress
from splicer.bench.splicing import Splicer
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import LOADS, Testbed, TestbedError

CONNECTIONS = 5_000
NAMESPACES = 50
PORT = 900
PATIENCE = 30.0  # seconds
# What a census may take, and how much longer than before an exchange may take meanwhile.
BOUND_SECONDS, BOUND_STALL_MS = 5.0, 50.0


@dataclass(frozen=True)
class Census:
    """What was found how soon (seconds), and the longest exchange on any of the connections (milliseconds):
    before, from the start of splicer to the end of the census, and after that for as long as before."""

    connections: int
    namespaces: int
    found: int
    seconds: float
    before_ms: float
    meanwhile_ms: float
    after_ms: float
    spliced: int

    def failures(self) -> list[str]:
        found = []
        if self.seconds > BOUND_SECONDS:
            found.append(f"census: {self.seconds:.1f} s, wanted <= {BOUND_SECONDS:g}")
        if self.meanwhile_ms - self.before_ms > BOUND_STALL_MS:
            found.append(f"census: an exchange took {self.meanwhile_ms:.0f} ms, {self.before_ms:.0f} before")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        return "\n".join(
            (
                f"{self.connections} connections in {self.namespaces} network namespaces, all of them in use",
                f"  found                  {self.found} in {self.seconds:.2f} s",
                f"  longest exchange       {self.before_ms:.1f} ms before, {self.meanwhile_ms:.1f} ms until "
                f"the census was over, {self.after_ms:.1f} ms after",
                f"  spliced at the end     {self.spliced}",
            )
        )


@contextlib.contextmanager
def _elders(bed: Testbed, connections: int, namespaces: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process in each namespace that has its share of the connections."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for place in range(namespaces):
            share = len(range(place, connections, namespaces))
            namespace = bed.add_namespace(f"elders-{place}")
            command = [sys.executable, "-I", str(LOADS / "elders.py"), str(PORT), str(share)]
            children.append(bed.start(command, namespace, stdout=subprocess.PIPE, stdin=subprocess.PIPE))
        for child in children:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise TestbedError(
                    f"{connections} connections cannot be made",
                    hint="ulimit -Hn says how many files a process may have",
                )
        yield children
    finally:
        for child in children:
            bed.stop(child)


def _read(children: list[subprocess.Popen[bytes]]) -> float:
    """The longest exchange since the last time, in milliseconds."""
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b".")
        child.stdin.flush()
    found = []
    for child in children:
        assert child.stdout is not None
        found.append(float(child.stdout.readline()))
    return max(found)


def _wait_taken(splicer: Splicer) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while (census := splicer.status()["census"])["state"] == "running":
        if time.monotonic() > deadline:
            raise TestbedError(f"the census is not done after {PATIENCE:g} s")
        time.sleep(0.1)
    if census["state"] != "done":
        raise TestbedError(f"no census was taken: {census['state']}")
    return dict(census)


def measure(splicer: Splicer, connections: int, seconds: float, progress: Progress) -> Census:
    """Connections first, then splicer."""
    progress.begin(3)
    progress.step("making connections")
    with _elders(splicer.bed, connections, NAMESPACES) as children:
        time.sleep(1)
        _read(children)
        progress.step("before")
        time.sleep(seconds)
        before = _read(children)
        progress.step("with splicer")
        with splicer.running():
            census = _wait_taken(splicer)
            meanwhile = _read(children)
            time.sleep(seconds)
            after = _read(children)
            spliced = splicer.status()["connections"]["spliced"]
    return Census(
        connections,
        NAMESPACES,
        census["found"],
        census["seconds"],
        before,
        meanwhile,
        after,
        spliced,
    )


def run(workshop: Workshop) -> Findings:
    """The suite `census`."""
    options = workshop.options
    with workshop.splicing() as splicer:
        number = options.connections or CONNECTIONS
        found = measure(splicer, number, options.seconds or 10.0, workshop.progress)
    workshop.write(found.to_text())
    failures = splicer.failures + (found.failures() if options.check else [])
    return Findings("census", found.to_json(), failures=failures)
