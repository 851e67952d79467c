# SPDX-License-Identifier: Apache-2.0
"""When pairs are put into the SOCKHASH by name: at once when the programs announce one, then again and again
until there is a moment of rest; and when those that are in are looked at once more.

What cannot be found by name is left to the sweeps of adoption.py.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from splicer.kernel.enlist import EnlistRequest
from splicer.kernel.layout import ANNOUNCED_BY_NAME, STATE_PAIRED, EnlistOutcome, EnlistTask, Event, Pair
from splicer.model import REASON_NAMES

# About this share of one CPU for who was tried in vain, and at a time so many seconds of it at once.
ENLIST_SHARE = 0.05
ENLIST_BURST_S = 0.02
# The same for what each pair takes once: its first try, and the looks at who is in.
FIRST_SHARE = 0.25
# So many wait at most; of further ones no more is known than their names, until there is room.
MOST_WAITING = 2048
# Pauses between tries: doubled at every second one.
TRY_PAUSE_S = 0.001
TRY_PAUSE_MAX_S = 0.032
# After so many tries a reader that empties its socket may have bytes to read.
STRICT_TRIES = 4
# Who finds no moment in so long is left alone for a while.
TRY_FOR_S = 1.0
# Pauses between looks at who is in: doubled after the second one.
LOOK_PAUSE_S = 0.001
LOOKS = 6

_PENDING = REASON_NAMES.index("pending")


class Enlister(Protocol):
    """See kernel.enlist.Enlister."""

    def work(self, requests: Sequence[EnlistRequest]) -> list[EnlistOutcome]: ...


class Walks(Protocol):
    """What is needed of SweepQueues."""

    def adopt(self, netns: Iterable[int], tgid: Iterable[int]) -> None: ...


@dataclass(slots=True)
class _Pending:
    """A pair that shall go in, or has just gone in."""

    name: int
    netns: tuple[int, int]
    tgid: tuple[int, int]
    begun: float
    task: EnlistTask = EnlistTask.TRY
    tries: int = 0
    looks: int = 0


class Enlistment:
    """The pairs of one generation that wait for enlist. Times are in seconds. Only the daemon's loop may use
    it."""

    def __init__(
        self,
        enlister: Enlister | None,
        walks: Walks,
        ask_for_watch: Callable[[int], None],
        find_pair: Callable[[int], Pair | None],
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
        note: Callable[[int, EnlistOutcome], None] = lambda name, outcome: None,
    ) -> None:
        """No `enlister`: all is left to `walks`. `ask_for_watch` gets the name of each pair that is in.
        `find_pair` gives the pair with a name, if there is one. `note` gets the names of those that are in
        (IN), and of those that are tried no more (OVER)."""
        self._enlister = enlister
        self._walks = walks
        self._ask_for_watch = ask_for_watch
        self._find_pair = find_pair
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._note = note
        # (when it is due, number, who): the number keeps equals in order.
        self._waiting: list[tuple[float, int, _Pending]] = []
        self._number = 0
        self._backlog: deque[int] = deque()
        # What was spent is paid for at this time, with the share that we have.
        self._paid_at = -math.inf

    @property
    def deadline(self) -> float:
        """When there will be something to do."""
        if self._backlog and not self._waiting:
            return self._paid_at
        return max(self._waiting[0][0], self._paid_at) if self._waiting else math.inf

    def __len__(self) -> int:
        """How many pairs wait."""
        return len(self._waiting) + len(self._backlog)

    def receive(self, event: Event) -> None:
        """A pair can be put in (EventType.ADOPT)."""
        self._begin(event.name, event.netns, event.tgid)

    def take_over(self, pairs: Iterable[Pair]) -> None:
        """Pairs that wait since before this daemon: nobody will tell of them again."""
        for pair in pairs:
            waits = pair.announced == ANNOUNCED_BY_NAME and pair.reason == _PENDING
            if pair.state == STATE_PAIRED and waits:
                ends = (pair.client, pair.server)
                self._begin(pair.name, (ends[0].netns, ends[1].netns), (ends[0].tgid, ends[1].tgid))

    def _begin(self, name: int, netns: tuple[int, int], tgid: tuple[int, int]) -> None:
        if self._enlister is None:
            self._walks.adopt(netns, tgid)
            return
        if len(self._waiting) >= MOST_WAITING:
            self._backlog.append(name)
            return
        now = self._clock()
        self._push(now, _Pending(name, netns, tgid, now))

    def _let_in(self) -> None:
        """Those for whom there is room by now, in the order in which they came."""
        for _ in range(min(len(self._backlog), MOST_WAITING - len(self._waiting))):
            pair = self._find_pair(self._backlog.popleft())
            if pair is not None:
                self.take_over([pair])

    def _push(self, due: float, pending: _Pending) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (due, self._number, pending))

    def work(self, now: float) -> None:
        """Do what is due at `now`. Raises OSError if enlist cannot be run any more: then call `give_up`."""
        if self._paid_at > now:
            return
        self._let_in()
        if not self._waiting or self._waiting[0][0] > now:
            return
        begun = self._cpu_clock()
        due: list[_Pending] = []
        while self._waiting and self._waiting[0][0] <= now:
            due.append(heapq.heappop(self._waiting)[2])
        looks = [pending for pending in due if pending.task == EnlistTask.LOOK]
        tries = [pending for pending in due if pending.task != EnlistTask.LOOK]
        again = [pending for pending in tries if pending.tries]
        try:
            # Looks first: a look is late sooner than a try.
            self._look(looks)
            self._try([pending for pending in tries if not pending.tries])
            first = self._cpu_clock()
            self._try(again)
        except OSError:
            for pending in due:
                self._push(now, pending)
            raise
        cost = (first - begun) / FIRST_SHARE + (self._cpu_clock() - first) / ENLIST_SHARE
        self._paid_at = max(self._paid_at, now - ENLIST_BURST_S / ENLIST_SHARE) + cost

    def _run(self, pending: list[_Pending]) -> list[EnlistOutcome]:
        assert self._enlister is not None, "without it nobody is pending"
        if not pending:
            return []
        return self._enlister.work([EnlistRequest(p.name, p.netns, p.tgid, p.task) for p in pending])

    def _try(self, tries: list[_Pending]) -> None:
        outcomes = self._run(tries)
        now = self._clock()
        for pending, outcome in zip(tries, outcomes, strict=True):
            if outcome in (EnlistOutcome.IN, EnlistOutcome.OVER):
                self._note(pending.name, outcome)
            if outcome == EnlistOutcome.IN:
                pending.task = EnlistTask.LOOK
                self._push(now + LOOK_PAUSE_S, pending)
            elif outcome == EnlistOutcome.WALK:
                self._walks.adopt(pending.netns, pending.tgid)
            elif outcome == EnlistOutcome.LATER:
                self._try_again(pending, now)

    def _try_again(self, pending: _Pending, now: float) -> None:
        pause = min(TRY_PAUSE_S * 2 ** (pending.tries // 2), TRY_PAUSE_MAX_S)
        pending.tries += 1
        if now - pending.begun > TRY_FOR_S:
            pending.task = EnlistTask.GIVE_UP
        elif pending.tries >= STRICT_TRIES:
            pending.task = EnlistTask.TRY_EASED
        self._push(now + pause, pending)

    def _look(self, looks: list[_Pending]) -> None:
        outcomes = self._run(looks)
        now = self._clock()
        for pending, outcome in zip(looks, outcomes, strict=True):
            pending.looks += 1
            if outcome == EnlistOutcome.LATER and pending.looks < LOOKS:
                self._push(now + LOOK_PAUSE_S * 2 ** max(0, pending.looks - 2), pending)
            else:
                # Who was held up on his way into TCP for longer than that is for the watch to notice.
                self._ask_for_watch(pending.name)

    def give_up(self) -> None:
        """Leave all that waits, and all that will come, to the walks."""
        self._enlister = None
        for _, _, pending in self._waiting:
            self._walks.adopt(pending.netns, pending.tgid)
        self._waiting.clear()
        for name in self._backlog:
            if pair := self._find_pair(name):
                self._walks.adopt(
                    (pair.client.netns, pair.server.netns), (pair.client.tgid, pair.server.tgid)
                )
        self._backlog.clear()
