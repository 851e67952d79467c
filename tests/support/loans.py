# SPDX-License-Identifier: Apache-2.0
"""Another process's socket in the test's own hands, while that process is busy with it."""

from __future__ import annotations

import ctypes
import os
import socket

PIDFD_GETFD = 438  # the number of pidfd_getfd(2) on every architecture


def borrow(pid: int, fd: int) -> socket.socket:
    """The socket that is number `fd` of a process; closing it does not close the process's."""
    process = os.pidfd_open(pid)
    try:
        got = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if got < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {pid}")
    return socket.socket(fileno=got)
