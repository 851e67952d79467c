# SPDX-License-Identifier: Apache-2.0
"""How much room there is for further connections: as has_room() in bpf/registry.h has it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from splicer.kernel.libbpf import Map

NUMBER = 256  # NR_TENANTS of bpf/maps.h


@dataclass(frozen=True)
class Room:
    """So many connections are followed, of at most so many; and how many are those of each number that
    cgroups of clients fall on."""

    used: int
    most: int
    shares: tuple[int, ...]

    @property
    def largest(self) -> int:
        """How many are of one cgroup, or of some that have one share."""
        return max(self.shares, default=0)

    @property
    def is_full(self) -> bool:
        """Is there somebody whose next connection would not be followed?"""
        return self.used >= self.most or any(
            own and own >= (share := self.most - self.used + own) - share // 8 for own in self.shares
        )


def read_room(maps: Mapping[str, Map]) -> Room:
    """The room of one generation of programs."""
    tenants = maps["tenants"]
    counts = []
    for number in range(NUMBER + 1):
        raw = tenants.get(struct.pack("=I", number)) or bytes(4)
        counts.append(int(struct.unpack("=I", raw)[0]))
    return Room(counts[NUMBER], maps["seeds"].max_entries, tuple(counts[:NUMBER]))
