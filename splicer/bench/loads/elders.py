# SPDX-License-Identifier: Apache-2.0
"""Connections that are there before splicer and in use all the time, for the measurement of a census.

    elders.py PORT NUMBER

Makes NUMBER connections over loopback and says so. Then it exchanges a message on one of them every PAUSE,
the next one each time, until standard input ends. For each byte that comes there it prints how long the
longest exchange since the last one took, in milliseconds.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

# Whoever calls this by its path may have another splicer, or none, where Python looks for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from splicer.bench.loads.crowd import connect, wait_readable

PAUSE = 0.02  # seconds
MESSAGE = b"x" * 64


def exchange(client: socket.socket, server: socket.socket) -> float:
    """There and back; seconds."""
    begun = time.monotonic()
    for sender, receiver in ((client, server), (server, client)):
        sender.send(MESSAGE)
        wait_readable(receiver.fileno())
        receiver.recv(len(MESSAGE))
    return time.monotonic() - begun


def main() -> None:
    pairs = connect(int(sys.argv[1]), int(sys.argv[2]))
    print("connected", flush=True)
    turn, longest = 0, 0.0
    while True:
        if wait_readable(0, PAUSE):
            if not os.read(0, 1):
                return
            print(longest * 1000, flush=True)
            longest = 0.0
        longest = max(longest, exchange(*pairs[turn % len(pairs)]))
        turn += 1


if __name__ == "__main__":
    main()
