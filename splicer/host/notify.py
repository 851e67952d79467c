# SPDX-License-Identifier: Apache-2.0
"""Telling the service manager how it goes: the protocol of sd_notify(3), for units of Type=notify."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


def tell(environ: Mapping[str, str], *lines: str) -> bool:
    """Send lines such as READY=1 to $NOTIFY_SOCKET. False when there is none or nobody listens.

    Never raises and never waits: a service manager that has trouble is no reason to have some too.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # the abstract namespace, unix(7)
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
    ):
        sock.sendto("\n".join(lines).encode(), address)
        return True
    return False


def tell_reloading(environ: Mapping[str, str]) -> bool:
    """RELOADING=1 with the time it carries for units of Type=notify-reload; READY=1 ends it."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return tell(environ, "RELOADING=1", f"MONOTONIC_USEC={now}")


def wants_watchdog(environ: Mapping[str, str]) -> bool:
    """Does the service manager expect WATCHDOG=1 from this process?"""
    expected = environ.get("WATCHDOG_PID")
    return bool(environ.get("WATCHDOG_USEC")) and expected in (None, "", str(os.getpid()))
