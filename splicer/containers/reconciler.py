# SPDX-License-Identifier: Apache-2.0
"""Brings the inventory in line with the engine: whom to ask about, in which order, how often."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from splicer.containers.engine import Engine, EngineError, InspectedContainer
from splicer.containers.inventory import (
    EMPTY,
    Hints,
    Inventory,
    find_changed,
    is_complete,
    merge,
    sort_by_need,
)
from splicer.host.scopes import Scopes
from splicer.logs import Logger
from splicer.model import Container

# Containers inspected before new hints are looked at, and the inventory is handed out.
_BATCH = 16
# A container that just started is asked about again after 0.1, 0.2, 0.4 and 0.8 s, if something is missing.
_ATTEMPTS = 4


class InventoryReconciler:
    """The inventory, and the containers in it that are to be inspected. Only the watcher's thread uses it."""

    def __init__(
        self,
        scopes: Scopes,
        log: Logger,
        pause: float,
        locate: Callable[[InspectedContainer, Scopes], Container],
        is_current: Callable[[Container], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pause`, in seconds, doubles with each attempt at a container that is not all there."""
        self.inventory: Inventory = EMPTY
        self._scopes = scopes
        self._log = log
        self._pause = pause
        self._locate = locate
        self._is_current = is_current
        self._clock = clock
        # The fingerprints that belong to what the inventory says.
        self._known: dict[str, int] = {}
        # To inspect, with the fingerprint if the list brought it up.
        self._waiting: dict[str, int | None] = {}
        # Attempts, and when to make the next.
        self._again: dict[str, tuple[int, float]] = {}

    @property
    def is_behind(self) -> bool:
        """Does a container wait to be inspected?"""
        return bool(self._waiting)

    @property
    def retry_at(self) -> float:
        """When a container that was not all there is asked about again, by `clock`."""
        return min((due for _, due in self._again.values()), default=math.inf)

    def begin_anew(self) -> None:
        """Another connection: its list says whom to inspect."""
        self._waiting.clear()
        self._again.clear()

    def compare(self, engine: Engine) -> int:
        """Ask for the list: forget who is not on it, and have inspected who is not as before.

        Returns how many are on it. Raises EngineError.
        """
        listed = engine.list_running()
        there = {each.id for each in listed}
        self._known = {each: mark for each, mark in self._known.items() if each in there}
        self._again = {each: again for each, again in self._again.items() if each in there}
        self.inventory = merge(self.inventory, (), [each for each in self.inventory if each not in there])
        hinted = [each for each, mark in self._waiting.items() if mark is None and each in there]
        self._waiting = dict(find_changed(self.inventory, listed, self._known, self._is_current))
        self._waiting |= dict.fromkeys(hinted)
        return len(listed)

    def queue(self, work: Hints) -> None:
        """Put what is to be inspected in order: what events hint at comes first, then what is asked again."""
        dirty, gone = sort_by_need(work.dirty, self.inventory, self._is_current)
        self.inventory = merge(self.inventory, (), gone)
        for each in dirty:
            self._again.pop(each, None)
        now = self._clock()
        due = [each for each, (_, at) in self._again.items() if at <= now]
        first: dict[str, int | None] = dict.fromkeys([*dirty, *due])
        self._waiting = first | {each: mark for each, mark in self._waiting.items() if each not in first}

    def inspect(self, engine: Engine) -> None:
        """Inspect the first of those that wait. Raises EngineError, but for one that cannot be inspected."""
        found: list[Container] = []
        gone: list[str] = []
        for identifier in list(self._waiting)[:_BATCH]:
            mark = self._waiting.pop(identifier)
            self._known.pop(identifier, None)
            try:
                inspected = engine.inspect(identifier)
            except EngineError as error:
                if error.kind != "failed":
                    raise
                self._log.debug("docker_inspect_failed", container=identifier, error=error.message)
                self._try_again(identifier)
                continue
            if inspected is None or not inspected.pid:
                gone.append(identifier)
                self._again.pop(identifier, None)
                continue
            container = self._locate(inspected, self._scopes)
            found.append(container)
            if is_complete(container):
                self._again.pop(identifier, None)
            else:
                self._try_again(identifier)
            # What an event brought up may have changed since the list was made.
            if mark is not None:
                self._known[identifier] = mark
        self.inventory = merge(self.inventory, found, gone)

    def _try_again(self, identifier: str) -> None:
        attempts = self._again.get(identifier, (0, 0.0))[0] + 1
        pause = self._pause * 2**attempts if attempts <= _ATTEMPTS else math.inf
        self._again[identifier] = attempts, self._clock() + pause
