# SPDX-License-Identifier: Apache-2.0
"""A process that talks with itself over TCP, in a network namespace of its own.

Run as `python -m splicer.doctor.talk`.
It obeys lines on stdin, and answers each with a JSON object: `plain` times a connection that splicer leaves
alone; `open` makes another one, and from then on there is talk on it; `pause` ends that; `measure` times it,
and says how many bytes went there and back. What arrives is compared with what was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import statistics
import struct
import sys
import time
from typing import Any

from splicer.host import namespaces
from splicer.kernel import scratch

ROUNDS = 1000
_QUESTION, _ANSWER = 100, 300  # bytes; of two sizes, so that a sum tells of both directions
_PATIENCE_S = 10.0
_BYTES_RECEIVED = 128  # tcpi_bytes_received in struct tcp_info, include/uapi/linux/tcp.h


class Talk:
    """One connection, and both of its ends."""

    def __init__(self, stack: contextlib.ExitStack, *, plain: bool) -> None:
        made = scratch.Connection(stack, plain=plain)
        self.client, self.server = made.sender, made.receiver
        self.client.setblocking(False)
        self.server.setblocking(False)
        self._rounds = 0

    def _carry(self, sender: socket.socket, receiver: socket.socket, message: bytes) -> None:
        if sender.send(message) != len(message):
            raise RuntimeError("a send was short")
        got = b""
        poll = select.poll()
        poll.register(receiver, select.POLLIN)
        while len(got) < len(message):
            if not poll.poll(_PATIENCE_S * 1000):
                raise RuntimeError(f"{len(got)} of {len(message)} bytes arrived within {_PATIENCE_S:g} s")
            got += receiver.recv(4096)
        if got != message:
            raise RuntimeError("other bytes arrived than were sent")

    def play(self) -> float:
        """One question and its answer; how long it took, in seconds."""
        self._rounds += 1
        number = self._rounds.to_bytes(8, "little")
        begun = time.perf_counter()
        self._carry(self.client, self.server, number * (_QUESTION // 8) + bytes(_QUESTION % 8))
        self._carry(self.server, self.client, number * (_ANSWER // 8) + bytes(_ANSWER % 8))
        return time.perf_counter() - begun

    def _count_tcp(self) -> int:
        """Bytes that have come to either end through TCP, as the kernel counts them."""
        ends = (self.client, self.server)
        infos = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192) for each in ends]
        return sum(int(struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]) for info in infos)

    def measure(self) -> dict[str, Any]:
        """ROUNDS of them: the median in microseconds, the bytes each way, and how many went through TCP."""
        before = self._count_tcp()
        times = [self.play() for _ in range(ROUNDS)]
        return {
            "microseconds": statistics.median(times) * 1e6,
            "there": ROUNDS * _QUESTION,
            "back": ROUNDS * _ANSWER,
            "through_tcp": self._count_tcp() - before,
        }


def _is_told() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _read_line() -> str:
    # Byte by byte: what is in a buffer of Python's, select() would not see.
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(sys.stdin.fileno(), 1)):
            return ""
        line += byte
    return line.decode().strip()


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def main() -> int:
    """Until the end of stdin, or until something does not arrive."""
    namespaces.leave_for_empty()
    with contextlib.ExitStack() as stack:
        talk: Talk | None = None
        while order := _read_line():
            try:
                if order == "plain":
                    with contextlib.ExitStack() as others:
                        _say(**Talk(others, plain=True).measure())
                elif order == "open":
                    talk = Talk(stack, plain=False)
                    _say(port=talk.client.getsockname()[1], netns=namespaces.read_own_cookie())
                    while not _is_told():
                        talk.play()
                elif order == "measure" and talk is not None:
                    _say(**talk.measure())
                else:
                    _say()
            except (OSError, RuntimeError) as error:
                _say(trouble=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
