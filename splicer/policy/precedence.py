# SPDX-License-Identifier: Apache-2.0
"""Statements: everything that is said about one end of a connection, and which of it counts.

For each value by itself the statement of the lowest rank counts; of two with the same rank the one that names
the port. The programs in the kernel go by the same rule (bpf/policy.h).
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from splicer.model import Container
from splicer.policy import labels
from splicer.policy.overrides import PROCESS, read_key
from splicer.policy.rules import CONTAINER_SELECTORS, Rule

# Of the newest override; each older one has the next.
RANK_OVERRIDE = 1
RANK_LABELS = 1000
# Of the first rule; each further one has the next.
RANK_RULES = 1010

V2_ROOT = "/sys/fs/cgroup"
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

Value = Literal["mode", "blocking", "tcp_inq"]


@dataclass(frozen=True)
class Host:
    """What holds where nobody says anything: `mode` if `default` is on, else off; `blocking`; `tcp_inq`."""

    mode: str
    default: str
    blocking: str
    tcp_inq: str = "allow"

    @property
    def effective_mode(self) -> str:
        """adaptive, eager or off."""
        return self.mode if self.default == "on" else "off"


@dataclass(frozen=True)
class Statement:
    """Something said about an end. `ports` are the server's own; empty: all. None: nothing about that value.

    `source` is where it stands; `because` is the same to the point, such as the label that says it.
    """

    rank: int
    source: str
    because: str
    ports: tuple[int, ...] = ()
    mode: str | None = None
    blocking: str | None = None
    tcp_inq: str | None = None

    def covers(self, port: int) -> bool:
        """Is it about connections to this server port? 0 stands for every port that nobody names."""
        return not self.ports or port in self.ports


def decide(statements: Iterable[Statement], value: Value, port: int) -> Statement | None:
    """The statement that counts for `value` on connections to `port` (0: one that nobody names), or None."""
    speaking = [each for each in statements if getattr(each, value) is not None and each.covers(port)]
    return min(speaking, key=lambda each: (each.rank, not each.ports), default=None)


def _rank_overrides(overrides: Mapping[str, str]) -> dict[str, int]:
    return {key: RANK_OVERRIDE + age for age, key in enumerate(reversed(list(overrides)))}


def from_override(container: Container, overrides: Mapping[str, str]) -> list[Statement]:
    """What an operator has set for the container by its name."""
    mode = overrides.get(container.name)
    if mode is None:
        return []
    return [Statement(_rank_overrides(overrides)[container.name], "override", "override", mode=mode)]


def from_place_overrides(overrides: Mapping[str, str]) -> list[tuple[Rule, Statement]]:
    """What an operator has set by cgroup, address or port, each as the rule that would say the same."""
    ranks = _rank_overrides(overrides)
    found = []
    for key, mode in overrides.items():
        subject = read_key(key)
        if (rule := subject.rule) is not None:
            source = f"override of {subject.words}"
            found.append((rule, Statement(ranks[key], source, source, rule.ports, mode)))
    return found


def from_process_overrides(overrides: Mapping[str, str]) -> list[tuple[str, Statement]]:
    """What an operator has set by process: names or patterns, each with what is said."""
    ranks = _rank_overrides(overrides)
    found = []
    for key, mode in overrides.items():
        subject = read_key(key)
        if subject.kind == PROCESS:
            source = f"override of {subject.words}"
            found.append((subject.value, Statement(ranks[key], source, source, mode=mode)))
    return found


def from_labels(container: Container, host: Host) -> list[Statement]:
    """What the container's labels and annotations ask for."""
    given = container.labels_and_annotations
    policy, problems = labels.read(given)
    if policy is None:
        return []
    mode = policy.mode or host.mode
    bad = labels.name_unreadable(problems)
    if bad:
        names = ", ".join(_name(each, container) for each in bad)
        because = f"{names} (bad {'value' if len(bad) == 1 else 'values'})"
    elif given.get(labels.MODE) == mode:
        because = _name(labels.MODE, container)
    else:
        because = _name(labels.ENABLE if labels.ENABLE in given else labels.PORTS, container)
    said = [Statement(RANK_LABELS, "labels", because, policy.ports, mode)]
    if policy.ports and mode != "off":
        said.append(Statement(RANK_LABELS, "labels", _name(labels.PORTS, container), mode="off"))
    return said


def _name(label: str, container: Container) -> str:
    """A label, or the annotation of that name that stands in its place."""
    return f"{'annotation' if label in container.annotations else 'label'} {label}"


def from_rule(rule: Rule, position: int) -> Statement:
    """What a rule says, wherever it applies. `position` is its place among all rules, from 0."""
    return Statement(
        RANK_RULES + position,
        rule.source,
        rule.source,
        rule.ports,
        rule.mode,
        rule.blocking,
        rule.tcp_inq,
    )


def list_rules(rules: Sequence[Rule], overrides: Mapping[str, str]) -> list[tuple[Rule, Statement]]:
    """What an operator has set by place and what the rules say, each with what it is about."""
    return from_place_overrides(overrides) + [
        (rule, from_rule(rule, position)) for position, rule in enumerate(rules)
    ]


def list_statements(
    container: Container, host: Host, rules: Sequence[Rule], overrides: Mapping[str, str], root: str
) -> list[Statement]:
    """All that is said about ends in the container for what it is or where it is.

    Rules that name nothing but ports are left out: they are about whoever serves there.
    """
    said = [*from_override(container, overrides), *from_labels(container, host)]
    return said + [
        statement
        for rule, statement in list_rules(rules, overrides)
        if rule.selectors and is_about(rule, container, root)
    ]


def is_about(rule: Rule, container: Container, root: str = V2_ROOT) -> bool:
    """Can the rule apply to an end in this container? `root` is where the cgroup v2 hierarchy is mounted."""
    if rule.cgroup is not None:
        place = find_cgroup(rule.cgroup, root)
        return container.cgroup == place or container.cgroup.startswith(place + "/")
    if rule.cidr is not None:
        return bool(find_addresses(rule.cidr, container))
    for name in CONTAINER_SELECTORS:
        pattern, text = getattr(rule, name), getattr(container, "name" if name == "container" else name)
        # A container of no service is not matched by "*" either.
        if pattern is not None and not (text and fnmatchcase(text, pattern)):
            return False
    return True


def find_cgroup(text: str, root: str = V2_ROOT) -> str:
    """The directory that a rule's `cgroup` means: a path below the v2 root, or one that begins with it."""
    path, top = text.rstrip("/"), root.rstrip("/")
    return path if path.startswith(top + "/") else os.path.join(top, path.lstrip("/"))


def find_addresses(cidr: str, container: Container) -> list[str]:
    """The container's addresses in a network."""
    network = read_network(cidr)
    return [address for address in container.addresses if contains(network, read_network(address))]


def read_network(text: str) -> ipaddress.IPv6Network:
    """A network or an address as the programs see it: IPv4 as ::ffff:a.b.c.d. Raises ValueError."""
    network = ipaddress.ip_network(text)
    if isinstance(network, ipaddress.IPv6Network):
        return network
    address = int(_MAPPED.network_address) | int(network.network_address)
    return ipaddress.IPv6Network((address, 96 + network.prefixlen))


def is_ipv4(network: ipaddress.IPv6Network) -> bool:
    """Does a network as the programs see it hold IPv4 addresses only?"""
    return network.subnet_of(_MAPPED)


def contains(outer: ipaddress.IPv6Network, inner: ipaddress.IPv6Network) -> bool:
    """Is one network inside another? `::/0` means all of IPv6, and IPv4 is not in it."""
    return inner.subnet_of(outer) and is_ipv4(outer) == is_ipv4(inner)


def shares_network(container: Container, containers: Iterable[Container]) -> bool:
    """Are sockets of others in the container's network namespace, as far as is known?"""
    mode = container.network_mode
    return mode == "host" or mode.startswith("ns:") or bool(name_companions(container, containers))


def name_companions(container: Container, containers: Iterable[Container]) -> list[str]:
    """Names of the other containers in the same network namespace, sorted."""
    return sorted(
        other.name
        for other in containers
        if other.id != container.id and other.netns == container.netns and container.netns
    )


def find_eager_ports(statements: Iterable[Statement], *, alone: bool) -> dict[int, Statement]:
    """Server ports on which an end is eager and the kernel can know it when the SYN comes, with who says so.

    0 stands for all ports, and then it is the only one. A network namespace that is not the container's alone
    says nothing about whose the listener is; there the port has to be named.
    """
    said = list(statements)
    chosen = decide(said, "mode", 0)
    if alone and chosen is not None and chosen.mode == "eager":
        return {0: chosen}
    named = sorted({port for each in said if each.mode == "eager" for port in each.ports})
    deciding = {port: decide(said, "mode", port) for port in named}
    return {
        port: chosen
        for port, chosen in deciding.items()
        if chosen is not None and chosen.mode == "eager" and chosen.ports
    }
