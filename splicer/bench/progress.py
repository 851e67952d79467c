# SPDX-License-Identifier: Apache-2.0
"""How far a measurement has come, and how long it will take: one line on a terminal, nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from splicer.text import elide, human_age, is_terminal, terminal_width

_BAR = 24


class Progress:
    """Steps of about the same length. `clock` gives seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown = is_terminal(stream)
        self._begun = clock()
        self._steps = 0
        self._done = 0
        self._drawn = False

    def begin(self, steps: int) -> None:
        """Now there are so many of them to do."""
        self._begun, self._steps, self._done = self._clock(), steps, 0

    def step(self, what: str) -> None:
        """The next one begins; `what` it is."""
        self._draw(what)
        self._done += 1

    def clear(self) -> None:
        """Take the line away, before something else is written."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    def _draw(self, what: str) -> None:
        if not self._shown:
            return
        share = min(1.0, self._done / self._steps) if self._steps else 0.0
        filled = round(share * _BAR)
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {self._describe_rest(share)}  {what}"
        # A line that fills the last column would be wrapped, and stay.
        self._stream.write("\r\x1b[K" + elide(line, (terminal_width(self._stream) or 80) - 1))
        self._stream.flush()
        self._drawn = True

    def _describe_rest(self, share: float) -> str:
        if not self._done or not self._steps:
            return f"{share:4.0%}"
        left = (self._clock() - self._begun) / self._done * (self._steps - self._done)
        return f"{share:4.0%}, {human_age(max(left, 0.0))} left"
