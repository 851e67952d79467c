# SPDX-License-Identifier: Apache-2.0
"""Running the iterators: adopt in each network namespace with something to do, watch over the SOCKHASH."""

from __future__ import annotations

import dataclasses
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splicer import libbpf
from splicer.layout import (
    STATE_PAIRED,
    SWEEP,
    KernelSettings,
    Pair,
    Summary,
    is_grown,
    read_pair,
    read_seed,
    read_summary,
)
from splicer.model import REASON_NAMES
from splicer.namespaces import Directory, entered

_ZERO = struct.pack("=I", 0)
# A sweep takes milliseconds. One that takes longer waits for the lock of a socket whose owner sits in a page
# fault inside recv (see KNOWN_ISSUES.md); it is left to itself, and its namespace is left out meanwhile.
_PATIENCE_S = 0.5


@dataclass(frozen=True)
class Counts:
    """What one sweep saw; see enum sweep_counter in bpf/types.h. `held`: namespaces that could not be
    visited, because an earlier sweep is held up there."""

    seen: int = 0
    adopted: int = 0
    drained: int = 0
    to_adopt: int = 0
    half: int = 0
    to_drain: int = 0
    stuck: int = 0
    unread: int = 0
    held: int = 0


class Worker:
    """A thread that runs one job after the other; whoever gave it one need not wait for the end."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="sweep", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self._error = error
            self._done.set()

    def run(self, job: Callable[[], None], timeout: float) -> bool:
        """True if the job has ended within `timeout` seconds; raises what it raised. After False the worker
        is still at it: give it no other job, but `leave` it."""
        self._done.clear()
        self._jobs.put(job)
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True

    def leave(self) -> None:
        """End the thread once it has nothing to do."""
        self._jobs.put(None)


class Sweeper:
    """The iterators and maps of one generation of programs."""

    def __init__(
        self,
        adopt_link: int,
        watch_link: int,
        maps: Mapping[str, libbpf.Map],
        directory: Directory | None = None,
    ) -> None:
        self._adopt = adopt_link
        self._watch = watch_link
        self._maps = maps
        self._directory = directory or Directory()
        self._worker: Worker | None = None
        # Cookies of the namespaces where a sweep is held up.
        self._held: set[int] = set()
        # The settings are rewritten by the daemon's thread and by those that answer requests.
        self._settings_guard = threading.Lock()

    def _clear(self) -> None:
        for index in range(len(SWEEP)):
            self._maps["sweep"].set(struct.pack("=I", index), struct.pack("=Q", 0))

    def _read(self) -> Counts:
        values = {}
        for index, name in enumerate(SWEEP):
            raw = self._maps["sweep"].get(struct.pack("=I", index))
            values[name] = struct.unpack("=Q", raw)[0] if raw else 0
        return Counts(**values)

    @property
    def held(self) -> int:
        """How many namespaces have a sweep held up in them."""
        return len(self._held)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.leave()
            self._worker = None

    def adopt(self, namespaces: Mapping[int, Iterable[int]]) -> Counts:
        """Visit every socket of the namespaces (cookie to processes likely in it) once."""
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
            try:
                with entered(path) as actual:
                    if actual != cookie:
                        continue
                    iterator = libbpf.create_iterator(self._adopt)
            except libbpf.KernelError:
                raise
            except OSError:
                continue
            held += not self._visit(cookie, iterator)
        return dataclasses.replace(self._read(), held=held)

    def _visit(self, cookie: int, iterator: int) -> bool:
        """Run an iterator to its end, with patience. False if it is held up."""
        if self._worker is None:
            self._worker = Worker()
        self._held.add(cookie)

        def visit() -> None:
            try:
                libbpf.finish_iterator(iterator)
            finally:
                self._held.discard(cookie)

        if self._worker.run(visit, _PATIENCE_S):
            return True
        self._worker.leave()
        self._worker = None
        return False

    def watch(self) -> Counts:
        """Look at every end in the SOCKHASH."""
        self._clear()
        libbpf.finish_iterator(libbpf.create_iterator(self._watch))
        return self._read()

    def pairs(self) -> list[Pair]:
        return [read_pair(value) for _, value in self._maps["pairs"].items()]

    def connections(self) -> list[Pair]:
        """All that is known, the young ones included."""
        seeds = [read_seed(value) for _, value in self._maps["seeds"].items()]
        return [pair for pair in seeds if pair] + self.pairs()

    def change_settings(self, **changes: Any) -> None:
        """Rewrite single fields of the settings map."""
        with self._settings_guard:
            now = self.read_settings()
            self._maps["settings"].set(_ZERO, dataclasses.replace(now, **changes).pack())

    def summarize(self) -> list[Summary]:
        """All that is known, with no more than what can be counted."""
        young = Summary(STATE_PAIRED, (0, 0), 0, 0)
        seeds = (value for _, value in self._maps["seeds"].items())
        pairs = [read_summary(value) for _, value in self._maps["pairs"].items()]
        return [young for seed in seeds if not is_grown(seed)] + pairs

    def read_settings(self) -> KernelSettings:
        """All zero in programs that were loaded just now: they do nothing."""
        raw = self._maps["settings"].get(_ZERO)
        assert raw is not None, "every index of an array has a value"
        return KernelSettings.unpack(raw)

    def begin_draining(self, reason: str) -> int:
        """Start all that is spliced on its way back; returns the number of ends. Their events say where to
        look for them (EventType.DRAIN), and splicing goes on meanwhile."""
        self.change_settings(stopping=REASON_NAMES.index(reason))
        try:
            return self.watch().seen
        finally:
            self.change_settings(stopping=0)

    def drain(self, timeout: float, is_enough: Callable[[], bool] = lambda: False) -> int:
        """Stop splicing, and take every end out of the SOCKHASH.

        Returns the number of pairs still in it after `timeout` seconds, or when `is_enough` says so: their
        readers do not read, or they cannot be visited. That is safe, see ARCHITECTURE.md; verdicts pass then,
        but for pairs that are still leaving.
        """
        self.change_settings(stopping=REASON_NAMES.index("stop"))
        self.watch()
        try:
            return self._drain(time.monotonic() + timeout, is_enough)
        finally:
            self.change_settings(splicing=False)

    def _drain(self, deadline: float, is_enough: Callable[[], bool]) -> int:
        # A pair that finds no rest is taken out the hard way: see try_leave() in bpf/adopt.c.
        hurry_until = time.monotonic() + 0.2
        pause = 0.001
        while True:
            left = [pair for pair in self.pairs() if pair.is_in_map]
            if not left:
                return 0
            namespaces: dict[int, set[int]] = {}
            for pair in left:
                for end in (pair.client, pair.server):
                    namespaces.setdefault(end.netns, set()).add(end.tgid)
            self.adopt(namespaces)
            if time.monotonic() >= deadline or is_enough():
                return sum(pair.is_in_map for pair in self.pairs())
            time.sleep(pause)
            pause = min(pause * 2, 0.01 if time.monotonic() < hurry_until else 0.05)
