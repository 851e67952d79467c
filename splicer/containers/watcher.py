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
from typing import Any, Literal

from splicer.containers.engine import (
    Engine,
    EngineError,
    Events,
    Inspected,
    find_endpoint,
    list_candidates,
    path_of,
)
from splicer.containers.inventory import (
    EMPTY,
    NO_WORK,
    Inventory,
    Work,
    collect_hints,
    find_changed,
    is_complete,
    is_current,
    locate,
    merge,
    sort_by_need,
)
from splicer.host import namespaces
from splicer.host.scopes import Scopes
from splicer.logs import Logger
from splicer.model import Container

State = Literal["connected", "absent", "lost", "off"]

# Containers inspected before new hints are looked at, and the inventory is handed out.
_BATCH = 16
# A container that just started is asked about again after 0.1, 0.2, 0.4 and 0.8 s, if something is missing.
_ATTEMPTS = 4


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


class Feed:
    """A thread that reads a stream of events, and keeps what they hint at until it is taken."""

    def __init__(self, stream: Events, changed: threading.Condition) -> None:
        self.work = NO_WORK
        self.ended = False
        self.stream = stream
        self.opened = time.monotonic()
        # The engine's events carry wall-clock time.
        self.opened_ns = time.time_ns()
        self._changed = changed
        self._thread = threading.Thread(target=self._read, name="watcher-events", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # Whatever ends the stream, the remedy is a new one.
        try:
            with contextlib.suppress(EngineError):
                for events in self.stream:
                    with self._changed:
                        self.work = collect_hints(events, self.work)
                        self._changed.notify_all()
        finally:
            self.stream.release()
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def take(self) -> Work:
        """What events have hinted at since the last time."""
        with self._changed:
            work, self.work = self.work, NO_WORK
            return work

    def close(self) -> None:
        """End the thread and the stream."""
        self.stream.stop()
        self._thread.join(TIMING.stop)


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
        locate: Callable[[Inspected, Scopes], Container] = locate,
        is_current: Callable[[Container], bool] = is_current,
        timing: Timing = TIMING,
    ) -> None:
        """`docker` is "auto", "off" or an address. `on_change` is called by the watcher's thread."""
        self._docker = docker
        self._scopes = scopes
        self._on_change = on_change
        self._log = log
        self._environ = environ
        self._connect = connect
        self._locate = locate
        self._is_current = is_current
        self._timing = timing
        self._thread: threading.Thread | None = None

        # Guards what follows, and is notified of every change.
        self._changed = threading.Condition()
        self._stopping = False
        self._feed: Feed | None = None
        self._published: Inventory | None = EMPTY if docker == "off" else None
        self._tried = docker == "off"
        self._state: State = "off" if docker == "off" else "absent"
        self._since = time.monotonic()
        self._endpoint = "" if docker in ("auto", "off") else docker
        self._error = ""

        # The thread's own.
        self._inventory = EMPTY
        self._known: dict[str, int] = {}
        self._waiting: dict[
            str, int | None
        ] = {}  # to inspect, with the fingerprint if the list brought it up
        self._again: dict[str, tuple[int, float]] = {}  # attempts, and when to make the next
        self._round_at = 0.0
        self._was_connected = False
        self._complaint = ""

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
            return {
                "state": self._state,
                "endpoint": self._endpoint,
                "containers": len(self._published or EMPTY),
                "since_seconds": round(time.monotonic() - self._since, 3),
                "error": self._error,
            }

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

    def _candidates(self) -> tuple[str, ...]:
        # While one engine restarts, another one's containers are not what to go on with.
        return (self._endpoint,) if self._was_connected else list_candidates(self._docker, self._environ)

    def _watch(self) -> None:
        """Connect, and follow the engine until the watcher is stopped. Raises EngineError."""
        endpoint = find_endpoint(self._candidates())
        with self._changed:
            self._endpoint = endpoint
        self._waiting.clear()
        self._again.clear()
        with contextlib.closing(self._connect(endpoint, self._environ)) as engine:
            self._follow(engine)

    def _set_state(self, state: State, error: str = "") -> bool:
        with self._changed:
            changed = state != self._state
            if changed:
                self._state, self._since = state, time.monotonic()
            self._error = error
            return changed

    def _lose(self, kind: str, error: str) -> None:
        self._set_state("lost" if self._was_connected else "absent", error)
        # Once for each outage, and again if its reason is one that somebody has to do something about.
        complaint = "refused" if kind == "refused" else "gone"
        if complaint != self._complaint:
            self._complaint = complaint
            if self._was_connected:
                self._log.warning("docker_lost", endpoint=self._endpoint, error=error)
            else:
                self._log.warning("docker_absent", endpoint=self._endpoint, error=error)
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
        found = []
        for endpoint in self._candidates():
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
                    self._reconcile(engine)
                    everything_at = time.monotonic() + self._timing.everything
                self._mark(work)
                self._inspect(engine)
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
        if self._waiting:
            return
        due = min([everything_at, *(due for _, due in self._again.values())])
        with self._changed:
            pause = self._round_at + self._timing.pause - time.monotonic()
            self._changed.wait_for(lambda: self._stopping, pause)
            self._changed.wait_for(
                lambda: self._stopping or feed.ended or bool(feed.work), due - time.monotonic()
            )

    def _reconcile(self, engine: Engine) -> None:
        """Ask for the list: forget who is not on it, and have inspected who is not as before."""
        listed = engine.list_running()
        there = {each.id for each in listed}
        self._known = {each: mark for each, mark in self._known.items() if each in there}
        self._again = {each: again for each, again in self._again.items() if each in there}
        self._inventory = merge(self._inventory, (), [each for each in self._inventory if each not in there])
        hinted = [each for each, mark in self._waiting.items() if mark is None and each in there]
        self._waiting = dict(find_changed(self._inventory, listed, self._known, self._is_current))
        self._waiting |= dict.fromkeys(hinted)
        self._was_connected = True
        self._complaint = ""
        if self._set_state("connected"):
            self._log.info("docker_connected", endpoint=engine.endpoint, containers=len(listed))

    def _mark(self, work: Work) -> None:
        """Put what is to be inspected in order: what events hint at comes first."""
        dirty, gone = sort_by_need(work.dirty, self._inventory, self._is_current)
        self._inventory = merge(self._inventory, (), gone)
        for each in dirty:
            self._again.pop(each, None)
        now = time.monotonic()
        due = [each for each, (_, at) in self._again.items() if at <= now]
        first: dict[str, int | None] = dict.fromkeys([*dirty, *due])
        self._waiting = first | {each: mark for each, mark in self._waiting.items() if each not in first}

    def _inspect(self, engine: Engine) -> None:
        """Inspect the first of those that wait, and hand out what comes of it."""
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
        self._inventory = merge(self._inventory, found, gone)
        self._publish()

    def _try_again(self, identifier: str) -> None:
        attempts = self._again.get(identifier, (0, 0.0))[0] + 1
        pause = self._timing.pause * 2**attempts if attempts <= _ATTEMPTS else float("inf")
        self._again[identifier] = attempts, time.monotonic() + pause

    def _publish(self) -> None:
        # The first inventory is all there is: somebody may be waiting to act on what is not in it.
        if self._inventory is self._published or (self._published is None and self._waiting):
            return
        with self._changed:
            if self._stopping:
                return
            self._published = self._inventory
            self._tried = True
            self._changed.notify_all()
        self._on_change()
