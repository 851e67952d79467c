# SPDX-License-Identifier: Apache-2.0
"""What is compiled means what the documents say.

The oracle takes the sentences of docs/policy.md one by one and knows nothing of keys and ranks. The
model of the kernel knows nothing but the lookup of bpf/policy.h. They have to agree about random hosts.
"""

from __future__ import annotations

import ipaddress
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest

from splicer.model import Container
from splicer.policy.entries import (
    ANY,
    CGROUP,
    NETWORK,
    Compiled,
    Key,
    find_changes,
)
from splicer.policy.explanation import explain
from splicer.policy.labels import read
from splicer.policy.precedence import Host
from splicer.policy.rules import Rule

from .test_entries import HOST, OFF, ROOT, compiled, container

MODES = ("off", "adaptive", "eager")
BLOCKING = ("refuse", "allow")

# -- the kernel ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """One end of a connection: ids of its cgroup and those above, the innermost first; its address."""

    cgroups: tuple[int, ...]
    address: str
    where: Container | None = None
    paths: tuple[str, ...] = ()


def look_up(
    policy: Compiled, end: End, port: int, *, server: bool
) -> tuple[int | None, int | None, int | None]:
    """Mode, blocking and tcp_inq that the entries have for an end, as bpf/policy.h finds them."""
    candidates = [key for who in end.cgroups for key in (Key(CGROUP, who, port), Key(CGROUP, who, 0))]
    address = ipaddress.ip_address(end.address)
    bits = int(address) | (0xFFFF << 32 if address.version == 4 else 0)
    inside = [network for network in policy.networks if ipaddress.IPv6Address(bits) in network]
    if inside:
        number = policy.networks[max(inside, key=lambda network: network.prefixlen)]
        candidates += [Key(NETWORK, number, port), Key(NETWORK, number, 0)]
    if server:
        candidates.append(Key(ANY, 0, port))
    mode: tuple[int, int] | None = None
    blocking: tuple[int, int] | None = None
    tcp_inq: tuple[int, int] | None = None
    for key in candidates:
        entry = policy.entries.get(key)
        if entry is None:
            continue
        if entry.mode_rank and (mode is None or entry.mode_rank < mode[0]):
            mode = (entry.mode_rank, entry.mode)
        if entry.blocking_rank and (blocking is None or entry.blocking_rank < blocking[0]):
            blocking = (entry.blocking_rank, entry.blocking)
        if entry.tcp_inq_rank and (tcp_inq is None or entry.tcp_inq_rank < tcp_inq[0]):
            tcp_inq = (entry.tcp_inq_rank, entry.tcp_inq)
    return mode and mode[1], blocking and blocking[1], tcp_inq and tcp_inq[1]


def judge(policy: Compiled, client: End, server: End, port: int) -> tuple[str, str, str]:
    """Mode, blocking and tcp_inq of a connection."""
    server_mode, *server_may = look_up(policy, server, port, server=True)
    client_mode, *client_may = look_up(policy, client, port, server=False)
    if OFF in (server_mode, client_mode):
        mode = "off"
    else:
        told = [MODES[each] for each in (server_mode, client_mode) if each is not None]
        mode = [*told, policy.host.mode if policy.host.default == "on" else "off"][0]
    blocking, tcp_inq = (
        [*(BLOCKING[each] for each in said if each is not None), otherwise][0]
        for said, otherwise in zip(
            zip(server_may, client_may, strict=True), (policy.host.blocking, policy.host.tcp_inq), strict=True
        )
    )
    return mode, blocking, tcp_inq


# -- the oracle ----------------------------------------------------------------------------------------------


def applies(rule: Rule, end: End, port: int, *, server: bool) -> bool:
    if rule.ports and port not in rule.ports:
        return False
    if rule.cgroup is not None:
        path = rule.cgroup if rule.cgroup.startswith(ROOT) else f"{ROOT}/{rule.cgroup}"
        return path in end.paths
    if rule.cidr is not None:
        address, network = ipaddress.ip_address(end.address), ipaddress.ip_network(rule.cidr)
        return address.version == network.version and address in network
    asked = [
        (pattern, text)
        for pattern, text in (
            (rule.container, end.where and end.where.name),
            (rule.image, end.where and end.where.image),
            (rule.service, end.where and end.where.service),
            (rule.project, end.where and end.where.project),
        )
        if pattern is not None
    ]
    if asked:
        return all(text and fnmatchcase(text, pattern) for pattern, text in asked)
    return server


def state_labels(labels: Mapping[str, str], port: int, host: Host) -> str | None:
    asked, _ = read(labels)
    if asked is None:
        return None
    mode = asked.mode or host.mode
    if asked.ports and port not in asked.ports:
        return None if mode == "off" else "off"
    return mode


def state(
    value: str,
    end: End,
    port: int,
    host: Host,
    rules: Sequence[Rule],
    overrides: Mapping[str, str],
    *,
    server: bool,
) -> str | None:
    """An end's explicit policy, or None."""
    if value == "mode" and end.where is not None:
        if end.where.name in overrides:
            return overrides[end.where.name]
        if (told := state_labels(end.where.labels, port, host)) is not None:
            return told
    for rule in rules:
        told = getattr(rule, value)
        if told is not None and applies(rule, end, port, server=server):
            return str(told)
    return None


def decree(
    client: End, server: End, port: int, host: Host, rules: Sequence[Rule], overrides: Mapping[str, str]
) -> tuple[str, str, str]:
    """Mode, blocking and tcp_inq of a connection, by the words of the documents."""
    told = [
        state("mode", end, port, host, rules, overrides, server=end is server) for end in (server, client)
    ]
    if "off" in told:
        mode = "off"
    else:
        mode = next((each for each in told if each), host.mode if host.default == "on" else "off")
    blocking, tcp_inq = (
        [state(value, end, port, host, rules, overrides, server=end is server) for end in (server, client)]
        for value in ("blocking", "tcp_inq")
    )
    return (
        mode,
        next((each for each in blocking if each), host.blocking),
        next((each for each in tcp_inq if each), host.tcp_inq),
    )


# -- random hosts --------------------------------------------------------------------------------------------

PORTS = (80, 443, 8080, 8081, 9999)
CGROUPS = {
    "system.slice": 1,
    "system.slice/redis.service": 2,
    f"{ROOT}/docker": 3,
    "user.slice": 4,
    "gone.slice": None,
}
NETWORKS = (
    "0.0.0.0/0",
    "::/0",
    "172.16.0.0/12",
    "172.17.0.0/16",
    "172.17.0.2",
    "172.17.0.0/30",
    "10.0.0.0/8",
    "fd00::/8",
    "fd00::2/128",
    "::/64",
)
LABELS: tuple[dict[str, str], ...] = (
    {},
    {},
    {"splicer.enable": "true"},
    {"splicer.enable": "false"},
    {"splicer.mode": "eager"},
    {"splicer.mode": "off", "splicer.ports": "80,443"},
    {"splicer.ports": "8080-8081"},
    {"splicer.ports": "443", "splicer.mode": "adaptive"},
    {"splicer.enable": "maybe", "splicer.mode": "eager"},
    {"splicer.colour": "red"},
)
ADDRESSES = (
    "172.17.0.1",
    "172.17.0.2",
    "172.17.0.3",
    "172.18.0.2",
    "10.1.2.3",
    "127.0.0.1",
    "fd00::2",
    "fd01::3",
    "::1",
)


def make_rule(chance: random.Random, number: int) -> Rule:
    values: dict[str, Any] = {"number": number, "file": "f"}
    kind = chance.choice(("container", "container", "cgroup", "cidr", "cidr", "ports"))
    if kind == "container":
        patterns = {
            "container": ("c*", "c1", "c[23]", "x"),
            "image": ("nginx:*", "redis:7", "*"),
            "service": ("web", "*"),
            "project": ("demo", "d*"),
        }
        for name in chance.sample(list(patterns), chance.choice((1, 1, 2))):
            values[name] = chance.choice(patterns[name])
    elif kind == "cgroup":
        values["cgroup"] = chance.choice(list(CGROUPS))
    elif kind == "cidr":
        values["cidr"] = chance.choice(NETWORKS)
    if kind == "ports" or chance.random() < 0.5:
        values["ports"] = tuple(sorted(chance.sample(PORTS, chance.choice((1, 2)))))
    says = chance.choice((("mode",), ("mode",), ("blocking",), ("tcp_inq",), ("mode", "blocking", "tcp_inq")))
    if "mode" in says:
        values["mode"] = chance.choice(MODES)
    values |= {name: chance.choice(BLOCKING) for name in ("blocking", "tcp_inq") if name in says}
    return Rule(**values)


def make_containers(chance: random.Random) -> list[Container]:
    made = []
    for number in range(1, chance.randint(1, 5)):
        labels = dict(chance.choice(LABELS))
        if chance.random() < 0.5:
            labels["com.docker.compose.service"] = chance.choice(("web", "db"))
            labels["com.docker.compose.project"] = "demo"
        made.append(
            container(
                f"c{number}",
                number,
                labels,
                image=chance.choice(("nginx:1.25", "redis:7")),
                netns=chance.choice((5000 + number, 5000)),
                addresses=tuple(chance.sample(ADDRESSES, chance.choice((1, 1, 2)))),
            )
        )
    return made


def inside(where: Container, address: str = "") -> End:
    """An end in a container."""
    paths = (where.cgroup, f"{ROOT}/docker")
    return End((where.cgroup_id, 3), address or where.addresses[0], where, paths)


def make_end(chance: random.Random, containers: Sequence[Container]) -> End:
    if containers and chance.random() < 0.7:
        where = chance.choice(containers)
        end = inside(where, chance.choice(where.addresses))
        if chance.random() < 0.5:
            return end
        # In a cgroup of the container's own making.
        return End((7777, *end.cgroups), end.address, where, (f"{where.cgroup}/init", *end.paths))
    path = chance.choice(("system.slice/redis.service", "system.slice", "user.slice", ""))
    parts = path.split("/") if path else []
    names = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
    ids = [CGROUPS[name] for name in names]
    return End(
        tuple(each for each in ids if each is not None),
        chance.choice(ADDRESSES),
        None,
        tuple(f"{ROOT}/{name}" for name in names),
    )


IDS = {text: number for text, number in CGROUPS.items() if number is not None}


@pytest.mark.parametrize("seed", range(40))
def test_the_kernel_finds_what_the_documents_say(seed: int) -> None:
    chance = random.Random(seed)
    outcomes = set()
    for _ in range(70):
        host = Host(
            chance.choice(("adaptive", "eager")), chance.choice(("on", "off")), *chance.choices(BLOCKING, k=2)
        )
        rules = [make_rule(chance, number) for number in range(1, chance.randint(1, 8))]
        containers = make_containers(chance)
        overrides = {
            name: chance.choice(MODES) for name in ("c1", "c2", "stranger") if chance.random() < 0.25
        }
        policy = compiled(containers, rules, overrides, host, IDS)
        for _ in range(20):
            client, server = make_end(chance, containers), make_end(chance, containers)
            port = chance.choice((*PORTS, 22))
            expected = decree(client, server, port, host, rules, overrides)
            assert judge(policy, client, server, port) == expected, (
                host,
                rules,
                overrides,
                client,
                server,
                port,
            )
            outcomes.add(expected)
    assert len(outcomes) == 3 * 2 * 2, "a generator that does not reach everything proves little"


@pytest.mark.parametrize("seed", range(20))
def test_an_explanation_says_the_same(seed: int) -> None:
    """`splicer policy` is about a server in the container whose client says nothing."""
    chance = random.Random(1000 + seed)
    stranger = End((), "192.0.2.1")
    for _ in range(20):
        host = Host(
            chance.choice(("adaptive", "eager")), chance.choice(("on", "off")), *chance.choices(BLOCKING, k=2)
        )
        containers = [each for each in make_containers(chance) if len(each.addresses) == 1]
        # Nothing may be said about the client, so no rule about everybody's address.
        rules = [
            rule
            for rule in (make_rule(chance, number) for number in range(1, 8))
            if rule.cidr not in ("0.0.0.0/0", "::/0", "::/64")
        ]
        overrides = {"c1": chance.choice(MODES)} if chance.random() < 0.25 else {}
        policy = compiled(containers, rules, overrides, host, IDS)
        for each in containers:
            told = explain(each, host, rules, overrides, containers, root=ROOT)
            server = inside(each)
            everywhere = told.mode, told.blocking, told.tcp_inq
            assert everywhere == judge(policy, stranger, server, 22)
            at = {port.port: port.values for port in told.ports}
            for port in PORTS:
                assert at.get(port, everywhere) == judge(policy, stranger, server, port)
            silent = state("mode", server, 22, host, rules, overrides, server=True) is None
            assert (told.mode_source == "default") == silent
            assert any(part.used for part in told.parts)
            json.dumps(told.to_json())


@pytest.mark.parametrize("seed", range(5))
def test_changes_lead_from_any_policy_to_any_other(seed: int) -> None:
    chance = random.Random(seed)
    first, second = (
        compiled(
            make_containers(chance), [make_rule(chance, number) for number in range(1, 6)], {}, HOST, IDS
        )
        for _ in range(2)
    )
    changes = find_changes(second.entries, first.entries)
    state = {key: entry for key, entry in first.entries.items() if key not in changes.delete} | dict(
        changes.put
    )
    assert state == second.entries
