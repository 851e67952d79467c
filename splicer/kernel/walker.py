# SPDX-License-Identifier: Apache-2.0
"""Runs iterators in network namespaces, to their end, with patience."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from splicer.host.namespaces import entered
from splicer.kernel import libbpf

# A walk over the sockets of a namespace takes milliseconds. One that takes longer waits for the lock of a
# socket whose owner sits in a page fault inside recv (see KNOWN_ISSUES.md); it is left to itself.
_PATIENCE_S = 0.5


def open_iterator(link: int, path: str, cookie: int = 0) -> int | None:
    """An iterator over the sockets of the network namespace at `path`, for `Walker.walk`; None if that has
    gone, may not be entered, or is another one than `cookie` says.

    Raises KernelError.
    """
    try:
        with entered(path) as actual:
            return libbpf.create_iterator(link) if cookie in (0, actual) else None
    except libbpf.KernelError:
        raise
    except OSError:
        return None


class _Worker:
    """A thread that runs one job after the other; whoever gave it one need not wait for the end."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="walker", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self._error = error
            self._done.set()

    def run(self, job: Callable[[], None], timeout: float) -> bool:
        """True if the job has ended within `timeout` seconds; raises what it raised. After False the worker
        is still at it: give it no other job, but `leave` it."""
        self._done.clear()
        self._jobs.put(job)
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True

    def leave(self) -> None:
        """End the thread once it has nothing to do."""
        self._jobs.put(None)


class Walker:
    """Walks over sockets, one walk after the other. One that takes longer than `patience` seconds is held
    up."""

    def __init__(self, patience: float = _PATIENCE_S) -> None:
        self._patience = patience
        self._worker: _Worker | None = None

    def walk(self, iterator: int, ended: Callable[[], None] = lambda: None) -> bytes | None:
        """Run an iterator to its end and close it; returns what its program has written.

        None if it is held up. It goes on by itself then, and calls `ended` in a thread of its own when it is
        through, as every walk does.
        """
        if self._worker is None:
            self._worker = _Worker()
        written: list[bytes] = []

        def walk() -> None:
            try:
                written.append(libbpf.finish_iterator(iterator))
            finally:
                ended()

        if self._worker.run(walk, self._patience):
            return written[0]
        self.close()
        return None

    def close(self) -> None:
        """End the thread; a walk that is held up ends by itself."""
        if self._worker is not None:
            self._worker.leave()
            self._worker = None
