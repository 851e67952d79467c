# SPDX-License-Identifier: Apache-2.0
"""A peer's socket in the test's own hands, while the peer is busy with it."""

from __future__ import annotations

import ctypes
import os
import socket

from support.players import End

PIDFD_GETFD = 438  # the number of pidfd_getfd(2) on every architecture


def borrow(end: End, fd: int) -> socket.socket:
    """The socket that is number `fd` of the end's process; closing it does not close the peer's."""
    process = os.pidfd_open(end.peer.pid)
    try:
        got = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if got < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {end.peer.pid}")
    return socket.socket(fileno=got)
