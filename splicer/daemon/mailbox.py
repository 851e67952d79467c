# SPDX-License-Identifier: Apache-2.0
"""What other threads leave for the daemon's loop to do, and what wakes it."""

from __future__ import annotations

import contextlib
import os
import time
from enum import Enum, auto


class Task(Enum):
    """Something to be done by the loop. Asked for twice before it is done, it is done once."""

    APPLY_POLICY = auto()  # the containers are not what they were
    LOOK_AT_ALL = auto()  # the policy in the kernel has changed: look at all pairs
    DRAIN_ALL = auto()  # take all pairs back to plain TCP, once
    DRAIN_STALLED = auto()  # a network was taken away: take the pairs that need it back


class Mailbox:
    """Flags, one for each task, and a pipe with a byte in it to wake whoever polls. Any thread may post."""

    def __init__(self) -> None:
        self._posted = dict.fromkeys(Task, False)
        self._since = dict.fromkeys(Task, 0.0)
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def post(self, task: Task) -> None:
        """Leave a task, and wake the loop."""
        if not self._posted[task]:
            self._since[task] = time.monotonic()
        self._posted[task] = True
        # Full: it wakes anyway. Closed: it has ended.
        with contextlib.suppress(OSError):
            os.write(self.write_fd, b"\0")

    def take(self, task: Task) -> bool:
        """Was it posted since it was taken last?"""
        if not self._posted[task]:
            return False
        self._posted[task] = False
        return True

    def read_lag(self, task: Task) -> float:
        """For how many seconds a task has been waiting; 0 if there is none."""
        since = self._since[task]
        return time.monotonic() - since if self._posted[task] else 0.0

    def empty_pipe(self) -> None:
        """Forget what woke the loop; what was posted stays. Never waits."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.read_fd, 4096)

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)
