# SPDX-License-Identifier: Apache-2.0
"""A hold: everything, or some containers, stay plain TCP for a while, whatever the policy says.

It is for those who measure. Nothing of it is stored, and it ends by itself: a measurement that dies leaves
the policy as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splicer.errors import SplicerError

# What one request may ask for. Whoever needs longer asks again.
LONGEST = 120.0


@dataclass(frozen=True)
class Hold:
    """`holder` is a name that whoever asked has made up. `containers`: None for everything. `until` is a time
    of the clock, in seconds."""

    holder: str
    containers: frozenset[str] | None
    until: float


class Holds:
    """The hold that there is, if any. May be used from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._hold: Hold | None = None

    @property
    def current(self) -> Hold | None:
        """None once its time is over."""
        hold = self._hold
        return hold if hold is not None and self._clock() < hold.until else None

    def take(self, holder: str, seconds: float, containers: frozenset[str] | None) -> None:
        """Begin one, or go on with it. Raises SplicerError while somebody else has one."""
        if not (holder and 0 < seconds <= LONGEST):
            raise SplicerError(f"a hold is for 0 to {LONGEST:g} seconds ({seconds:g})")
        with self._guard:
            current = self.current
            if current is not None and current.holder != holder:
                raise SplicerError(
                    f"another measurement holds connections plain ({current.holder})",
                    hint="wait until it is over; splicer status says for how long",
                )
            self._hold = Hold(holder, containers, self._clock() + seconds)

    def release(self, holder: str) -> bool:
        """End it, if it is that holder's."""
        with self._guard:
            if self._hold is None or self._hold.holder != holder:
                return False
            self._hold = None
            return True

    def drop_expired(self) -> bool:
        """True once for each hold whose time is over."""
        with self._guard:
            if self._hold is None or self.current is not None:
                return False
            self._hold = None
            return True

    def describe(self) -> dict[str, Any]:
        """For `splicer status`; empty without one."""
        hold = self.current
        if hold is None:
            return {}
        return {
            "holder": hold.holder,
            "seconds": round(hold.until - self._clock(), 1),
            "containers": None if hold.containers is None else sorted(hold.containers),
        }
