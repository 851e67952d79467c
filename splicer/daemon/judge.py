# SPDX-License-Identifier: Apache-2.0
"""What the policy says of single connections: for those that the programs have not looked at since it
changed, and for counting what a rule is about."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from splicer.daemon.attribution import Attribution
from splicer.kernel.layout import STATE_PAIRED, End, Pair
from splicer.model import REASON_NAMES
from splicer.policy.decision import Book, Decision, Party
from splicer.policy.reconciler import PolicyReconciler
from splicer.policy.rules import Rule

_OFF = "policy_off"
# What a changed policy undoes, and the value that says so: see decide_again() in bpf/policy.h.
_UNDONE = {"blocking_reader": "blocking", "control_messages": "tcp_inq"}

_Ends = tuple[int, str, int, int, str, int, str]


class Judge:
    """Decides on the connections of one answer, by the policy as it was when the answer was begun."""

    def __init__(self, book: Book, number: int, find_cgroup: Callable[[int], str]) -> None:
        """`number` is that of the policy in the kernel; `find_cgroup` gives the path of a cgroup by its
        id."""
        self.book = book
        self._number = number
        self._find_cgroup = find_cgroup
        self._decided: dict[_Ends, Decision] = {}

    def decide(self, pair: Pair) -> Decision:
        """What holds for the connection now."""
        key = _key(pair)
        if (known := self._decided.get(key)) is None:
            client, server = self.find_party(pair.client), self.find_party(pair.server)
            known = self._decided[key] = self.book.decide(
                client, server, split_endpoint(pair.server.local)[1]
            )
        return known

    def find_party(self, end: End) -> Party:
        """An end as rules know it."""
        path = self._find_cgroup(end.cgroup)
        root = self.book.root.rstrip("/")
        return Party(root + path if path else "", split_endpoint(end.local)[0], end.tgid)

    def find_reason(self, pair: Pair) -> str:
        """Why the connection is not spliced, empty if it is: what was found out last, unless that was by a
        policy that no longer holds. Who reads nothing is not looked at by the programs."""
        reason = REASON_NAMES[pair.reason] if pair.reason < len(REASON_NAMES) else ""
        if pair.state != STATE_PAIRED or not pair.policy or pair.policy == self._number:
            return reason
        decision = self.decide(pair)
        if decision.mode == "off":
            return _OFF
        if reason == _OFF or (reason in _UNDONE and getattr(decision, _UNDONE[reason]) == "allow"):
            return "cold"
        return reason

    def count_matches(
        self, rules: Sequence[Rule], walk_pairs: Callable[[], Iterable[Sequence[Pair]]]
    ) -> list[int]:
        """For each rule the number of connections that it is about, at either end."""
        if not rules:
            return []
        counts = [0] * len(rules)
        found: dict[_Ends, list[int]] = {}
        for pair in itertools.chain.from_iterable(walk_pairs()):
            key = _key(pair)
            if (matching := found.get(key)) is None:
                matching = found[key] = [
                    place for place, rule in enumerate(rules) if self._is_about(rule, pair)
                ]
            for place in matching:
                counts[place] += 1
        return counts

    def _is_about(self, rule: Rule, pair: Pair) -> bool:
        if rule.ports and split_endpoint(pair.server.local)[1] not in rule.ports:
            return False
        for end, serves in ((pair.client, False), (pair.server, True)):
            party = self.find_party(end)
            container = self.book.find_container(party.cgroup)
            if self.book.covers(rule, party, container, serves=serves):
                return True
        return False


class Judges:
    """Makes one for each answer."""

    def __init__(self, reconciler: PolicyReconciler, attribution: Attribution) -> None:
        self._reconciler = reconciler
        self._attribution = attribution

    def make(self) -> Judge:
        """One that goes by the policy of now."""
        # The number first: a change in between makes it decide what need not be.
        number = self._reconciler.number
        return Judge(self._reconciler.read_book(), number, self._attribution.find_path)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Address and port of what format_endpoint() has written."""
    address, _, port = endpoint.rpartition(":")
    return address.strip("[]"), int(port)


def _key(pair: Pair) -> _Ends:
    """All that the policy goes by; the client's own port is not of it."""
    client, server = pair.client, pair.server
    return (
        client.cgroup,
        client.local.rpartition(":")[0],
        client.tgid,
        server.cgroup,
        server.local.rpartition(":")[0],
        server.tgid,
        server.local.rpartition(":")[2],
    )
