# SPDX-License-Identifier: Apache-2.0
"""When network namespaces are swept: those where pairs wait to be drained, and those where pairs wait to be
adopted that enlistment.py has no way to.

A sweep puts ends in and takes ends out alike; what differs is the hurry. Sweeps for adoption keep to a share
of one CPU. Those for draining are made at once, then later and later while a reader does not read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from splicer.kernel.layout import ANNOUNCED_BY_WALK, STATE_PAIRED, Event, Pair
from splicer.kernel.sweep import SweepCounts
from splicer.model import REASON_NAMES, STATES

# Sweeps for adoption may use about this share of one CPU, a little more while many pairs find no quiet
# moment.
ADOPT_SHARE = 0.05
ADOPT_PAUSE_S = 0.005
ADOPT_PAUSE_MAX_S = 0.15
# A sweep for adoption has so many turns at most, and only the first ones begin with new pairs.
ADOPT_TURNS = 20
ADOPT_BEGINNINGS = 5
# Draining is more urgent.
DRAIN_PAUSE_S = 0.001
DRAIN_PAUSE_MAX_S = 0.25

_PENDING = REASON_NAMES.index("pending")


class SettingsWriter(Protocol):
    """See kernel.settings.SettingsMap."""

    def write(self, **changes: Any) -> None: ...


class Sweep(Protocol):
    """What the queues need of a Sweeper."""

    @property
    def settings(self) -> SettingsWriter: ...
    def sweep(self, namespaces: Mapping[int, Iterable[int]]) -> SweepCounts: ...


class SweepQueues:
    """The network namespaces of one generation of programs that have to be swept. Times are of `clock`, in
    seconds. Only the daemon's loop may use it."""

    def __init__(self, sweeper: Sweep, clock: Callable[[], float] = time.monotonic) -> None:
        self._sweeper = sweeper
        self._clock = clock
        # Namespace cookie to processes likely to be in it, with something to do there.
        self._to_adopt: dict[int, set[int]] = {}
        self._to_drain: dict[int, set[int]] = {}
        self._adopt_at = 0.0
        self._drain_at = 0.0
        self._drain_pause = DRAIN_PAUSE_S

    @property
    def deadline(self) -> float:
        """When there will be something to do."""
        adopt_at = self._adopt_at if self._to_adopt else math.inf
        drain_at = self._drain_at if self._to_drain else math.inf
        return min(adopt_at, drain_at)

    def adopt(self, netns: Iterable[int], tgid: Iterable[int]) -> None:
        """Queue the namespaces (cookies) of a pair that a walk has to put in."""
        for cookie in netns:
            self._to_adopt.setdefault(cookie, set()).update(pid for pid in tgid if pid)

    def receive(self, event: Event) -> None:
        """Queue the namespaces of a pair that has to be drained (EventType.DRAIN)."""
        for cookie in event.netns:
            self._to_drain.setdefault(cookie, set()).update(pid for pid in event.tgid if pid)
        self._hurry_to_drain()

    def take_over(self, pairs: Iterable[Pair]) -> None:
        """Queue what pairs wait for that were there before this daemon: nobody will tell of them again."""
        for pair in pairs:
            if STATES.get(pair.state) == "spliced":
                continue
            if pair.state == STATE_PAIRED:
                if not (pair.announced == ANNOUNCED_BY_WALK and pair.reason == _PENDING):
                    continue
                target = self._to_adopt
            else:
                target = self._to_drain
            for end in (pair.client, pair.server):
                target.setdefault(end.netns, set()).add(end.tgid)

    def drain(self, cookie: int) -> None:
        """Queue a namespace with ends that have no record. No process is known to be in it."""
        self._to_drain.setdefault(cookie, set())
        self._hurry_to_drain()

    def _hurry_to_drain(self) -> None:
        self._drain_pause = DRAIN_PAUSE_S
        self._drain_at = min(self._drain_at, self._clock() + DRAIN_PAUSE_S)

    def work(self, now: float) -> None:
        """Do what was due at `now`, what is to be drained first."""
        if self._to_drain and now >= self._drain_at:
            self._sweep_to_drain()
        if self._to_adopt and now >= self._adopt_at:
            self._sweep_to_adopt()

    def _sweep_to_drain(self) -> None:
        counts = self._sweeper.sweep(self._to_drain)
        if not counts.to_drain and not counts.held:
            self._to_drain.clear()
            return
        # Somebody has yet to read, or is in the middle of a send.
        self._drain_at = self._clock() + self._drain_pause
        self._drain_pause = min(self._drain_pause * 2, DRAIN_PAUSE_MAX_S)

    def _sweep_to_adopt(self) -> None:
        started = self._clock()
        # The ends of a pair go in one after the other. None is left alone while we pause: after some turns
        # nothing new is begun, and what is begun is finished or given up (MAX_HALF in bpf/adopt.c).
        for turn in range(ADOPT_TURNS):
            if turn == ADOPT_BEGINNINGS:
                self._sweeper.settings.write(finishing=True)
            counts = self._sweeper.sweep(self._to_adopt)
            if not counts.to_adopt and not counts.held:
                self._to_adopt.clear()
            if turn and not counts.half:
                break
        if turn >= ADOPT_BEGINNINGS:
            self._sweeper.settings.write(finishing=False)
        ended = self._clock()
        pause = min(ADOPT_PAUSE_MAX_S, (ended - started) / ADOPT_SHARE)
        self._adopt_at = ended + max(ADOPT_PAUSE_S, pause)
