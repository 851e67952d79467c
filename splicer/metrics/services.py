# SPDX-License-Identifier: Apache-2.0
"""Labels for the two parties of a connection: names of services, and never more of them than so many.

A label is for ever, since a sum that went over to another one would go back. So names are given away as they
come, and who comes too late is among the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from splicer.model import Owner

OTHER = "other"
"""What has no name of its own, or came when all were given away."""
UNKNOWN = "unknown"
"""Nobody knows whose it is: the programs did not note it, or it was gone before anybody asked."""
HOST = "host"
"""Processes of the host that are in no unit."""
_TRANSIENT = "transient"
_RESERVED = (OTHER, UNKNOWN, HOST, _TRANSIENT)
MOST_NAMES = 64
MOST_PAIRS = 512

# What systemd and its like number: there is no end to them.
_NUMBERED = re.compile(r"run-\w?[0-9a-f]+\b|session-\w?\d+\.|user-\d+\.|app-")

Pair = tuple[str, str]


def name_service(owner: Owner) -> str:
    """The compose or swarm service of an owner, else its container, else its systemd unit."""
    if owner.service:
        return owner.service
    if owner.container:
        # Without an engine to ask there is no name but the first digits of the id.
        return OTHER if re.fullmatch("[0-9a-f]{12}", owner.container) else owner.container
    if owner.pod:
        return OTHER
    return _name_unit(owner.cgroup) if owner.cgroup else UNKNOWN


def _name_unit(path: str) -> str:
    """The innermost unit that has no number in its name; an instance counts for its template."""
    for part in reversed(path.split("/")):
        name, dot, kind = part.rpartition(".")
        if not dot or kind not in ("service", "scope", "slice"):
            continue
        if _NUMBERED.match(part):
            if kind == "service" or part.startswith("run-"):
                return _TRANSIENT
            continue
        return f"{name.partition('@')[0]}@.{kind}" if "@" in name else part
    return HOST if path.strip("/") == "" else OTHER


class Services:
    """Names of cgroups. Not for several threads."""

    def __init__(
        self,
        find_owner: Callable[[int], Owner],
        *,
        most_names: int = MOST_NAMES,
        most_pairs: int = MOST_PAIRS,
    ) -> None:
        """`find_owner` is asked for the owner of a cgroup, by its id."""
        self._find_owner = find_owner
        self._most_names = most_names
        self._most_pairs = most_pairs
        self._names: set[str] = set()
        self._pairs: set[Pair] = set()

    def name_pair(self, client: int, server: int) -> Pair:
        """Labels for what goes on between two cgroups, by their ids."""
        return self.admit((self._name(client), self._name(server)))

    def is_known(self, client: int, server: int) -> bool:
        """Has each cgroup that the programs have noted a name? A new one may get it a moment later."""
        return not any(each and name_service(self._find_owner(each)) == UNKNOWN for each in (client, server))

    def admit(self, pair: Pair) -> Pair:
        """The same pair, or that of the others if there are too many."""
        if pair not in self._pairs:
            # One is kept for the others.
            if len(self._pairs) >= self._most_pairs - 1:
                pair = (OTHER, OTHER)
            self._pairs.add(pair)
        return pair

    def take_over(self, pairs: Iterable[Pair]) -> None:
        """Pairs that an earlier daemon had given away."""
        for pair in pairs:
            for name in pair:
                self._admit_name(name)
            self.admit(pair)

    def _name(self, cgroup: int) -> str:
        return self._admit_name(name_service(self._find_owner(cgroup)) if cgroup else UNKNOWN)

    def _admit_name(self, name: str) -> str:
        if name in self._names or name in _RESERVED:
            return name
        if len(self._names) >= self._most_names:
            return OTHER
        self._names.add(name)
        return name
