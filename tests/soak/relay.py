# SPDX-License-Identifier: Apache-2.0
"""A relay that damages what passes through it: the checker must notice."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

PASS_FIRST = 20_000  # bytes of each direction that pass before something happens

# What arrives, bytes so far, and the bytes of another connection, to what goes on.
Damage = Callable[[bytes, random.Random, bytes], bytes]


def drop(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + 1 :]


def drop_all(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return b""


def repeat(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[: at + 1] + data[at:]


def repeat_all(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data + data


def swap(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Two neighbouring bytes that differ; the wrong way round."""
    for _ in range(100):
        at = rng.randrange(len(data) - 1)
        if data[at] != data[at + 1]:
            return data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
    return data[::-1]


def swap_halves(data: bytes, rng: random.Random, other: bytes) -> bytes:
    middle = len(data) // 2
    return data[middle:] + data[:middle]


def flip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def insert(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Bytes of another connection."""
    return other + data


def exchange(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """The bytes of another connection instead."""
    return other


DAMAGES: dict[str, Damage] = {
    each.__name__: each
    for each in (drop, drop_all, repeat, repeat_all, swap, swap_halves, flip, insert, exchange)
}


class Relay:
    """Listens on loopback and forwards to a port there. Every connection is damaged once, at random.

    `hold` seconds: instead, one piece of each connection is held back so long; for ever if negative.
    `cut`: instead of damage the connection is ended in an orderly way in the middle.
    """

    def __init__(self, port: int, damage: Damage | None = None, hold: float = 0.0, cut: bool = False) -> None:
        self._port = port
        self._damage = damage
        self._hold = hold
        self._cut = cut
        self._rng = random.Random(port)
        self._last: dict[int, bytes] = {}  # of each connection, for others to get
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.done = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for sock in self._sockets:
            sock.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._sockets += [client, server]
            number += 1
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(*pair, number), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, number: int) -> None:
        at = self._rng.randint(PASS_FIRST // 2, PASS_FIRST)
        try:
            for position, data in _read(source):
                if at is not None and position >= at and (changed := self._spoil(data, number)) is not None:
                    at = None
                    data = changed
                    if self._cut:
                        break
                self._last[number] = data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            target.close()

    def _spoil(self, data: bytes, number: int) -> bytes | None:
        """What goes on instead; None if this is no good occasion."""
        if self._hold:
            self.done += 1
            time.sleep(self._hold if self._hold > 0 else 3600.0)
            return data
        if self._cut:
            self.done += 1
            return b""
        others = [last for key, last in list(self._last.items()) if key != number and last != data]
        assert self._damage is not None
        if len(data) < 2 or not others:
            return None
        changed = self._damage(data, self._rng, others[0])
        if changed == data:
            return None
        self.done += 1
        return changed


def _read(source: socket.socket) -> Iterator[tuple[int, bytes]]:
    position = 0
    while data := source.recv(65536):
        yield position, data
        position += len(data)
