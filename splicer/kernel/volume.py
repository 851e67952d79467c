# SPDX-License-Identifier: Apache-2.0
"""How many bytes of local connections TCP has carried, and how many were redirected; see bpf/volume.h."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from splicer.kernel import libbpf
from splicer.kernel.layout import (
    COUNT_PLAIN,
    COUNTERS,
    RECENT_VOLUME,
    TALLY_REQUEST_SIZE,
    VOLUME,
    VOLUME_KEY,
    find_young,
    read_tenants,
)
from splicer.model import REASON_NAMES

_NAME = struct.Struct("=Q")
_REDIRECTED = COUNTERS.index("redirected_bytes")


@dataclass(frozen=True)
class VolumeKey:
    """Ids of the cgroups of client and server, 0 if not known; why it was not redirected (enum reason)."""

    client: int
    server: int
    reason: int


@dataclass(frozen=True)
class Volume:
    """Connections that TCP has carried something of, and how many bytes, both ways."""

    connections: int = 0
    size: int = 0

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.connections + other.connections, self.size + other.size)


@dataclass(frozen=True)
class Volumes:
    """Bytes since the programs were loaded, at `since` (seconds since the epoch). `plain` has all that TCP
    has carried: what is not known of any party any more is under the cgroups 0 and 0. Not `is_complete`: what
    it has carried of connections that are open is not among it."""

    since: float
    redirected: int
    plain: Mapping[VolumeKey, Volume]
    is_complete: bool


@dataclass(frozen=True)
class VolumeRows:
    """What TCP has carried, in bytes, row by row: `closed` as the kernel keeps it, until it forgets;
    `passing` by the cgroups of client and server, what is open and what is about to be among the closed.
    `total` is of all, exact but for what closed meanwhile, and `reasons` of all that is closed, by enum
    reason."""

    closed: Mapping[tuple[int, ...], int]
    passing: Mapping[tuple[int, int], int]
    total: int
    reasons: tuple[int, ...]


class VolumeReader:
    """Reads the maps, and runs tally. May be used by several threads."""

    def __init__(self, maps: Mapping[str, libbpf.Map], program: int | None, pin_dir: str) -> None:
        """No `program`: of open connections nothing is known."""
        self._maps = maps
        self._run = None if program is None else libbpf.TestRun(program, TALLY_REQUEST_SIZE)
        self._guard = threading.Lock()
        # Nobody writes to a pin, so that is when it was made.
        self._since = os.stat(os.path.join(pin_dir, "maps", "counters")).st_mtime

    def read(self) -> Volumes:
        """Closed connections first. So one that closes meanwhile is missing, and none is there twice.

        Raises KernelError.
        """
        with self._guard:
            found: defaultdict[VolumeKey, Volume] = defaultdict(Volume)
            self._read_closed(found)
            try:
                is_complete = self._read_open(found)
            except libbpf.KernelError:  # it is run no more: what is closed is known all the same
                is_complete = False
            redirected = self._sum(_REDIRECTED)
            return Volumes(self._since, redirected, dict(found), is_complete)

    def read_rows(self) -> VolumeRows:
        """For who adds up by himself. Raises KernelError."""
        with self._guard:
            reasons = tuple(self._sum(COUNT_PLAIN + reason) for reason in range(len(REASON_NAMES)))
            closed = {
                VOLUME_KEY.unpack(key): VOLUME.unpack(raw)[1] for key, raw in self._maps["volumes"].items()
            }
            passing: defaultdict[tuple[int, int], int] = defaultdict(int)
            for client, server, _, connections, size in self._read_recent():
                if connections:
                    passing[client, server] += size
            standing: defaultdict[VolumeKey, Volume] = defaultdict(Volume)
            with contextlib.suppress(libbpf.KernelError):
                self._read_open(standing)
            for key, volume in standing.items():
                passing[key.client, key.server] += volume.size
            total = sum(reasons) + sum(volume.size for volume in standing.values())
            return VolumeRows(closed, dict(passing), total, reasons)

    def read_each(self, wanted: Iterable[tuple[int, VolumeKey]]) -> dict[int, int]:
        """Bytes that TCP has carried of these open connections, one by one: by name. Each comes with what it
        counts for, as its record says; of one for which that has changed meanwhile nothing is known.

        Raises KernelError.
        """
        if self._run is None:
            return {}
        found: dict[int, int] = {}
        standing, run, context = self._maps["standing"], self._run.run, self._run.context
        with self._guard:
            self._empty(standing)
            so_far: dict[VolumeKey, int] = {}
            context[:] = bytes(TALLY_REQUEST_SIZE)
            for name, key in wanted:
                _NAME.pack_into(context, 0, name)
                run()
                value = standing.get(VOLUME_KEY.pack(key.client, key.server, key.reason))
                size = VOLUME.unpack(value)[1] if value else 0
                found[name] = size - so_far.get(key, 0)
                so_far[key] = size
            self._empty(standing)
        return found

    def find_tenants(self) -> dict[int, set[int]]:
        """Ids of cgroups that have living connections, each with the processes that read last on them.

        Raises KernelError.
        """
        found: defaultdict[int, set[int]] = defaultdict(set)
        for _, values in libbpf.read_steps(self._maps["pairs"].walk()):
            for cgroup, tgid in read_tenants(values):
                found[cgroup].add(tgid)
        return found

    def _sum(self, index: int) -> int:
        raw = self._maps["counters"].get(struct.pack("=I", index)) or b""
        total: int = sum(struct.unpack(f"={len(raw) // 8}Q", raw))
        return total % (1 << 64)

    def _read_closed(self, found: defaultdict[VolumeKey, Volume]) -> None:
        known = [0] * len(REASON_NAMES)

        def add(client: int, server: int, reason: int, connections: int, size: int) -> None:
            found[VolumeKey(client, server, reason)] += Volume(connections, size)
            known[reason if reason < len(known) else 0] += size

        for key, value in self._maps["volumes"].items():
            add(*VOLUME_KEY.unpack(key), *VOLUME.unpack(value))
        for fields in self._read_recent():
            if fields[3]:
                add(*fields)
        for reason, size in enumerate(known):
            # The sums are exact. Parties are forgotten when there are too many.
            if (missing := self._sum(COUNT_PLAIN + reason) - size) > 0:
                found[VolumeKey(0, 0, reason)] += Volume(0, missing)

    def _read_recent(self) -> Iterator[tuple[int, ...]]:
        recent = self._maps["recent"]
        for slot in range(recent.max_entries):
            yield from RECENT_VOLUME.iter_unpack(recent.get(struct.pack("=I", slot)) or b"")

    def _read_open(self, found: defaultdict[VolumeKey, Volume]) -> bool:
        if self._run is None:
            return False
        standing = self._maps["standing"]
        self._empty(standing)
        context, run, size = self._run.context, self._run.run, TALLY_REQUEST_SIZE
        for names in self._read_names():
            for start in range(0, len(names), size):
                part = names[start : start + size]
                # There is no connection with the name 0, but for one in 2^64.
                context[:] = bytes(part).ljust(size, b"\0")
                run()
        entries = standing.items()
        for key, value in entries:
            found[VolumeKey(*VOLUME_KEY.unpack(key))] += Volume(*VOLUME.unpack(value))
        self._empty(standing)
        return len(entries) < standing.max_entries

    def _read_names(self) -> Iterator[bytes | memoryview]:
        """Of all connections that are known. Pairs come first: one that grows up meanwhile is missing, and
        none is there twice."""
        for name in ("pairs", "seeds"):
            for keys, _ in libbpf.read_steps(self._maps[name].walk()):
                yield keys
        yield b"".join(find_young(seed for _, seed in self._maps["young"].items()))

    @staticmethod
    def _empty(standing: libbpf.Map) -> None:
        for key, _ in standing.items():
            with contextlib.suppress(libbpf.KernelError):
                standing.delete(key)
