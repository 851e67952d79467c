# SPDX-License-Identifier: Apache-2.0
"""Leaves CPUs to others by resting. A priority is not enough: between sessions and between cgroups the kernel
takes a CPU from whoever has it at its ticks only, and others wait meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from .process import read_idle_seconds

LEAST_SHARE = 0.03
"""Of a CPU, however busy all are."""
_FIRST_SHARE = 0.25
_WINDOW_S = 0.1
_LEFT, _LITTLE = 0.35, 0.25
"""So many CPUs are left idle. With less than the second one others may wait, and the share falls at once."""
_FALL = 4


def _read_idle() -> float:
    return read_idle_seconds(os.sched_getaffinity(0))


class Sparing:
    """A share of a CPU that follows how many CPUs are idle. Whoever works in small portions rests after
    each."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        read_used: Callable[[], float] = time.thread_time,
        read_idle: Callable[[], float] = _read_idle,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._read_used = read_used
        self._read_idle = read_idle
        self._sleep = sleep
        self.share = _FIRST_SHARE
        self._since, self._idle = clock(), read_idle()
        self._used = read_used()

    def rest(self) -> None:
        """Sleep as long as the share asks for after what was used since the last time."""
        now = self._clock()
        if now - self._since >= _WINDOW_S:
            self._judge(now)
        used = self._read_used()
        if self.share < 1:
            self._sleep((used - self._used) * (1 / self.share - 1))
        self._used = used

    def _judge(self, now: float) -> None:
        idle = self._read_idle()
        spare = (idle - self._idle) / (now - self._since)
        if spare >= _LEFT:
            self.share = min(1.0, self.share + (spare - _LEFT))
        elif spare < _LITTLE:
            self.share = max(LEAST_SHARE, self.share / _FALL)
        self._since, self._idle = now, idle
