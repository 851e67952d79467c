# SPDX-License-Identifier: Apache-2.0
"""What the events of the engine hint at, collected while the watcher is busy with other things."""

from __future__ import annotations

import contextlib
import threading
import time

from splicer.containers.engine import EngineError, Events
from splicer.containers.inventory import NO_HINTS, Hints, collect_hints

# How long the end of the thread is waited for.
_STOP_S = 1.0


class Feed:
    """A thread that reads a stream of events, and keeps what they hint at until it is taken."""

    def __init__(self, stream: Events, changed: threading.Condition) -> None:
        self.work = NO_HINTS
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

    def take(self) -> Hints:
        """What events have hinted at since the last time."""
        with self._changed:
            work, self.work = self.work, NO_HINTS
            return work

    def close(self) -> None:
        """End the thread and the stream."""
        self.stream.stop()
        self._thread.join(_STOP_S)
