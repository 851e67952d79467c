# SPDX-License-Identifier: Apache-2.0
"""Sums by the services of client and server, out of maps in which entries come and go.

What the kernel keeps of closed connections is by cgroup, and it forgets those that were used longest ago.
What is open is counted by looking at it, and one that closes during the look is missed until the next one. A
sum here takes what is new, once, and never goes back. What no look has seen, because it was forgotten before,
is the difference to the exact total, and goes to the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from splicer.metrics.services import OTHER, Pair, Services

Cgroups = tuple[int, int]
Key = tuple[int, ...]
# A difference counts once it was there at so many looks: what one of them missed is not lost.
_LOOKS = 3
# What has no name yet waits for one so long.
NAME_PATIENCE_S = 3.0


class Ledger:
    """The sums of one quantity. Not for several threads."""

    def __init__(self, services: Services, clock: Callable[[], float] = time.monotonic) -> None:
        self._services = services
        self._clock = clock
        self.sums: dict[Pair, int] = {}
        # What was last seen of each row in the kernel; of closed connections in all; and of all connections.
        self._rows: dict[Key, int] = {}
        self._closed: dict[Cgroups, int] = {}
        self._seen: dict[Cgroups, int] = {}
        self._absent: set[Hashable] = set()
        self._missing: deque[int] = deque(maxlen=_LOOKS)
        # Until when those wait that have no name yet.
        self._patience: dict[Cgroups, float] = {}

    def update(self, rows: Mapping[Key, int], passing: Mapping[Cgroups, int], total: int) -> None:
        """Take over what is new. `rows` are of closed connections, by keys that begin with the cgroups of
        client and server; `passing` is what is open; `total` was read before both."""
        for key, value in rows.items():
            last = self._rows.get(key, 0)
            # Less than before: forgotten meanwhile, and begun anew.
            new = value - last if value >= last else value
            ends = key[0], key[1]
            self._closed[ends] = self._closed.get(ends, 0) + new
            self._rows[key] = value
        waiting = 0
        for ends in self._closed.keys() | passing.keys():
            value = self._closed.get(ends, 0) + passing.get(ends, 0)
            new = value - self._seen.get(ends, 0)
            if new <= 0:
                continue
            if self._is_waiting(ends):
                waiting += new
                continue
            self._add(self._services.name_pair(*ends), new)
            self._seen[ends] = value
        self._forget(rows, passing)
        self._missing.append(total - waiting - sum(self.sums.values()))
        if len(self._missing) == _LOOKS and (left := min(self._missing)) > 0:
            self._add(self._services.admit((OTHER, OTHER)), left)
            self._missing.clear()

    def _is_waiting(self, ends: Cgroups) -> bool:
        """It may get a name yet: what has been added to a sum stays there."""
        if self._services.is_known(*ends):
            self._patience.pop(ends, None)
            return False
        return self._clock() < self._patience.setdefault(ends, self._clock() + NAME_PATIENCE_S)

    def _add(self, pair: Pair, value: int) -> None:
        self.sums[pair] = self.sums.get(pair, 0) + value

    def _forget(self, rows: Mapping[Key, int], passing: Mapping[Cgroups, int]) -> None:
        """What the kernel has forgotten. Twice absent: what moves from one map to another is in neither for a
        moment."""
        alive = {(key[0], key[1]) for key in rows} | passing.keys()
        absent: set[Hashable] = {key for key in self._rows if key not in rows}
        known = self._seen.keys() | self._closed.keys() | self._patience.keys()
        absent |= {("ends", ends) for ends in known if ends not in alive}
        for key in [key for key in self._rows if key in absent and key in self._absent]:
            del self._rows[key]
        for ends in known:
            if ("ends", ends) in absent and ("ends", ends) in self._absent:
                seen = self._seen.pop(ends, 0)
                if (left := self._closed.pop(ends, 0) - seen) > 0:  # it got no name
                    self._add(self._services.name_pair(*ends), left)
                self._patience.pop(ends, None)
        self._absent = absent

    # -- across daemons ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "sums": [[*pair, value] for pair, value in self.sums.items()],
            "rows": [[*key, value] for key, value in self._rows.items()],
            "closed": [[*ends, value] for ends, value in self._closed.items()],
            "seen": [[*ends, value] for ends, value in self._seen.items()],
        }

    def take_over(self, document: Mapping[str, Any]) -> None:
        """Go on where an earlier daemon was. Raises ValueError, TypeError, KeyError or IndexError for what is
        no such document; then nothing has changed."""
        found = {
            name: {tuple(row[:-1]): int(row[-1]) for row in document[name]}
            for name in ("sums", "rows", "closed", "seen")
        }
        texts = {(str(client), str(server)): value for (client, server), value in found["sums"].items()}
        for name, least in (("rows", 2), ("closed", 2), ("seen", 2)):
            if any(len(key) < least or not all(isinstance(n, int) for n in key) for key in found[name]):
                raise ValueError(name)
        self.sums = texts
        self._rows, self._closed, self._seen = found["rows"], found["closed"], found["seen"]
