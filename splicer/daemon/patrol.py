# SPDX-License-Identifier: Apache-2.0
"""When which pairs are looked at: each one that is spliced once a second, sooner those that asked for it; and
when the SOCKHASH is searched for ends without a record (orphans).

A round over all pairs is made in steps that are spread over the second, so that it holds nothing up. What
would cost too much, for there is so much of it, is done less often instead: so is a round.
"""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from splicer.kernel.layout import PAIR, read_watched, read_whereabouts
from splicer.kernel.sweep import WatchFindings

PERIOD_S = 1.0
SOON_S = 0.02
# A round has so many steps, but none with fewer pairs than the one or more than the other.
STEPS = 10
STEP_PAIRS = 512
STEP_PAIRS_MAX = 1024
LIST_ROUNDS = 8
# A search goes on for so many ends at a time.
SEARCH_ENDS = 1000
# Share of one CPU that rounds, urgent looks, and searches, may take.
ROUND_SHARE = 0.015
URGENT_SHARE = 0.2
SEARCH_SHARE = 0.005
# A search that found something is made again, in case it cannot be taken out yet, later and later.
SEARCH_PAUSE_MAX_S = 64.0


class Walk(Protocol):
    """A way through all pairs: see libbpf.Walk."""

    def step(self, wanted: int) -> tuple[memoryview, memoryview] | None: ...


class Watch(Protocol):
    """What a patrol needs of a Sweeper."""

    def watch_all(self) -> WatchFindings: ...
    def watch_pairs(self, names: Sequence[int]) -> WatchFindings: ...
    def find_readers(self, tgids: set[int]) -> list[int]: ...
    def walk_pairs(self) -> Walk: ...
    def read_splice_stamp(self) -> int: ...
    def read_orphan_stamp(self) -> int: ...
    def walk_ends(self) -> Iterator[tuple[int, int]]: ...
    def find_unknown(self, names: Iterable[int]) -> set[int]: ...


@dataclass
class PatrolReport:
    """What one turn found: pairs that are drained because their TCP bytes did not move, the network
    namespaces (cookies) with ends that have no record, and, when pairs were listed, those of all spliced
    ones, each with processes likely in it; names of pairs that were looked at in their turn, of the round
    that began at `begun`; and of those on which something is sent after a lease of silence."""

    rescued: int
    orphaned: set[int]
    namespaces: dict[int, set[int]] | None = None
    names: Sequence[int] = ()
    begun: float | None = None
    talking: set[int] = field(default_factory=set)


class Patrol:
    """The looks at one generation of programs. Times are of `clock`, in seconds; `cpu_clock` says how much
    CPU time the caller has had."""

    def __init__(
        self,
        sweeper: Watch,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._sweeper = sweeper
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._all = False
        # Names of pairs, and processes, that are looked at next.
        self._asked: set[int] = set()
        self._readers: set[int] = set()
        self._urgent_at = math.inf
        self._urgent_after = 0.0
        self._round = _Round(sweeper)
        self._round_at = clock()
        self._search = _Search(sweeper)

    @property
    def deadline(self) -> float:
        """When there will be something to do."""
        return 0.0 if self._all else min(self._urgent_at, self._round_at, self._search.at)

    def ask(self, name: int) -> None:
        """A pair has TCP bytes that its reader may not see: look at it soon."""
        self._asked.add(name)
        self._hurry()

    def ask_for_readers(self, tgid: int) -> None:
        """A process reads in a way that redirected bytes are not seen: look at all that it reads, soon."""
        self._readers.add(tgid)
        self._hurry()

    def ask_for_all(self) -> None:
        """Something has changed for everybody: look at all pairs now."""
        self._all = True

    def _hurry(self) -> None:
        self._urgent_at = min(self._urgent_at, max(self._clock() + SOON_S, self._urgent_after))

    def work(self) -> PatrolReport:
        """Do what is due."""
        report = PatrolReport(0, set())
        if self._all:
            self._all = False
            self._note(self._sweeper.watch_all(), report)
        if self._clock() >= self._urgent_at:
            self._look_urgently(report)
        if self._clock() >= self._round_at:
            self._go_round(report)
        if self._clock() >= self._search.at:
            report.orphaned = self._search.go_on(self._clock)
        return report

    def _note(self, findings: WatchFindings, report: PatrolReport) -> None:
        report.rescued += findings.rescued
        report.talking |= findings.talking
        if findings.again:
            self._asked |= findings.again
            self._hurry()

    def _look_urgently(self, report: PatrolReport) -> None:
        begun = self._clock()
        names, readers = self._asked, self._readers
        self._asked, self._readers = set(), set()
        self._urgent_at = math.inf
        if readers:
            names.update(self._sweeper.find_readers(readers))
        findings = self._sweeper.watch_pairs(list(names))
        ended = self._clock()
        self._urgent_after = ended + (ended - begun) / URGENT_SHARE
        self._note(findings, report)

    def _go_round(self, report: PatrolReport) -> None:
        begun = self._cpu_clock()
        if self._round.ended:
            self._round.begin(self._clock())
            self._search.consider(self._round.begun)
        names = self._round.step()
        self._note(self._sweeper.watch_pairs(names), report)
        report.namespaces = self._round.take_namespaces()
        report.names, report.begun = names, self._round.begun
        if self._round.ended:
            self._round_at = self._round.begun + PERIOD_S
        else:
            # If more have come than there were in the last round, it hurries at its end.
            part = min(1.0, self._round.steps / self._round.expected_steps)
            self._round_at = self._round.begun + part * PERIOD_S
        # Where there are so many that a second is too short, a round takes longer.
        pause = (self._cpu_clock() - begun) / ROUND_SHARE
        self._round_at = max(self._round_at, self._clock() + pause)


class _Round:
    """A round over all pairs, in steps. They are listed again when some were spliced since, or an event was
    lost; and now and then, for what else there may be."""

    def __init__(self, sweeper: Watch) -> None:
        self._sweeper = sweeper
        self._news: int | None = None  # by the programs' count, when they were listed last
        self._rounds = 0  # since then
        self._listed = array("Q")
        self._namespaces: dict[int, set[int]] = {}
        self._walk: Walk | None = None  # while they are listed
        self._is_listed = False  # just now
        self._expected = 0
        self._seen = 0
        self.begun = 0.0
        self.steps = 0
        self.ended = True

    def begin(self, now: float) -> None:
        self.begun, self.steps, self.ended = now, 0, False
        self._seen = 0
        self._rounds += 1
        news = self._sweeper.read_splice_stamp()
        if news != self._news or self._rounds >= LIST_ROUNDS:
            self._news, self._rounds = news, 0
            self._walk = self._sweeper.walk_pairs()
            self._listed, self._namespaces = array("Q"), {}

    @property
    def expected_steps(self) -> int:
        """So many steps does this round take, if there are as many pairs as in the last one."""
        return max(STEPS, math.ceil(self._expected / STEP_PAIRS_MAX))

    def step(self) -> Sequence[int]:
        """Names of the pairs to look at in this step."""
        room = min(max(STEP_PAIRS, math.ceil(self._expected / STEPS)), STEP_PAIRS_MAX)
        self.steps += 1
        if self._walk is not None:
            return self._list_some(self._walk, room)
        names = self._listed[self._seen : self._seen + room]
        self._seen += room
        if self._seen >= len(self._listed):
            self._end(len(self._listed))
        return names

    def _list_some(self, walk: Walk, room: int) -> Sequence[int]:
        names = array("Q")
        while True:
            found = walk.step(room)
            if found is None:
                self._walk, self._is_listed = None, True
                self._end(self._seen)
                break
            count = len(found[1]) // PAIR.size
            self._seen += count
            names.extend(read_watched(found[1]))
            for netns, tgid in read_whereabouts(found[1]):
                self._namespaces.setdefault(netns, set()).add(tgid)
            if count > room // 2:  # else it was the last, most likely
                break
        self._listed.extend(names)
        return names

    def take_namespaces(self) -> dict[int, set[int]] | None:
        """The network namespaces of what was listed, once it is complete."""
        complete, self._is_listed = self._is_listed, False
        return self._namespaces if complete else None

    def _end(self, number: int) -> None:
        self._expected = number
        self.ended = True


class _Search:
    """Finds ends in the SOCKHASH that have no record, by walking over all of its keys."""

    def __init__(self, sweeper: Watch) -> None:
        self._sweeper = sweeper
        self._count: int | None = None  # of the programs, when the last search began
        self._ends: Iterator[tuple[int, int]] | None = None
        self._orphaned: set[int] = set()  # the namespaces of those that were found
        self._took = 0.0
        self._rested_at = 0.0
        # After a search that found something.
        self._again_at = math.inf
        self._pause = PERIOD_S
        self.at = math.inf
        """When to go on with the search that is under way."""

    def consider(self, now: float) -> None:
        """Begin a search if there can be orphans: when the programs say so, and at first, for who was here
        before may have left some."""
        if self._ends is not None or now < self._rested_at:
            return
        count = self._sweeper.read_orphan_stamp()
        if count != self._count:
            self._pause = PERIOD_S
        elif now < self._again_at:
            return
        self._count = count
        self._ends = self._sweeper.walk_ends()
        self._orphaned = set()
        self._took = 0.0
        self.at = now

    def go_on(self, clock: Callable[[], float]) -> set[int]:
        """Some more of it; at its end the namespaces of the orphans."""
        assert self._ends is not None
        begun = clock()
        some = list(itertools.islice(self._ends, SEARCH_ENDS))
        # Asked after the ends were read: whose record is missing had none, or has lost it.
        unknown = self._sweeper.find_unknown({name for _, name in some})
        self._orphaned.update(netns for netns, name in some if name in unknown)
        now = clock()
        self._took += now - begun
        if len(some) == SEARCH_ENDS:
            self.at = now + SOON_S
            return set()
        orphaned = self._orphaned
        self._ends, self.at = None, math.inf
        self._rested_at = now + self._took / SEARCH_SHARE
        self._again_at = now + self._pause if orphaned else math.inf
        self._pause = min(2 * self._pause, SEARCH_PAUSE_MAX_S)
        return orphaned
