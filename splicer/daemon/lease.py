# SPDX-License-Identifier: Apache-2.0
"""conntrack and IPVS follow connections by their packets. Of a spliced one they see none, however busy it is,
and forget it after a while. Then it could not go back to plain TCP. So while something is sent on it, TCP
speaks once in a lease: one keep-alive probe that we send in the client's name, and the answer of the server's
own TCP.

Nothing is remembered of a connection here. When its leases end is told by its name, so that they are spread
over the time; whether something was sent meanwhile is known to watch (enum talk in bpf/types.h).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from splicer.daemon.patrol import PERIOD_S
from splicer.host import keepalive
from splicer.host.keepalive import Probe
from splicer.host.namespaces import entered
from splicer.kernel.sweep import Caller
from splicer.logs import Logger

# So many are renewed at a time, for this share of one CPU at most.
RENEWALS = 64
RENEW_SHARE = 0.01


class Tenants(Protocol):
    """What a keeper of leases needs of a Sweeper."""

    def find_talkers(self, names: Sequence[int]) -> list[int]: ...
    def read_caller(self, name: int) -> Caller | None: ...


class Finder(Protocol):
    """See host.namespaces.Directory."""

    def find(self, cookie: int, pids: Iterable[int] = ()) -> str | None: ...


def send_from(path: str, netns: int, probes: Iterable[Probe]) -> int:
    """Send these from the namespace (cookie) at `path`, if it is there still: how many went out."""
    sent = 0
    with contextlib.suppress(OSError), entered(path) as actual:
        for probe in probes if actual == netns else ():
            with contextlib.suppress(OSError):
                keepalive.send(probe)
                sent += 1
    return sent


class LeaseKeeper:
    """The leases of one generation of programs. Times are of `clock`, in seconds. Only the daemon's loop may
    use it."""

    def __init__(
        self,
        lease: float,
        tenants: Tenants,
        directory: Finder,
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
        send: Callable[[str, int, Iterable[Probe]], int] = send_from,
        may_send: Callable[[], bool] = keepalive.may_send,
    ) -> None:
        """`lease`: how long TCP may be silent where something is sent; 0: for ever."""
        self.lease = lease
        self._tenants = tenants
        self._directory = directory
        self._log = log
        self._clock = clock
        self._send = send
        self._may_send = may_send
        self._round = -math.inf
        # Places among which names are spread, and those whose turn it is in this round.
        self._first = self._count = 0
        # Names, in the order in which they came. The values are of no meaning.
        self._due: dict[int, None] = {}
        self._due_at = 0.0
        self._renewed = self._failed = 0
        self._is_forbidden: bool | None = None  # not tried yet

    @property
    def deadline(self) -> float:
        """When there will be something to do."""
        return self._due_at if self._due else math.inf

    def receive(self, names: Sequence[int], begun: float | None, talking: Iterable[int]) -> None:
        """What a look at the pairs found: some `names` of a round that began at that time, in which each
        spliced pair comes once, and those on which something is sent after a lease of silence."""
        if not self.lease or self._is_forbidden:
            return
        self._due.update(dict.fromkeys(talking))
        if begun is None:
            return
        if begun != self._round:
            turn = math.floor(begun / PERIOD_S)
            self._count = 1 if math.isinf(self._round) else turn - math.floor(self._round / PERIOD_S)
            self._first, self._round = turn - self._count + 1, begun
        # A round begins late by up to a period, and a pair's turn in it may be later by another one.
        places = max(1, math.floor(self.lease / PERIOD_S) - 2)
        first, count = self._first, self._count
        ending = [name for name in names if (name - first) % places < count]
        if ending:
            self._due.update(dict.fromkeys(self._tenants.find_talkers(ending)))

    def work(self) -> None:
        """Renew what is due."""
        begun = self._clock()
        if not self._due or begun < self._due_at:
            return
        if self._is_forbidden is None:
            self._find_out()
        some = list(itertools.islice(self._due, RENEWALS))
        for name in some:
            del self._due[name]
        self._renew(some)
        ended = self._clock()
        self._due_at = ended + (ended - begun) / RENEW_SHARE

    def _renew(self, names: Iterable[int]) -> None:
        callers: dict[int, list[Caller]] = {}
        for name in names:
            # It may be plain by now, or gone.
            if caller := self._tenants.read_caller(name):
                callers.setdefault(caller.end.netns, []).append(caller)
        for netns, some in callers.items():
            path = self._directory.find(netns, {caller.end.tgid for caller in some})
            sent = self._send(path, netns, [make_probe(caller) for caller in some]) if path else 0
            self._renewed += sent
            self._failed += len(some) - sent

    def _find_out(self) -> None:
        self._is_forbidden = not self._may_send()
        if self._is_forbidden:
            self._due.clear()
            self._log.warning(
                "leases_not_kept",
                why="CAP_NET_RAW is missing",
                hint="give it to splicer as well: what conntrack or IPVS forgets cannot go back to plain TCP",
            )

    def describe(self) -> dict[str, Any]:
        """For `splicer status`: how it stands, and how many were renewed, and could not be."""
        state = "off" if not self.lease else "forbidden" if self._is_forbidden else "kept"
        return {
            "state": state,
            "seconds": self.lease,
            "renewed": self._renewed,
            "failed": self._failed,
        }


def make_probe(caller: Caller) -> Probe:
    """What the TCP of this client would send if it were to ask whether its peer is there."""
    return Probe(
        keepalive.read_endpoint(caller.end.local),
        keepalive.read_endpoint(caller.end.remote),
        caller.sent,
        caller.received,
        caller.device,
        caller.mark,
    )
