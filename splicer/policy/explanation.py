# SPDX-License-Identifier: Apache-2.0
"""What holds for one container, and why: for `splicer policy`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splicer.model import Container
from splicer.policy import labels
from splicer.policy.precedence import (
    V2_ROOT,
    Host,
    Statement,
    decide,
    find_addresses,
    find_eager_ports,
    list_rules,
    list_statements,
    name_companions,
    shares_network,
)
from splicer.policy.rules import SAYS, Rule, show_ports

_DEFAULT = "default"


@dataclass(frozen=True)
class PortPolicy:
    """What holds for connections to one server port, where it differs from the rest."""

    port: int
    mode: str
    source: str
    blocking: str
    blocking_source: str
    tcp_inq: str
    tcp_inq_source: str

    @property
    def values(self) -> tuple[str, str, str]:
        """What holds, whoever says so."""
        return self.mode, self.blocking, self.tcp_inq

    @property
    def sources(self) -> tuple[str, str, str]:
        """Who says each of `values`."""
        return self.source, self.blocking_source, self.tcp_inq_source


@dataclass(frozen=True)
class Part:
    """One place where something is said about the container. `used`: it decides something."""

    source: str
    says: str
    used: bool


@dataclass(frozen=True)
class Explanation:
    """The policy of a container's end of connections whose other end says nothing."""

    container: Container
    mode: str
    mode_source: str
    blocking: str
    blocking_source: str
    tcp_inq: str
    tcp_inq_source: str
    ports: tuple[PortPolicy, ...]
    parts: tuple[Part, ...]
    problems: tuple[labels.Problem, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One element of `containers` in the answer to `policy`."""
        container = self.container
        return {
            "id": container.id,
            "name": container.name,
            "image": container.image,
            "project": container.project,
            "service": container.service,
            "pid": container.pid,
            "cgroup": container.cgroup,
            "netns": container.netns,
            "network_mode": container.network_mode,
            "addresses": list(container.addresses),
            "published": list(container.published),
            "mode": self.mode,
            "mode_source": self.mode_source,
            "blocking": self.blocking,
            "blocking_source": self.blocking_source,
            "tcp_inq": self.tcp_inq,
            "tcp_inq_source": self.tcp_inq_source,
            "ports": [asdict(port) for port in self.ports],
            "parts": [asdict(part) for part in self.parts],
            "problems": [asdict(problem) for problem in self.problems],
            "notes": list(self.notes),
        }


def explain(
    container: Container,
    host: Host,
    rules: Sequence[Rule],
    overrides: Mapping[str, str],
    containers: Sequence[Container],
    *,
    root: str = V2_ROOT,
) -> Explanation:
    """What holds for the container and where each part of it comes from.

    `containers` are all there are, `root` is where the cgroup v2 hierarchy is mounted.
    """
    said = list_statements(container, host, rules, overrides, root)
    everywhere = [statement for rule, statement in list_rules(rules, overrides) if not rule.selectors]
    statements = sorted([*said, *everywhere], key=lambda each: each.rank)
    rest = _decide_port(statements, host, 0)
    named = sorted({port for statement in statements for port in statement.ports})
    ports = [_decide_port(statements, host, port) for port in named]
    used = {source for each in (rest, *ports) for source in each.sources}
    return Explanation(
        container=container,
        mode=rest.mode,
        mode_source=rest.source,
        blocking=rest.blocking,
        blocking_source=rest.blocking_source,
        tcp_inq=rest.tcp_inq,
        tcp_inq_source=rest.tcp_inq_source,
        ports=tuple(each for each in ports if each.values != rest.values),
        parts=tuple(_list_parts(container, host, rules, overrides, statements, used)),
        problems=labels.read(container.labels_and_annotations)[1],
        notes=tuple(_list_notes(container, containers, said)),
    )


def _decide_port(statements: Sequence[Statement], host: Host, port: int) -> PortPolicy:
    mode, blocking = decide(statements, "mode", port), decide(statements, "blocking", port)
    tcp_inq = decide(statements, "tcp_inq", port)
    return PortPolicy(
        port=port,
        mode=(mode and mode.mode) or host.effective_mode,
        source=mode.because if mode else _DEFAULT,
        blocking=(blocking and blocking.blocking) or host.blocking,
        blocking_source=blocking.because if blocking else _DEFAULT,
        tcp_inq=(tcp_inq and tcp_inq.tcp_inq) or host.tcp_inq,
        tcp_inq_source=tcp_inq.because if tcp_inq else _DEFAULT,
    )


def _list_parts(
    container: Container,
    host: Host,
    rules: Sequence[Rule],
    overrides: Mapping[str, str],
    statements: Sequence[Statement],
    used: set[str],
) -> Iterator[Part]:
    by_source: dict[str, list[Statement]] = {}
    for statement in statements:
        by_source.setdefault(statement.source, []).append(statement)
    by_rule = {statement.source: rule for rule, statement in list_rules(rules, overrides)}
    for source, group in by_source.items():
        says = ", ".join(_word(statement) for statement in group)
        if len(group) > 1:
            says += " on all others"
        if (rule := by_rule.get(source)) is not None:
            says += _limit(rule, container)
        yield Part(source, says, any(statement.because in used for statement in group))
    switched = "" if host.default == "on" else " (--default off)"
    says = f"mode {host.effective_mode}{switched}, blocking {host.blocking}, tcp_inq {host.tcp_inq}"
    yield Part(_DEFAULT, says, _DEFAULT in used)


def _word(statement: Statement) -> str:
    values = ((name, getattr(statement, name)) for name in SAYS)
    says = ", ".join(f"{name} {value}" for name, value in values if value is not None)
    if not statement.ports:
        return says
    return f"{says} on {'port' if len(statement.ports) == 1 else 'ports'} {show_ports(statement.ports)}"


def _limit(rule: Rule, container: Container) -> str:
    """What else a rule asks of a connection, for it to apply to this container."""
    if not rule.selectors:
        return ", as a server"
    if rule.cidr is not None:
        matching = find_addresses(rule.cidr, container)
        if len(matching) < len(container.addresses):
            return f", at address {', '.join(matching)} only"
    return ""


def _list_notes(
    container: Container, containers: Sequence[Container], said: Sequence[Statement]
) -> Iterator[str]:
    if not container.pid:
        yield "It is not running; this is what will hold."
        return
    if not container.cgroup_id:
        yield "Its cgroup was not found: nothing but rules by address and by port alone reaches it."
        return
    # Eager has to be known when the SYN comes, which is told by network namespace.
    alone = bool(container.netns) and not shares_network(container, containers)
    known = find_eager_ports(said, alone=alone) if container.netns else {}
    named = {port for statement in said for port in statement.ports}
    eager = [port for port in (0, *sorted(named)) if _is_eager(said, port)]
    if 0 in known or not set(eager) - known.keys():
        return
    if not container.netns:
        why = "its network namespace was not found"
    elif container.network_mode == "host":
        why = "it uses the host's network; name its ports to have it eager there"
    else:
        companions = ", ".join(name_companions(container, containers)) or "others"
        why = f"it shares its network namespace with {companions}; name its ports to have it eager there"
    ports = f" but on {show_ports(known)}" if known else ""
    yield f"Eager acts as adaptive{ports}: {why}."


def _is_eager(said: Sequence[Statement], port: int) -> bool:
    chosen = decide(said, "mode", port)
    return chosen is not None and chosen.mode == "eager"
