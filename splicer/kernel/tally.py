# SPDX-License-Identifier: Apache-2.0
"""Adds up what the records of connections say, some thousand at a time: no list of them is ever made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from splicer.kernel.layout import STATE_PAIRED, read_amounts


@dataclass(frozen=True)
class Amount:
    """Redirected in both directions; `connections` that carried it."""

    connections: int = 0
    redirected_bytes: int = 0
    redirected_messages: int = 0

    def add(self, other: Amount) -> Amount:
        return Amount(
            self.connections + other.connections,
            self.redirected_bytes + other.redirected_bytes,
            self.redirected_messages + other.redirected_messages,
        )


@dataclass
class Tally:
    """Connections by state (a number of enum pair_state), and what those that are open have had redirected
    between two cgroups (client's and server's ids, 0 if unknown)."""

    states: Counter[int] = field(default_factory=Counter)
    amounts: dict[tuple[int, int], Amount] = field(default_factory=dict)

    def add_young(self, number: int) -> None:
        """So many have no record but a seed."""
        self.states[STATE_PAIRED] += number

    def add(self, values: memoryview) -> None:
        """Records, one after the other, as they are in the map."""
        states, rows = read_amounts(values)
        self.states.update(states)
        self._add_rows(rows)

    def _add_rows(self, rows: Iterable[tuple[int, ...]]) -> None:
        # In lists while it is added up: an object for each record would take ten times as long.
        sums: dict[tuple[int, int], list[int]] = {}
        for client, server, sent, messages, answered, answers in rows:
            if not messages and not answers:
                continue
            found = sums.get((client, server))
            if found is None:
                sums[client, server] = [1, sent + answered, messages + answers]
            else:
                found[0] += 1
                found[1] += sent + answered
                found[2] += messages + answers
        for ends, numbers in sums.items():
            self.amounts[ends] = self.amounts.get(ends, Amount()).add(Amount(*numbers))
