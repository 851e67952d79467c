# SPDX-License-Identifier: Apache-2.0
"""How long this machine itself stood still: what a hypervisor took from a CPU is no delay of the daemon's."""

from __future__ import annotations

import os
import threading
import time

TICK = 0.005  # seconds between two looks at the clock
# Whoever sleeps is woken as late as this on a CPU that is busy. What is beyond is the machine's.
USUAL = 0.02  # seconds


class Stopwatch:
    """Measures the seconds in which the machine ran; a context manager.

    On each CPU a thread sleeps again and again, and adds up by how much it overslept. What takes several
    processes may meet the pauses of one CPU after those of another, so all of them count. A program that
    sleeps too long, waits for a lock or computes does not make these threads late, and is measured in full.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._ended: float | None = None
        self._paused: dict[int, float] = {}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._look, args=(cpu,), daemon=True) for cpu in os.sched_getaffinity(0)
        ]

    def __enter__(self) -> Stopwatch:
        for thread in self._threads:
            thread.start()
        self._begun = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self._over.set()
        for thread in self._threads:
            thread.join()

    @property
    def paused(self) -> float:
        """Seconds in which a CPU ran nothing of ours, of all CPUs together."""
        return sum(self._paused.copy().values())

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, until the end if there was one, without pauses."""
        return max((self._ended or time.monotonic()) - self._begun - self.paused, 0.0)

    def _look(self, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        paused, before = 0.0, time.monotonic()
        while not self._over.is_set():
            time.sleep(TICK)
            now = time.monotonic()
            paused += max(now - before - TICK - USUAL, 0.0)
            self._paused[cpu] = paused
            before = now


def sleep(seconds: float) -> None:
    """Until the machine has run for so many seconds: whoever may run has got somewhere."""
    with Stopwatch() as watch:
        while (left := seconds - watch.seconds) > 0:
            time.sleep(left)
