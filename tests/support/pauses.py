# SPDX-License-Identifier: Apache-2.0
"""How fast this machine itself is: what a hypervisor took from a CPU is no delay of the daemon's, and a
machine that is emulated needs longer for everything."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import datetime

# How many times slower than usual this machine is known to be: tests/vm sets it for its guests. What is
# waited for may take so many times longer.
SLOWNESS = float(os.environ.get("SPLICER_TEST_SLOWNESS", "1"))

TICK = 0.005  # seconds between two looks at the clock
# Whoever sleeps is woken as late as this on a CPU that is busy. What is beyond is the machine's.
USUAL = 0.02  # seconds
# A reader that has not moved for 40 ms is rescued at the next look, which comes every 20 ms.
RESCUED_WITHIN = 0.2  # seconds after a pause


class Stopwatch:
    """Measures the seconds in which the machine ran; a context manager.

    On each CPU a thread sleeps again and again, and adds up by how much it overslept. What takes several
    processes may meet the pauses of one CPU after those of another, so all of them count. A program that
    sleeps too long, waits for a lock or computes does not make these threads late, and is measured in full.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._ended: float | None = None
        # Of each CPU: seconds that it stood still so far, and when it was last seen to run.
        self._seen: dict[int, tuple[float, float]] = {}
        # Begin and end of each, by the wall clock.
        self.pauses: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._cpus = sorted(os.sched_getaffinity(0))
        self._threads = [threading.Thread(target=self._look, args=(cpu,), daemon=True) for cpu in self._cpus]

    def __enter__(self) -> Stopwatch:
        self._begun = time.monotonic()
        self._seen = dict.fromkeys(self._cpus, (0.0, self._begun))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def paused(self) -> float:
        """Seconds in which a CPU ran nothing of ours, of all CPUs together, with a pause that goes on."""
        return sum(paused + self._late(seen) for paused, seen in self._seen.copy().values())

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, until the end if there was one, without pauses. Those of a machine
        that is slow are longer."""
        return max(self._now() - self._begun - self.paused, 0.0) / SLOWNESS

    def _now(self) -> float:
        return time.monotonic() if self._ended is None else self._ended

    def _late(self, seen: float) -> float:
        return max(self._now() - seen - TICK - USUAL, 0.0)

    def _look(self, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        while not self._over.is_set():
            time.sleep(TICK)
            paused, seen = self._seen[cpu]
            if late := self._late(seen):
                wall = time.time()
                self.pauses.append((wall - (time.monotonic() - seen), wall))
            self._seen[cpu] = (paused + late, self._now())


def count_explained_rescues(log: str, watch: Stopwatch) -> int:
    """Ends that the daemon, by its log, took for stuck right after a CPU had stood still: their readers may
    just not have been let run."""
    explained = 0
    for line in log.splitlines():
        if '"event": "rescued"' not in line:
            continue
        entry = json.loads(line)
        when = datetime.fromisoformat(entry["timestamp"]).timestamp()
        if any(begin < when < end + RESCUED_WITHIN for begin, end in watch.pauses.copy()):
            explained += int(entry["ends"])
    return explained


def sleep(seconds: float) -> None:
    """Until the machine has run for so many seconds: whoever may run has got somewhere."""
    with Stopwatch() as watch:
        while (left := seconds - watch.seconds) > 0:
            time.sleep(left)
