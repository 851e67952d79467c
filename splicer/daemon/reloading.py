# SPDX-License-Identifier: Apache-2.0
"""What became of reading the configuration again: a failure is remembered until one succeeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from splicer.errors import SplicerError


class ReloadReport:
    """Written by the daemon's loop, read by the threads that answer requests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: tuple[SplicerError, float] | None = None

    def note(self, failure: SplicerError | None) -> None:
        """The configuration was read again, or could not be."""
        self._failed = None if failure is None else (failure, self._clock())

    def describe(self) -> dict[str, Any]:
        """For `splicer status`: empty, or what is wrong, what to do, and since when in seconds."""
        if (failed := self._failed) is None:
            return {}
        error, at = failed
        return {
            "failed": error.message,
            "hint": error.hint or "",
            "since_seconds": round(self._clock() - at, 3),
        }
