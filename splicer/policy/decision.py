# SPDX-License-Identifier: Apache-2.0
"""What holds for one connection, and who says so: the same rule as decide() in bpf/policy.h goes by, with
words in the place of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from splicer.model import Container
from splicer.policy.precedence import (
    V2_ROOT,
    Host,
    Statement,
    Value,
    contains,
    decide,
    find_cgroup,
    from_labels,
    from_override,
    from_process_overrides,
    is_about,
    list_rules,
    read_network,
)
from splicer.policy.rules import CONTAINER_SELECTORS, Rule

PAUSE, MEASUREMENT = "splicer pause", "splicer bench"
"""What keeps everything plain, whatever else is said."""


@dataclass(frozen=True)
class Party:
    """One end: the absolute path of the cgroup that its socket was made in, empty if unknown; its address
    without port; the process that read last, 0 if none did."""

    cgroup: str = ""
    address: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Decision:
    """Mode, blocking and tcp_inq of a connection, each with who says so."""

    mode: str
    mode_source: str
    blocking: str
    blocking_source: str
    tcp_inq: str
    tcp_inq_source: str


@dataclass(frozen=True)
class Book:
    """All that is said: by the host, by rules and overrides, by labels. `processes` are pids by the names
    that overrides have, `root` is where the cgroup v2 hierarchy is mounted. `off_because` says what keeps
    everything plain, if anything does."""

    host: Host
    rules: Sequence[Rule]
    overrides: Mapping[str, str]
    containers: Sequence[Container]
    processes: Mapping[str, frozenset[int]]
    root: str = V2_ROOT
    off_because: str = ""

    def decide(self, client: Party, server: Party, port: int) -> Decision:
        """What holds for a connection to this port, which is the server's own."""
        if self.off_because:
            host = self.host
            return Decision("off", self.off_because, host.blocking, "default", host.tcp_inq, "default")
        by_client = self.list_statements(client)
        by_server = self.list_statements(server, serves=True)
        mode, mode_source = self._choose_mode(by_client, by_server, port)
        blocking, blocking_source = self._choose("blocking", by_client, by_server, port)
        tcp_inq, tcp_inq_source = self._choose("tcp_inq", by_client, by_server, port)
        return Decision(mode, mode_source, blocking, blocking_source, tcp_inq, tcp_inq_source)

    def _choose_mode(
        self, by_client: Sequence[Statement], by_server: Sequence[Statement], port: int
    ) -> tuple[str, str]:
        client, server = decide(by_client, "mode", port), decide(by_server, "mode", port)
        if client is not None and client.mode is not None and (client.mode == "off" or server is None):
            return client.mode, f"{client.because}, of the client"
        if server is not None and server.mode is not None:
            return server.mode, f"{server.because}, of the server"
        return self.host.effective_mode, "default"

    def _choose(
        self, value: Value, by_client: Sequence[Statement], by_server: Sequence[Statement], port: int
    ) -> tuple[str, str]:
        for side, said in (("server", by_server), ("client", by_client)):
            if (chosen := decide(said, value, port)) is not None:
                return getattr(chosen, value), f"{chosen.because}, of the {side}"
        return getattr(self.host, value), "default"

    def list_statements(self, party: Party, *, serves: bool = False) -> list[Statement]:
        """All that is said about an end."""
        container = self.find_container(party.cgroup)
        said: list[Statement] = []
        if container is not None:
            said += [*from_override(container, self.overrides), *from_labels(container, self.host)]
        for pattern, statement in from_process_overrides(self.overrides):
            if party.pid and party.pid in self.processes.get(pattern, ()):
                said.append(statement)
        return said + [
            statement
            for rule, statement in list_rules(self.rules, self.overrides)
            if self.covers(rule, party, container, serves=serves)
        ]

    def covers(self, rule: Rule, party: Party, container: Container | None, *, serves: bool) -> bool:
        """Is the rule about this end, whatever its ports are?"""
        if rule.cgroup is not None:
            place = find_cgroup(rule.cgroup, self.root)
            return party.cgroup == place or party.cgroup.startswith(place + "/")
        if rule.cidr is not None:
            return bool(party.address) and contains(read_network(rule.cidr), read_network(party.address))
        if any(getattr(rule, name) is not None for name in CONTAINER_SELECTORS):
            return container is not None and is_about(rule, container, self.root)
        return serves

    def find_container(self, cgroup: str) -> Container | None:
        """The container whose cgroup this is, or is below."""
        below = [
            each
            for each in self.containers
            if each.cgroup_id
            and each.cgroup
            and (cgroup == each.cgroup or cgroup.startswith(each.cgroup + "/"))
        ]
        return max(below, key=lambda each: len(each.cgroup), default=None)
