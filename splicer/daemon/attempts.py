# SPDX-License-Identifier: Apache-2.0
"""When it was last tried to splice a connection, for the latest ones that were tried."""

from __future__ import annotations

import time

_MOST = 4096


class Attempts:
    """Written by the daemon's loop, read by the threads that answer requests."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._at: dict[int, int] = {}

    def note(self, name: int) -> None:
        """It is tried now."""
        self._at.pop(name, None)
        self._at[name] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if len(self._at) > self._most:
            del self._at[next(iter(self._at))]

    def find(self, name: int) -> int | None:
        """When that was, in nanoseconds of CLOCK_MONOTONIC; None if it is not known."""
        return self._at.get(name)
