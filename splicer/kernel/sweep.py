# SPDX-License-Identifier: Apache-2.0
"""The programs that run when asked: adopt in each network namespace with something to do, watch on the pairs
that are named."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from splicer.host.namespaces import Directory, read_cookie
from splicer.kernel import libbpf
from splicer.kernel.layout import (
    COUNTERS,
    END_KEY_OWNER,
    LOOK_BITS,
    PAIR,
    SEED,
    STATE_SPLICED,
    SWEEP,
    WATCH_PAIRS,
    WATCH_REQUEST_SIZE,
    End,
    Look,
    Pair,
    Place,
    Question,
    find_young,
    read_ends,
    read_in_map,
    read_names,
    read_pair,
    read_places,
    read_readers,
    read_seed,
    read_watched,
)
from splicer.kernel.libbpf import split
from splicer.kernel.settings import SettingsMap
from splicer.kernel.tally import Tally
from splicer.kernel.walker import Walker, open_iterator
from splicer.model import REASON_NAMES

_SPLICED, _EVENTS_LOST, _ORPHANS = map(COUNTERS.index, ("spliced", "events_lost", "orphans"))
_LOOK_MASK = (1 << LOOK_BITS) - 1
_NAME = 8  # bytes
_NAME_KEY = struct.Struct("=Q")
# So many are taken apart at a time: an object is five times as large as its record.
_RECORDS = 256
# A name alone among WATCH_PAIRS, and the question.
_ONE_NAME = struct.Struct(f"=Q {(WATCH_PAIRS - 1) * _NAME}x Q")


@dataclass(frozen=True)
class SweepCounts:
    """What one sweep saw; see enum sweep_counter in bpf/types.h. `held`: namespaces that could not be
    visited, because an earlier sweep is held up there."""

    adopted: int = 0
    drained: int = 0
    to_adopt: int = 0
    half: int = 0
    to_drain: int = 0
    held: int = 0


@dataclass(frozen=True)
class WatchFindings:
    """What watch saw of the pairs it was run on: how many names it was given, those of pairs with TCP bytes
    unread, to be looked at again soon, how many are drained because such bytes did not move, and the names of
    those on which something is sent after a lease of silence."""

    looked: int = 0
    again: frozenset[int] = frozenset()
    rescued: int = 0
    talking: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Drained:
    """What came of taking everything out: pairs that were in or on their way, those that are still there,
    processes that read these last, and seconds that it took."""

    pairs: int
    left: int
    readers: Sequence[int]
    seconds: float


@dataclass(frozen=True)
class Losses:
    """What network namespaces (cookies) have lost: addresses; links, by the addresses they have; their
    loopback device."""

    removed: frozenset[Place] = frozenset()
    cut: frozenset[Place] = frozenset()
    silent: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.removed or self.cut or self.silent)

    def __or__(self, other: Losses) -> Losses:
        return Losses(self.removed | other.removed, self.cut | other.cut, self.silent | other.silent)

    def concern(self, client: Place, server: Place) -> bool:
        """Would TCP stall between these two? Within a namespace it goes by way of the loopback device,
        whatever link has the address."""
        if client in self.removed or server in self.removed:
            return True
        if client[0] == server[0]:
            return client[0] in self.silent
        return client in self.cut or server in self.cut


NO_LOSSES = Losses()


@dataclass(frozen=True)
class Caller:
    """The client of a spliced pair: the sequence numbers of what TCP sends and receives next, the device that
    it is bound to (0: none), and the mark of its packets."""

    end: End
    sent: int
    received: int
    device: int
    mark: int


class Sweeper:
    """adopt, watch and the maps of one generation of programs."""

    def __init__(
        self,
        adopt_link: int,
        watch_program: int | None,
        maps: Mapping[str, libbpf.Map],
        directory: Directory | None = None,
    ) -> None:
        """No `watch_program`: nothing is looked at, and draining is left to adopt alone."""
        self._adopt = adopt_link
        self._watch = None if watch_program is None else libbpf.TestRun(watch_program, WATCH_REQUEST_SIZE)
        self._maps = maps
        self._directory = directory or Directory()
        self._walker = Walker()
        # Cookies of the namespaces where a sweep is held up.
        self._held: set[int] = set()
        self.settings = SettingsMap(maps["settings"])
        self.timing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered around each sweep by who wants to know how long they take."""

    def _clear(self) -> None:
        for index in range(len(SWEEP)):
            self._maps["sweep"].set(struct.pack("=I", index), struct.pack("=Q", 0))

    def _read(self) -> SweepCounts:
        values = {}
        for index, name in enumerate(SWEEP):
            raw = self._maps["sweep"].get(struct.pack("=I", index))
            values[name] = struct.unpack("=Q", raw)[0] if raw else 0
        return SweepCounts(**values)

    @property
    def held(self) -> int:
        """How many namespaces have a sweep held up in them."""
        return len(self._held)

    def close(self) -> None:
        self._walker.close()

    def sweep(self, namespaces: Mapping[int, Iterable[int]]) -> SweepCounts:
        """Visit every socket of the namespaces (cookie to processes likely in it) once."""
        with self.timing():
            return self._sweep(namespaces)

    def _sweep(self, namespaces: Mapping[int, Iterable[int]]) -> SweepCounts:
        self._clear()
        held = 0
        for cookie, pids in namespaces.items():
            if cookie in self._held:
                held += 1
                continue
            path = self._directory.find(cookie, pids)
            if path is None:
                # Gone, most likely, and its sockets with it. Without a process and a name they may live on
                # elsewhere: watch makes them pass through TCP if their policy is off.
                continue
            iterator = open_iterator(self._adopt, path, cookie)
            if iterator is not None:
                held += not self._visit(cookie, iterator)
        return dataclasses.replace(self._read(), held=held)

    def _visit(self, cookie: int, iterator: int) -> bool:
        """False if the walk is held up: its namespace is left out meanwhile."""
        self._held.add(cookie)
        return self._walker.walk(iterator, lambda: self._held.discard(cookie)) is not None

    def walk_pairs(self) -> libbpf.Walk:
        """All pairs, in steps; layout.py reads their values."""
        return self._maps["pairs"].walk()

    def _read_pairs(self, most: int | None = None) -> Iterator[memoryview]:
        for _, values in libbpf.read_steps(self.walk_pairs(), most):
            yield values

    def _list_young(self) -> dict[bytes, bytes]:
        return find_young(seed for _, seed in self._maps["young"].items())

    def _read_seeds(self, most: int | None = None) -> Iterator[memoryview]:
        for _, values in libbpf.read_steps(self._maps["seeds"].walk(), most):
            yield values

    def watch_all(self) -> WatchFindings:
        """Look at every pair that is spliced or on its way back."""
        if self._maps["pairs"].value_size != PAIR.size:
            return WatchFindings()  # of another build
        names = array.array("Q")
        for values in self._read_pairs():
            names.extend(read_watched(values))
        return self.watch_pairs(names)

    def find_readers(self, tgids: AbstractSet[int]) -> list[int]:
        """Names of the pairs that one of these processes reads."""
        return [
            name
            for values in self._read_pairs()
            for name, readers in zip(read_names(values), read_readers(values), strict=True)
            if not tgids.isdisjoint(readers)
        ]

    def find_stalled(self, losses: Losses) -> list[int]:
        """Names of the spliced pairs that lose their network."""
        return [
            name
            for values in self._read_pairs()
            for name, (state, client, server) in zip(read_names(values), read_places(values), strict=True)
            if state == STATE_SPLICED and losses.concern(client, server)
        ]

    def find_unknown(self, names: Iterable[int]) -> set[int]:
        """Those that are no pair's name (any more)."""
        pairs = self._maps["pairs"]
        return {name for name in names if pairs.get(struct.pack("=Q", name)) is None}

    def find_pair(self, name: int) -> Pair | None:
        """The pair with this name, if there is one."""
        raw = self._maps["pairs"].get(struct.pack("=Q", name))
        return None if raw is None else read_pair(raw)

    def find_raw_pair(self, name: int) -> bytes | None:
        """The same as it is in the map, which takes a tenth of the time."""
        return self._maps["pairs"].get(_NAME_KEY.pack(name))

    def watch_pairs(self, names: Sequence[int]) -> WatchFindings:
        """Run watch on these pairs; see bpf/watch.c. Those that are plain, or have gone, are no harm."""
        if self._watch is None:
            return WatchFindings()
        looks: dict[int, Look] = {}
        for start, result in self._ask(names, Question.NOTHING):
            for name in names[start : start + WATCH_PAIRS]:
                looks[name] = Look(result & _LOOK_MASK)
                result >>= LOOK_BITS
        for name in [name for name, look in looks.items() if Look.OUTDATED in look]:
            looks[name] = Look(self._ask_about(name, Question.POLICY) & _LOOK_MASK)
        return WatchFindings(
            len(names),
            frozenset(name for name, look in looks.items() if look & (Look.AGAIN | Look.OUTDATED)),
            sum(Look.RESCUED in look for look in looks.values()),
            frozenset(name for name, look in looks.items() if Look.TALKS in look),
        )

    def find_talkers(self, names: Sequence[int]) -> list[int]:
        """End a lease of these pairs: names of those on which something was sent during it."""
        return [
            name
            for start, result in self._ask(names, Question.WHO_TALKED)
            for place, name in enumerate(names[start : start + WATCH_PAIRS])
            if result & 1 << place
        ]

    def read_caller(self, name: int) -> Caller | None:
        """The client of a spliced pair, as far as a packet in its name needs it; None: there is none."""
        pair = self.find_pair(name)
        sent = self._ask_about(name, Question.SENT)
        if pair is None or not sent:
            return None
        return Caller(
            pair.client,
            sent,
            *(self._ask_about(name, each) for each in (Question.RECEIVED, Question.DEVICE, Question.MARK)),
        )

    def _ask(self, names: Sequence[int], question: Question) -> Iterator[tuple[int, int]]:
        """Run watch on these names: the place of the first one of each run, and what it returned if it is not
        0."""
        if self._watch is None:
            return
        # There is no connection with the name 0, but for one in 2^64.
        padded = array.array("Q", names)
        padded.extend([0] * (-len(names) % WATCH_PAIRS))
        runs = len(padded) // WATCH_PAIRS
        requests = array.array("Q", bytes(runs * WATCH_REQUEST_SIZE))
        for place in range(WATCH_PAIRS):
            requests[place :: WATCH_PAIRS + 1] = padded[place::WATCH_PAIRS]
        requests[WATCH_PAIRS :: WATCH_PAIRS + 1] = array.array("Q", [question]) * runs
        for number, result in self._watch.run_each(requests):
            yield number * WATCH_PAIRS, result

    def _ask_about(self, name: int, question: Question) -> int:
        """What watch returns of one pair."""
        if self._watch is None:
            return 0
        _ONE_NAME.pack_into(self._watch.context, 0, name, question)
        return self._watch.run()

    def read_counter(self, index: int) -> int:
        """One of enum counter in bpf/types.h, over all CPUs."""
        raw = self._maps["counters"].get(struct.pack("=I", index)) or b""
        total: int = sum(struct.unpack(f"={len(raw) // 8}Q", raw))
        return total % (1 << 64)

    def read_splice_stamp(self) -> int:
        """Another number than before: pairs were spliced, or an event about one was lost."""
        return self.read_counter(_SPLICED) + self.read_counter(_EVENTS_LOST)

    def read_orphan_stamp(self) -> int:
        """Another number than before: an end may have stayed in the SOCKHASH without a record."""
        return self.read_counter(_ORPHANS)

    def walk_ends(self) -> Iterator[tuple[int, int]]:
        """Network namespace (cookie) and name of each end in the SOCKHASH, one by one."""
        for key in self._maps["spliced"].walk_keys():
            netns, name = END_KEY_OWNER.unpack(key)
            yield netns, name

    def walk_pairs_read(self) -> Iterator[list[Pair]]:
        """All pairs, some at a time."""
        for values in self._read_pairs(_RECORDS):
            yield [read_pair(value) for value in split(values, PAIR.size)]

    def walk_raw_pairs(self) -> Iterator[bytes]:
        """The record of each pair, as it is in the map."""
        for values in self._read_pairs():
            yield from split(values, PAIR.size)

    def walk_raw_seeds(self) -> Iterator[bytes]:
        """The same of those that have no pair."""
        yield from self._list_young().values()
        for values in self._read_seeds():
            yield from split(values, SEED.size)

    def list_pairs(self) -> list[Pair]:
        return [pair for some in self.walk_pairs_read() for pair in some]

    def walk_connections(self) -> Iterator[list[Pair]]:
        """All that is known, the young ones first, some at a time. Who grows up meanwhile may come twice."""
        yield [read_seed(value) for value in self._list_young().values()]
        for values in self._read_seeds(_RECORDS):
            yield [read_seed(value) for value in split(values, SEED.size)]
        yield from self.walk_pairs_read()

    def tally(self) -> Tally:
        """All that is known, added up."""
        found = Tally()
        found.add_young(len(self._list_young()))
        for values in self._read_seeds():
            found.add_young(len(values) // SEED.size)
        for values in self._read_pairs():
            found.add(values)
        return found

    def begin_draining(self, reason: str, names: Sequence[int] | None = None) -> int:
        """Start these pairs, or all that is spliced, on their way back; returns how many. Their events say
        where to look for them (EventType.DRAIN), and splicing goes on meanwhile."""
        self.settings.write(stopping=REASON_NAMES.index(reason))
        try:
            return (self.watch_all() if names is None else self.watch_pairs(names)).looked
        finally:
            self.settings.write(stopping=0)

    def drain(self, timeout: float, is_enough: Callable[[], bool] = lambda: False) -> Drained:
        """Stop splicing, and take every end out of the SOCKHASH, for up to `timeout` seconds, or until
        `is_enough` says so.

        Those that are left have readers that do not read, or cannot be visited. That is safe, see
        ARCHITECTURE.md; verdicts pass then, but for pairs that are still leaving.
        """
        begun = time.monotonic()
        self.settings.write(stopping=REASON_NAMES.index("stop"))
        looked = self.watch_all().looked
        try:
            left, namespaces = self._drain(begun + timeout, is_enough)
        finally:
            self.settings.write(splicing=False)
        readers = sorted({tgid for tgids in namespaces.values() for tgid in tgids if tgid})
        return Drained(looked, left, readers, time.monotonic() - begun)

    def find_left(self) -> tuple[int, dict[int, set[int]]]:
        """How many pairs have an end in the SOCKHASH, and the namespaces of these with processes likely in
        them."""
        if self._maps["pairs"].value_size != PAIR.size:
            return self._find_left_by_another_build()
        left = 0
        namespaces: dict[int, set[int]] = {}
        for values in self._read_pairs():
            inside = read_in_map(values)
            left += sum(inside)
            for netns, tgid in read_ends(values, inside):
                namespaces.setdefault(netns, set()).add(tgid)
        return left, namespaces

    def _find_left_by_another_build(self) -> tuple[int, dict[int, set[int]]]:
        """The same where records are of another kind: ends are counted, and everybody is visited."""
        ends = sum(1 for _ in self._maps["spliced"].walk_keys())
        cookies: dict[int, set[int]] = {}
        for path in self._directory.walk() if ends else ():
            with contextlib.suppress(OSError):
                cookies[read_cookie(path)] = set()
        return -(-ends // 2), cookies

    def _drain(self, deadline: float, is_enough: Callable[[], bool]) -> tuple[int, dict[int, set[int]]]:
        # A pair that finds no rest is taken out the hard way: see try_leave() in bpf/adopt.c.
        hurry_until = time.monotonic() + 0.2
        pause = 0.001
        while True:
            left, namespaces = self.find_left()
            if not left:
                return 0, {}
            self.sweep(namespaces)
            if time.monotonic() >= deadline or is_enough():
                return self.find_left()
            time.sleep(pause)
            pause = min(pause * 2, 0.01 if time.monotonic() < hurry_until else 0.05)
