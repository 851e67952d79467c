# SPDX-License-Identifier: Apache-2.0
"""Rules: the `[[policy]]` tables of a configuration file."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splicer.errors import USAGE, SplicerError
from splicer.policy.labels import read_ports
from splicer.policy.values import ValueType, check_value, choice, is_text, refuse_key, render_value, show

CONTAINER_MODES = ("adaptive", "eager", "off")
"""What a container, a service or an address can be told: by label, by `[[policy]]`, by `splicer set`."""
BLOCKING = ("refuse", "allow")
TCP_INQ = ("allow", "refuse")
SAYS = ("mode", "blocking", "tcp_inq")
"""What a rule can say."""

# Selectors by what they can stand beside: those about containers combine, the others want a table each.
CONTAINER_SELECTORS = ("container", "image", "service", "project")
PLACE_SELECTORS = ("cgroup", "cidr")
SELECTORS = (*CONTAINER_SELECTORS, *PLACE_SELECTORS)
PORTS_PER_RULE = 256


@dataclass(frozen=True)
class Rule:
    """One `[[policy]]` table: which ends of connections it is about, and what differs for them.

    `ports` are the server's own ports, sorted; empty means all. Of SAYS, None is what the rule says nothing
    about. `number` counts the tables of `file` from 1; the file is where it stands and not what it says.
    """

    container: str | None = None
    image: str | None = None
    service: str | None = None
    project: str | None = None
    cgroup: str | None = None
    cidr: str | None = None
    ports: tuple[int, ...] = ()
    mode: str | None = None
    blocking: str | None = None
    tcp_inq: str | None = None
    number: int = 1
    file: str = field(default="", compare=False)

    @property
    def selectors(self) -> dict[str, str]:
        """The selectors that are there, besides the ports."""
        return {name: value for name in SELECTORS if (value := getattr(self, name)) is not None}

    @property
    def source(self) -> str:
        """Where the rule stands, in words."""
        return f"{self.file} [[policy]] {self.number}".lstrip()


def _is_cgroup(value: object) -> bool:
    return is_text(value) and not {"", ".", ".."} & set(str(value).removeprefix("/").rstrip("/").split("/"))


def _is_network(value: object) -> bool:
    if not isinstance(value, str) or "%" in value:
        return False
    try:
        ipaddress.ip_network(value)
    except ValueError:
        return False
    return True


def _read_ports(value: object) -> tuple[int, ...]:
    """Ports, sorted, out of what TOML holds. Raises ValueError for a mistake, for none and for too many."""
    found: set[int] = set()
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ValueError(f"{part!r} is not a port")
        found.update(read_ports(str(part), PORTS_PER_RULE))
    if not 1 <= len(found) <= PORTS_PER_RULE:
        raise ValueError(f"{len(found)} ports")
    return tuple(sorted(found))


def _are_ports(value: object) -> bool:
    try:
        return bool(_read_ports(value))
    except ValueError:
        return False


_GLOB = ValueType("text, in which * ? [...] stand for other characters", is_text)
_PORTS = ValueType(
    f'a port, a range such as "8000-8010", or a list of these; 1 to {PORTS_PER_RULE} ports in all',
    _are_ports,
)

VALUE_TYPES: Mapping[str, ValueType] = {
    **dict.fromkeys(CONTAINER_SELECTORS, _GLOB),
    "cgroup": ValueType("the path of a cgroup, such as system.slice/redis.service", _is_cgroup),
    "cidr": ValueType(
        "an address or a network without host bits, such as 10.0.0.0/8 or fd00::/8", _is_network
    ),
    "ports": _PORTS,
    "mode": choice(CONTAINER_MODES),
    "blocking": choice(BLOCKING),
    "tcp_inq": choice(TCP_INQ),
}


def read_rules(value: object, file: str) -> tuple[Rule, ...]:
    """The rules out of what TOML holds under `policy`, in order.

    Raises SplicerError with exit code 2 that names file, table, key, value and what is accepted.
    """
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise SplicerError(
            f"bad value for policy in {file}: {show(value)}",
            hint="accepted: [[policy]] tables, in double brackets",
            exit_code=USAGE,
        )
    return tuple(_read_rule(entry, number, file) for number, entry in enumerate(value, start=1))


def _read_rule(entry: Mapping[str, Any], number: int, file: str) -> Rule:
    place = f"[[policy]] number {number} in {file}"
    for key, given in entry.items():
        if key not in VALUE_TYPES:
            raise refuse_key(key, place, VALUE_TYPES)
        check_value(VALUE_TYPES[key], given, f"{key} of {place}", given)

    def complain(what: str, hint: str) -> SplicerError:
        return SplicerError(f"{place} {what}", hint=hint, exit_code=USAGE)

    if not entry.keys() & {*SELECTORS, "ports"}:
        raise complain("selects nothing", f"accepted: one or more of {', '.join([*SELECTORS, 'ports'])}")
    if not entry.keys() & {*SAYS}:
        raise complain("says nothing", f"accepted: one or more of {', '.join(SAYS)}")
    for selector in PLACE_SELECTORS:
        others = [name for name in SELECTORS if name in entry and name != selector]
        if selector in entry and others:
            raise complain(
                f"has both {selector} and {others[0]}",
                "cgroup and cidr go together with ports only; write a [[policy]] table for each",
            )
    ports = _read_ports(entry["ports"]) if "ports" in entry else ()
    return Rule(**{**entry, "ports": ports}, number=number, file=file)


def render_rule(rule: Rule) -> list[str]:
    """The lines of a rule's table, without the heading."""
    values: dict[str, object] = {**rule.selectors}
    if rule.ports:
        ranges = [low if low == high else f"{low}-{high}" for low, high in _group(rule.ports)]
        values["ports"] = ranges[0] if len(ranges) == 1 else ranges
    values |= {name: getattr(rule, name) for name in SAYS}
    return [f"{key} = {render_value(value)}" for key, value in values.items() if value is not None]


def show_ports(ports: Iterable[int]) -> str:
    """Ports for people: `80, 443, 8000-8010`."""
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in _group(ports))


def _group(ports: Iterable[int]) -> list[tuple[int, int]]:
    """Ports as ranges, first and last included, in ascending order."""
    ranges: list[tuple[int, int]] = []
    for port in sorted(set(ports)):
        if ranges and port == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], port)
        else:
            ranges.append((port, port))
    return ranges
