# SPDX-License-Identifier: Apache-2.0
"""The signals that stop the daemon, and the one that has it read its configuration again."""

from __future__ import annotations

import collections
import signal

from splicer.logs import Logger

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Takes note of signals inside the block. Only the main thread may enter it."""

    def __init__(self, wakeup_fd: int, log: Logger) -> None:
        """Each signal writes a byte to `wakeup_fd`, which must not block (signal.set_wakeup_fd)."""
        self._wakeup_fd = wakeup_fd
        self._log = log
        self._untold: collections.deque[int] = collections.deque()
        self._reload_requested = False
        # SIGTERM and SIGINT so far.
        self.stops = 0

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._note) for number in _HANDLED}
        self._previous_fd = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        # Between any two steps of this very thread, which may hold the lock of the log: say nothing here.
        self._untold.append(number)
        if number == signal.SIGHUP:
            self._reload_requested = True
        else:
            self.stops += 1

    def take_reload(self) -> bool:
        """Has SIGHUP come since this was asked last?"""
        if not self._reload_requested:
            return False
        self._reload_requested = False
        return True

    def tell(self) -> None:
        """Log the signals that came since the last time."""
        while self._untold:
            self._log.info("signal", name=signal.Signals(self._untold.popleft()).name)
