# SPDX-License-Identifier: Apache-2.0
"""Whose connection is it: container, service and process of an end, from what the programs noted of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from splicer.host.process import Processes, sees_host_pids
from splicer.host.scopes import Scopes, read_path
from splicer.kernel.layout import End
from splicer.kernel.tally import Amount
from splicer.model import Container, Owner, Traffic

# Names of containers that are gone, kept for the totals.
_REMEMBERED = 4096
# Rows of traffic in one answer, the largest ones.
_TRAFFIC_ROWS = 100


class Attribution:
    """Finds the owner of an end. Used by the threads that answer requests, and told of containers by the
    watcher's."""

    def __init__(
        self, read_inventory: Callable[[], Mapping[str, Container]], scopes: Scopes, processes: Processes
    ) -> None:
        self._read_inventory = read_inventory
        self._scopes = scopes
        self._processes = processes
        self._sees_host_pids = sees_host_pids()
        self._guard = threading.Lock()
        self._inventory: Mapping[str, Container] = {}
        self._by_cgroup: dict[int, Owner] = {}
        self._by_netns: dict[int, Owner | None] = {}
        self._former: dict[int, Owner] = {}

    def refresh(self) -> None:
        """Take over what the watcher knows. Cheap when nothing has changed."""
        inventory = self._read_inventory()
        with self._guard:
            if inventory is self._inventory:
                return
            self._former.update(self._by_cgroup)
            while len(self._former) > _REMEMBERED:
                del self._former[next(iter(self._former))]
            self._inventory = inventory
            self._by_cgroup = {}
            self._by_netns = {}
            for container in inventory.values():
                owner = self._describe(container)
                if container.cgroup_id:
                    self._by_cgroup[container.cgroup_id] = owner
                if container.netns:
                    # A namespace that several share tells nothing.
                    shared = container.netns in self._by_netns
                    self._by_netns[container.netns] = None if shared else owner

    def _describe(self, container: Container) -> Owner:
        path = self._scopes.find_path(container.cgroup_id) or ""
        return Owner(
            container=container.name,
            service=container.service,
            project=container.project,
            pod=container.pod or read_path(path).pod,
            cgroup=path,
        )

    def find_cgroup_owner(self, cgroup: int, netns: int = 0) -> Owner:
        """Container or cgroup by cgroup id, else by netns cookie (both 0 if not known); no process."""
        self.refresh()
        if owner := self._by_cgroup.get(cgroup):
            return owner
        if owner := self._former.get(cgroup):
            return owner
        path = self._scopes.find_path(cgroup) if cgroup else None
        if path:
            scope = read_path(path)
            # It may have cgroups of its own below the one it was given, or run an engine that nobody told of.
            for identifier in (scope.container, *scope.outer):
                if container := self._inventory.get(identifier):
                    return replace(self._describe(container), cgroup=path)
            return Owner(container=scope.container[:12], pod=scope.pod, cgroup=path)
        # Without a cgroup the connection is too young to have been looked at; and host processes share the
        # namespace of containers with host networking.
        return (None if cgroup else self._by_netns.get(netns)) or Owner()

    def find_path(self, cgroup: int) -> str:
        """Path of a cgroup below the root of the hierarchy, by its id; empty if it is not found."""
        return (self._scopes.find_path(cgroup) or "") if cgroup else ""

    def find_owner(self, end: End, found: dict[tuple[int, int, int], Owner]) -> Owner:
        """Owner and process of an end. `found` remembers those of one answer: ends have few owners."""
        key = end.cgroup, end.netns, end.tgid
        owner = found.get(key)
        if owner is None:
            owner = self.find_cgroup_owner(end.cgroup, end.netns)
            if end.tgid and self._sees_host_pids:
                process = self._processes.find(end.tgid)
                owner = replace(owner, process=process.name, pid=end.tgid, command=process.command)
            found[key] = owner
        return owner

    def name_process(self, pids: Iterable[int]) -> str:
        """The name that all of these processes have that are alive; empty if they have several, or none."""
        if not self._sees_host_pids:
            return ""
        names = {self._processes.find(pid).name for pid in pids} - {""}
        return names.pop() if len(names) == 1 else ""

    def sum_traffic(self, amounts: Iterable[tuple[tuple[int, int], Amount]]) -> list[Traffic]:
        """Traffic between owners, the largest first, of amounts by (client, server) cgroup ids."""
        by_cgroup: dict[tuple[int, int], Amount] = {}
        for ends, amount in amounts:
            if amount.redirected_messages:
                by_cgroup[ends] = by_cgroup.get(ends, Amount()).add(amount)
        by_owner: dict[tuple[Owner, Owner], Amount] = {}
        for (client, server), amount in by_cgroup.items():
            owners = self.find_cgroup_owner(client), self.find_cgroup_owner(server)
            by_owner[owners] = by_owner.get(owners, Amount()).add(amount)
        rows = sorted(by_owner.items(), key=lambda item: -item[1].redirected_bytes)
        return [
            Traffic(client, server, amount.connections, amount.redirected_bytes, amount.redirected_messages)
            for (client, server), amount in rows[:_TRAFFIC_ROWS]
        ]
