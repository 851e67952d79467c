# SPDX-License-Identifier: Apache-2.0
"""Policy: from settings, labels and overrides to the entries that the programs look up. Pure functions.

A connection is off if either end is; else the server's end decides, else the client's, else the host. What is
said about an end is found by its cgroup and those above it, by the longest network its address is in, and for
the server by its port. All of that is in the kernel's hands; here it is only spelled out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from splicer.model import Container
from splicer.policy.precedence import (
    V2_ROOT,
    Host,
    Statement,
    contains,
    find_eager_ports,
    from_labels,
    from_override,
    from_process_overrides,
    is_about,
    is_ipv4,
    list_rules,
    list_statements,
    read_network,
    shares_network,
)
from splicer.policy.rules import Rule

# Kinds of keys, as in bpf/types.h.
ANY, CGROUP, NETWORK, NETNS, PROCESS = 0, 1, 2, 3, 4

_MODES = {"off": 0, "adaptive": 1, "eager": 2}
_EAGER = _MODES["eager"]
_MAY = {"refuse": 0, "allow": 1}
_ALL_IPV4 = IPv6Network("::ffff:0:0/96")

K = TypeVar("K")
V = TypeVar("V")


class Key(NamedTuple):
    """`who` is a cgroup id, the number of a network, a netns cookie, a pid, or 0 for ANY. `port` 0 means
    any."""

    kind: int
    who: int
    port: int


class Entry(NamedTuple):
    """`mode`: 0 off, 1 adaptive, 2 eager. `blocking`, `tcp_inq`: 0 refuse, 1 allow. A rank of 0: nothing is
    said."""

    mode: int = 0
    mode_rank: int = 0
    blocking: int = 0
    blocking_rank: int = 0
    tcp_inq: int = 0
    tcp_inq_rank: int = 0


_NOTHING = Entry()


@dataclass(frozen=True)
class Compiled:
    """What should be in the kernel. Networks map to the numbers that the entries' keys have for them."""

    entries: Mapping[Key, Entry]
    networks: Mapping[IPv6Network, int]
    host: Host

    @property
    def has_eager(self) -> bool:
        """Can any connection be eager?"""
        return self.host.effective_mode == "eager" or any(
            entry.mode_rank and entry.mode == _EAGER for entry in self.entries.values()
        )


@dataclass(frozen=True)
class Changes(Generic[K, V]):
    """What makes the actual state the wanted one."""

    put: Mapping[K, V]
    delete: frozenset[K]


def find_changes(wanted: Mapping[K, V], actual: Mapping[K, V]) -> Changes[K, V]:
    """The difference between two states."""
    put = {key: value for key, value in wanted.items() if key not in actual or actual[key] != value}
    return Changes(put, frozenset(actual.keys() - wanted.keys()))


def compile_policy(
    host: Host,
    rules: Sequence[Rule],
    containers: Sequence[Container],
    overrides: Mapping[str, str],
    cgroup_ids: Mapping[str, int],
    *,
    root: str = V2_ROOT,
    processes: Mapping[str, Iterable[int]] = MappingProxyType({}),
) -> Compiled:
    """Entries for the kernel.

    `overrides` maps keys of subjects to modes, `cgroup_ids` the texts of rules' cgroups to ids; cgroups that
    are not there are not in it. `root` is where the cgroup v2 hierarchy is mounted. `processes` are the pids
    of those that overrides name.
    """
    draft = _Draft()
    reachable = [container for container in containers if container.cgroup_id]
    for container in reachable:
        for statement in (*from_override(container, overrides), *from_labels(container, host)):
            draft.say(CGROUP, container.cgroup_id, statement)
    by_network: list[tuple[IPv6Network, Statement]] = []
    for pattern, statement in from_process_overrides(overrides):
        for pid in processes.get(pattern, ()):
            draft.say(PROCESS, pid, statement)
    for rule, statement in list_rules(rules, overrides):
        if rule.cgroup is not None:
            if rule.cgroup in cgroup_ids:
                draft.say(CGROUP, cgroup_ids[rule.cgroup], statement)
        elif rule.cidr is not None:
            by_network.append((read_network(rule.cidr), statement))
        elif rule.selectors:
            for container in reachable:
                if is_about(rule, container, root):
                    draft.say(CGROUP, container.cgroup_id, statement)
        else:
            draft.say(ANY, 0, statement)
    networks = _number_networks(network for network, _ in by_network)
    for network, number in networks.items():
        # The kernel finds the longest network only: what is said about those around it goes in as well.
        for outer, statement in by_network:
            if contains(outer, network):
                draft.say(NETWORK, number, statement)
    for container in reachable:
        if not container.netns:
            continue
        # Rules of nothing but ports the kernel finds without a hint.
        said = list_statements(container, host, rules, overrides, root)
        alone = not shares_network(container, containers)
        for port, statement in find_eager_ports(said, alone=alone).items():
            draft.put(Key(NETNS, container.netns, port), Entry(_EAGER, statement.rank))
    return Compiled(draft.entries, networks, host)


class _Draft:
    """Entries in the making."""

    def __init__(self) -> None:
        self.entries: dict[Key, Entry] = {}

    def say(self, kind: int, who: int, statement: Statement) -> None:
        """Enter a statement under all its ports."""
        entry = Entry(
            _MODES[statement.mode or "off"],
            0 if statement.mode is None else statement.rank,
            _MAY[statement.blocking or "refuse"],
            0 if statement.blocking is None else statement.rank,
            _MAY[statement.tcp_inq or "refuse"],
            0 if statement.tcp_inq is None else statement.rank,
        )
        for port in statement.ports or (0,):
            self.put(Key(kind, who, port), entry)

    def put(self, key: Key, entry: Entry) -> None:
        """Enter what an entry says where nothing of a lower rank is there already."""
        there = self.entries.get(key, _NOTHING)
        said: list[int] = []
        for position in range(0, len(entry), 2):
            old, new = there[position : position + 2], entry[position : position + 2]
            said += new if new[1] and (not old[1] or new[1] < old[1]) else old
        self.entries[key] = Entry(*said)


def _number_networks(networks: Iterable[IPv6Network]) -> dict[IPv6Network, int]:
    numbers: dict[IPv6Network, int] = {}
    for network in networks:
        numbers.setdefault(network, len(numbers) + 1)
    # To the kernel's lookup IPv4 is inside of ::/0. Something longer has to catch it.
    if any(_ALL_IPV4.subnet_of(network) and not is_ipv4(network) for network in numbers):
        numbers.setdefault(_ALL_IPV4, len(numbers) + 1)
    return numbers
