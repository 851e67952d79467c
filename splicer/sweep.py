# SPDX-License-Identifier: Apache-2.0
"""Running the iterators: adopt in each network namespace with something to do, watch over the SOCKHASH."""

from __future__ import annotations

import dataclasses
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splicer import libbpf
from splicer.layout import SWEEP, KernelSettings, Pair, read_pair, read_seed
from splicer.model import REASON_NAMES
from splicer.namespaces import Directory, entered

_ZERO = struct.pack("=I", 0)


@dataclass(frozen=True)
class Counts:
    """What one sweep saw; see enum sweep_counter in bpf/types.h."""

    seen: int = 0
    adopted: int = 0
    drained: int = 0
    to_adopt: int = 0
    half: int = 0
    to_drain: int = 0
    stuck: int = 0
    unread: int = 0


class Sweeper:
    """The iterators and maps of one generation of programs."""

    def __init__(
        self,
        adopt_link: int,
        watch_link: int,
        maps: Mapping[str, libbpf.Map],
        directory: Directory | None = None,
    ) -> None:
        self._adopt = adopt_link
        self._watch = watch_link
        self._maps = maps
        self._directory = directory or Directory()

    def _clear(self) -> None:
        for index in range(len(SWEEP)):
            self._maps["sweep"].set(struct.pack("=I", index), struct.pack("=Q", 0))

    def _read(self) -> Counts:
        values = {}
        for index, field in enumerate(dataclasses.fields(Counts)):
            raw = self._maps["sweep"].get(struct.pack("=I", index))
            values[field.name] = struct.unpack("=Q", raw)[0] if raw else 0
        return Counts(**values)

    def adopt(self, namespaces: Mapping[int, Iterable[int]]) -> Counts:
        """Visit every socket of the namespaces (cookie to processes likely in it) once."""
        self._clear()
        for cookie, pids in namespaces.items():
            path = self._directory.find(cookie, pids)
            if path is None:
                continue  # gone, and its sockets with it
            try:
                with entered(path) as actual:
                    if actual != cookie:
                        continue
                    iterator = libbpf.create_iterator(self._adopt)
            except libbpf.KernelError:
                raise
            except OSError:
                continue
            libbpf.finish_iterator(iterator)
        return self._read()

    def watch(self) -> Counts:
        """Look at every end in the SOCKHASH."""
        self._clear()
        libbpf.finish_iterator(libbpf.create_iterator(self._watch))
        return self._read()

    def pairs(self) -> list[Pair]:
        return [read_pair(value) for _, value in self._maps["pairs"].items()]

    def connections(self) -> list[Pair]:
        """All that is known, the young ones included."""
        seeds = [read_seed(value) for _, value in self._maps["seeds"].items()]
        return [pair for pair in seeds if pair] + self.pairs()

    def change_settings(self, **changes: Any) -> None:
        """Rewrite single fields of the settings map."""
        raw = self._maps["settings"].get(_ZERO)
        if raw is not None:
            self._maps["settings"].set(
                _ZERO, dataclasses.replace(KernelSettings.unpack(raw), **changes).pack()
            )

    def drain(self, reason: str, timeout: float) -> int:
        """Take every end out of the SOCKHASH; no verdict redirects from here on.

        Returns the number of pairs still in it after `timeout` seconds: their readers do not read. That is
        safe, see ARCHITECTURE.md. The caller decides whether splicing goes on afterwards.
        """
        self.change_settings(splicing=0, stopping=REASON_NAMES.index(reason))
        deadline = time.monotonic() + timeout
        pause = 0.001
        while True:
            left = [pair for pair in self.pairs() if pair.is_in_map]
            if not left:
                return 0
            namespaces: dict[int, set[int]] = {}
            for pair in left:
                for end in (pair.client, pair.server):
                    namespaces.setdefault(end.netns, set()).add(end.tgid)
            self.adopt(namespaces)
            if time.monotonic() >= deadline:
                return sum(pair.is_in_map for pair in self.pairs())
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
