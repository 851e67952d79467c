# SPDX-License-Identifier: Apache-2.0
"""Sees when a network is taken away from spliced connections: a link goes down, an interface or an address is
deleted. Plain TCP stalls then, and what is spliced would go on.

News only hint at which namespace to look at. What counts is how it looks, compared with before. So lost news
cost time only, and a link that is up again before anybody has looked was never down.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from splicer.host.namespaces import Directory
from splicer.host.networks import MOST_NAMESPACES, Lookout, Network
from splicer.kernel.layout import pack_place
from splicer.kernel.sweep import NO_LOSSES, Losses
from splicer.logs import Logger

# From the first hint to the look: one change leads to several.
HINT_PAUSE_S = 0.02
# All are looked at so often, where news are heard and where they are not.
HEARING_PERIOD_S = 15.0
DEAF_PERIOD_S = 0.75
# Share of one CPU for either kind of look.
LOOK_SHARE = 0.02
# What was just about to be spliced is found when the same is said once more.
REPEAT_S = 0.5
_STOP_S = 1.0

_STARTING, _HEARS, _ASKS, _UNAVAILABLE = "starting", "hears", "asks", "unavailable"


class View(Protocol):
    """See host.networks.Lookout."""

    @property
    def hears(self) -> bool: ...
    @property
    def is_full(self) -> bool: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def admit(self, cookie: int, path: str) -> bool: ...
    def hear(self) -> set[int]: ...
    def look(self, cookie: int) -> Network | None: ...


class Finder(Protocol):
    """See host.namespaces.Directory."""

    def find(self, cookie: int, pids: Iterable[int] = ()) -> str | None: ...


def compare(netns: int, before: Network, after: Network) -> Losses:
    """What a namespace (cookie) has lost."""
    removed, cut = set(), set()
    for address, was_up in before.addresses.items():
        if address not in after.addresses:
            removed.add(pack_place(netns, address))
        elif was_up and not after.addresses[address]:
            cut.add(pack_place(netns, address))
    silent = {netns} if before.loopback and not after.loopback else set()
    return Losses(frozenset(removed), frozenset(cut), frozenset(silent))


@dataclass
class _Watched:
    """A namespace: processes likely in it, how it looked last, and before it lost something a moment ago."""

    pids: set[int]
    seen: Network | None = None
    before: Network | None = None
    repeat_at: float = math.inf


class NetworkEye:
    """Looks at namespaces when it is time to. Times are of `clock`, in seconds. One thread may use it."""

    def __init__(
        self,
        open_view: Callable[[], View],
        directory: Finder,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """Raises OSError if there can be no view."""
        self._open_view = open_view
        self._view = open_view()
        self._directory = directory
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._watched: dict[int, _Watched] = {}
        self._hinted: set[int] = set()
        self._hints_at = math.inf
        self._hints_after = -math.inf
        self._all_at = clock()

    def close(self) -> None:
        self._view.close()

    def fileno(self) -> int:
        """Readable when there is something to hear."""
        return self._view.fileno()

    @property
    def is_curious(self) -> bool:
        """What it has heard it has seen to. Else there is no hurry to hear more."""
        return not self._hinted

    @property
    def hears(self) -> bool:
        """Does it hear the news, or does it have to ask?"""
        return self._view.hears

    @property
    def seen(self) -> frozenset[int]:
        """The namespaces that were seen: from then on a loss is noticed."""
        return frozenset(cookie for cookie, watched in self._watched.items() if watched.seen is not None)

    @property
    def deadline(self) -> float:
        """When there will be something to do."""
        repeats = (each.repeat_at for each in self._watched.values())
        return min(self._hints_at, self._all_at if self._watched else math.inf, *repeats)

    def keep(self, namespaces: Mapping[int, Iterable[int]]) -> None:
        """Look at these (cookie to processes likely in it) from now on, and at no others."""
        fresh = namespaces.keys() - self._watched.keys()
        self._watched = {
            cookie: self._watched.get(cookie) or _Watched(set(pids)) for cookie, pids in namespaces.items()
        }
        if fresh:
            self._hint(fresh, self._clock())

    def hear(self) -> None:
        """Take note of the news. Never waits."""
        if heard := self._view.hear() & self._watched.keys():
            self._hint(heard, self._clock() + HINT_PAUSE_S)

    def _hint(self, cookies: Iterable[int], due: float) -> None:
        self._hinted.update(cookies)
        self._hints_at = min(self._hints_at, max(due, self._hints_after))

    def work(self) -> Losses:
        """Do what is due; what was lost. Raises OSError if there can be no view any more."""
        found, now = NO_LOSSES, self._clock()
        if now >= self._hints_at:
            hinted = self._hinted | self._view.hear()
            self._hinted, self._hints_at = set(), math.inf
            lost, spent = self._look(hinted)
            found |= lost
            self._hints_after = now + spent / LOOK_SHARE
        if now >= self._all_at and self._watched:
            self._all_at = math.inf
            lost, spent = self._look(self._watched)
            found |= lost
            period = HEARING_PERIOD_S if self._view.hears else DEAF_PERIOD_S
            self._all_at = min(self._all_at, now + max(period, spent / LOOK_SHARE))
        return found | self._repeat(now)

    def _look(self, cookies: Iterable[int]) -> tuple[Losses, float]:
        """What was lost, and seconds of CPU time that it took to see it."""
        begun, found = self._cpu_clock(), NO_LOSSES
        for cookie in cookies:
            if (watched := self._watched.get(cookie)) is not None:
                found |= self._look_at(cookie, watched)
        return found, self._cpu_clock() - begun

    def _look_at(self, cookie: int, watched: _Watched) -> Losses:
        seen = self._see(cookie, watched.pids)
        if seen is None or seen == watched.seen:
            return NO_LOSSES
        before, watched.seen = watched.seen, seen
        if before is None:
            return NO_LOSSES
        lost = compare(cookie, before, seen)
        if lost:
            # One change may be seen in parts.
            watched.before = watched.before or before
            watched.repeat_at = self._clock() + REPEAT_S
        return lost

    def _see(self, cookie: int, pids: Iterable[int]) -> Network | None:
        """None: it has gone, nobody is known to be in it, or it cannot be seen just now."""
        if self._view.is_full:
            view = self._open_view()
            self._view.close()
            # What happened in between has not been heard.
            self._view, self._all_at = view, self._clock()
        try:
            seen = self._view.look(cookie)
            if seen is None:  # it was not admitted, or it has gone
                path = self._directory.find(cookie, pids)
                if path is not None and self._view.admit(cookie, path):
                    seen = self._view.look(cookie)
        except OSError:
            return None
        return seen

    def _repeat(self, now: float) -> Losses:
        found = NO_LOSSES
        for cookie, watched in self._watched.items():
            if watched.repeat_at <= now:
                assert watched.before is not None and watched.seen is not None, "it was looked at"
                found |= compare(cookie, watched.before, watched.seen)
                watched.before, watched.repeat_at = None, math.inf
        return found


class NetworkWatcher:
    """Keeps an eye on the networks of spliced connections. A context manager: it watches inside the block.

    It does so in a thread, since the kernel answers when whoever is changing a network has finished.
    """

    def __init__(
        self,
        on_loss: Callable[[], None],
        log: Logger,
        *,
        open_view: Callable[[], View] = Lookout,
        directory: Finder | None = None,
    ) -> None:
        """`on_loss` is called by the watcher's thread: then there is something to `take`."""
        self._on_loss = on_loss
        self._log = log
        self._open_view = open_view
        self._directory = directory or Directory()
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="networks", daemon=True)
        # The loop's own: who was wanted since all were named last, and may not be spliced yet.
        self._fresh: dict[int, set[int]] = {}
        self._complained = False
        # Guards what follows.
        self._guard = threading.Lock()
        self._wanted: dict[int, set[int]] = {}
        self._losses = NO_LOSSES
        self._state = _STARTING
        self._seen: frozenset[int] = frozenset()

    def __enter__(self) -> NetworkWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():
            os.close(self._wake_fd)

    # -- for the daemon's loop -----------------------------------------------------------------------------

    def attend(self, netns: Iterable[int], tgid: Iterable[int]) -> None:
        """A pair is about to be spliced: namespaces (cookies) of its ends, and processes likely in them."""
        unknown = {
            cookie: {pid} - {0}
            for cookie, pid in zip(netns, tgid, strict=True)
            if cookie and cookie not in self._wanted
        }
        if unknown:
            self._fresh |= unknown
            self._want(self._wanted | unknown)

    def keep(self, namespaces: Mapping[int, set[int]]) -> None:
        """The same of all pairs that are spliced: nobody else is of interest any more."""
        wanted = self._fresh | dict(namespaces)
        self._fresh = {}
        # Those that are watched already come first.
        self._want({key: wanted[key] for key in self._wanted if key in wanted} | wanted)

    def _want(self, namespaces: dict[int, set[int]]) -> None:
        if len(namespaces) > MOST_NAMESPACES:
            if not self._complained:
                self._log.warning("networks_not_watched", error=f"there are more than {MOST_NAMESPACES}")
                self._complained = True
            namespaces = dict(list(namespaces.items())[:MOST_NAMESPACES])
        if namespaces.keys() != self._wanted.keys():
            with self._guard:
                self._wanted = namespaces
            os.eventfd_write(self._wake_fd, 1)

    def take(self) -> Losses:
        """What was lost since this was asked last."""
        with self._guard:
            losses, self._losses = self._losses, NO_LOSSES
        return losses

    def describe(self) -> dict[str, Any]:
        """For `splicer status`. Any thread may ask."""
        return {"state": self._state, "namespaces": sorted(self._seen)}

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with contextlib.closing(NetworkEye(self._open_view, self._directory)) as eye:
                self._state = _HEARS if eye.hears else _ASKS
                while not self._stopping:
                    self._turn(eye)
        except OSError as error:
            self._log.warning("networks_not_watched", error=str(error))
        except Exception as error:
            # A thread that dies in silence would be missed by nobody.
            self._log.exception("networks_not_watched", error=repr(error))
        if not self._stopping:
            self._state, self._seen = _UNAVAILABLE, frozenset()

    def _turn(self, eye: NetworkEye) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if eye.is_curious:
            poll.register(eye.fileno(), select.POLLIN)
        wait = eye.deadline - time.monotonic()
        ready = dict(poll.poll(None if math.isinf(wait) else max(0.0, math.ceil(wait * 1000))))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
            with self._guard:
                wanted = self._wanted
            eye.keep(wanted)
        if eye.fileno() in ready:
            eye.hear()
        losses = eye.work()
        self._seen = eye.seen
        if losses:
            with self._guard:
                self._losses |= losses
            self._on_loss()
