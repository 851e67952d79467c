# SPDX-License-Identifier: Apache-2.0
"""Keeps the inventory of containers, by asking the engine whenever an event hints at a change.

Many hints at once, a new connection, and 30 seconds each lead to the list of all containers; those that are
not as they were known are inspected. The engine going away changes nothing: what it said last still holds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from splicer.containers.connection import ConnectionState
from splicer.containers.engine import (
    Engine,
    EngineError,
    InspectedContainer,
    find_endpoint,
    list_candidates,
    path_of,
)
from splicer.containers.feed import Feed
from splicer.containers.inventory import EMPTY, Inventory, is_current, locate
from splicer.containers.reconciler import InventoryReconciler
from splicer.host import namespaces
from splicer.host.scopes import Scopes
from splicer.logs import Logger
from splicer.model import Container


@dataclass(frozen=True)
class Timing:
    """Seconds. `pause` lies between two rounds of questions; the first hint after a rest is followed at once.
    `glance` is how often the engine's socket is looked at while there is no connection."""

    pause: float = 0.05
    everything: float = 30.0
    shortest_backoff: float = 0.2
    longest_backoff: float = 5.0
    glance: float = 0.25
    stop: float = 1.0


TIMING = Timing()


class Watcher:
    """A thread that keeps the inventory. A context manager: it watches inside the block."""

    def __init__(
        self,
        docker: str,
        scopes: Scopes,
        on_change: Callable[[], None],
        log: Logger,
        *,
        environ: Mapping[str, str] = os.environ,
        connect: Callable[[str, Mapping[str, str]], Engine] = Engine,
        locate: Callable[[InspectedContainer, Scopes], Container] = locate,
        is_current: Callable[[Container], bool] = is_current,
        timing: Timing = TIMING,
    ) -> None:
        """`docker` is "auto", "off" or an address. `on_change` is called by the watcher's thread."""
        self._docker = docker
        self._on_change = on_change
        self._log = log
        self._environ = environ
        self._connect = connect
        self._timing = timing
        self._thread: threading.Thread | None = None

        # Guards what follows, and is notified of every change.
        self._changed = threading.Condition()
        self._stopping = False
        self._feed: Feed | None = None
        self._published: Inventory | None = EMPTY if docker == "off" else None
        self._tried = docker == "off"
        self._state = ConnectionState(docker, log, self._changed)

        # The thread's own.
        self._reconciler = InventoryReconciler(scopes, log, timing.pause, locate, is_current)
        self._round_at = 0.0

    # -- for other threads ---------------------------------------------------------------------------------

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch, unless that is off."""
        if self._docker != "off" and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread within a second. `on_change` is not called any more.

        If it waits for an engine that hangs, it is left to end when it has waited long enough.
        """
        with self._changed:
            self._stopping = True
            if self._feed is not None:
                self._feed.stream.stop()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._timing.stop)

    def read_inventory(self) -> Inventory | None:
        """Running containers by id: a snapshot, another object whenever it differs.

        None as long as no engine has told about all of them; empty when the watcher is off.
        """
        return self._published

    def wait_first(self, timeout: float) -> bool:
        """Wait until all containers are known or no engine is there to ask; False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._tried or self._stopping, timeout)

    def describe(self) -> dict[str, Any]:
        """The state of the connection, for `splicer status`."""
        with self._changed:
            return self._state.describe(len(self._published or EMPTY))

    # -- the connection ------------------------------------------------------------------------------------

    def _run(self) -> None:
        # Loads what will be needed while there is time.
        with contextlib.suppress(OSError):
            namespaces.read_addresses("/proc/thread-self/ns/net")
        backoff = self._timing.shortest_backoff
        while True:
            started, sockets = time.monotonic(), self._look_at_sockets()
            kind, message = "lost", ""
            try:
                self._watch()
            except EngineError as error:
                kind, message = error.kind, error.message
            except Exception as error:
                # A thread that dies in silence would leave the inventory as it is for ever.
                self._log.exception("docker_failed", error=repr(error))
                message = f"unexpected: {error!r}"
            if self._stopping:
                return
            self._lose(kind, message)
            if time.monotonic() - started > self._timing.longest_backoff:
                backoff = self._timing.shortest_backoff
            self._rest(backoff, sockets)
            backoff = min(2 * backoff, self._timing.longest_backoff)

    def _list_candidates(self) -> tuple[str, ...]:
        # While one engine restarts, another one's containers are not what to go on with.
        if self._state.was_connected:
            return (self._state.endpoint,)
        return list_candidates(self._docker, self._environ)

    def _watch(self) -> None:
        """Connect, and follow the engine until the watcher is stopped. Raises EngineError."""
        endpoint = find_endpoint(self._list_candidates())
        self._state.note_endpoint(endpoint)
        self._reconciler.begin_anew()
        with contextlib.closing(self._connect(endpoint, self._environ)) as engine:
            self._follow(engine)

    def _lose(self, kind: str, error: str) -> None:
        self._state.note_lost(kind, error)
        with self._changed:
            self._tried = True
            self._changed.notify_all()

    def _rest(self, seconds: float, sockets: object) -> None:
        """Wait before the next attempt, but not if an engine has made a new socket."""
        until = time.monotonic() + seconds
        with self._changed:
            while (left := until - time.monotonic()) > 0 and self._look_at_sockets() == sockets:
                if self._changed.wait_for(lambda: self._stopping, min(left, self._timing.glance)):
                    return

    def _look_at_sockets(self) -> tuple[tuple[int, ...], ...]:
        """What tells a socket from one that was made anew in its place."""
        found = []
        for endpoint in self._list_candidates():
            with contextlib.suppress(OSError):
                if path := path_of(endpoint):
                    status = os.stat(path)
                    found.append((status.st_dev, status.st_ino, status.st_ctime_ns))
        return tuple(found)

    # -- what the engine says ------------------------------------------------------------------------------

    def _follow(self, engine: Engine) -> None:
        # Events first: what happens after the list was made is not missed.
        feed = self._open(engine, 0)
        everything_at = 0.0
        try:
            while True:
                self._wait(feed, everything_at)
                if self._stopping:
                    return
                work = feed.take()
                if feed.ended:
                    if not feed.stream.idle:
                        everything_at = 0.0
                    feed = self._reopen(engine, feed)
                if work.everything or time.monotonic() >= everything_at:
                    self._state.note_connected(self._reconciler.compare(engine))
                    everything_at = time.monotonic() + self._timing.everything
                self._reconciler.queue(work)
                self._reconciler.inspect(engine)
                self._publish()
                self._round_at = time.monotonic()
        finally:
            with self._changed:
                self._feed = None
            feed.close()

    def _open(self, engine: Engine, since_ns: int) -> Feed:
        feed = Feed(engine.follow(since_ns), self._changed)
        with self._changed:
            self._feed = feed
        return feed

    def _reopen(self, engine: Engine, feed: Feed) -> Feed:
        if feed.stream.idle:
            # The engine's clock need not be ours to the millisecond, and hints may well come twice.
            return self._open(
                engine, feed.stream.last_ns + 1 if feed.stream.last_ns else feed.opened_ns - 10**9
            )
        if time.monotonic() - feed.opened < 1.0:
            raise EngineError("lost", f"the container engine ends the stream of events ({engine.endpoint})")
        self._log.debug("docker_events_cut", endpoint=engine.endpoint)
        return self._open(engine, 0)

    def _wait(self, feed: Feed, everything_at: float) -> None:
        """Return when there is something to do, though not sooner than `pause` after the last round."""
        if self._reconciler.is_behind:
            return
        due = min(everything_at, self._reconciler.retry_at)
        with self._changed:
            pause = self._round_at + self._timing.pause - time.monotonic()
            self._changed.wait_for(lambda: self._stopping, pause)
            self._changed.wait_for(
                lambda: self._stopping or feed.ended or bool(feed.work), due - time.monotonic()
            )

    def _publish(self) -> None:
        inventory = self._reconciler.inventory
        # The first inventory is all there is: somebody may be waiting to act on what is not in it.
        if inventory is self._published or (self._published is None and self._reconciler.is_behind):
            return
        with self._changed:
            if self._stopping:
                return
            self._published = inventory
            self._tried = True
            self._changed.notify_all()
        self._on_change()
