# SPDX-License-Identifier: Apache-2.0
"""How much of the local traffic is redirected, and who talks to whom in what is not."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from splicer.daemon.attribution import Attribution
from splicer.daemon.census import FAILED, OFF, UNAVAILABLE
from splicer.kernel.volume import Volume, VolumeReader, Volumes
from splicer.model import REASON_NAMES, SCHEMA, Coverage, Owner, PlainTraffic
from splicer.policy import advice
from splicer.policy.advice import Facts

_T = TypeVar("_T")

# Rows in one answer, the largest ones.
_ROWS = 100
# Names by cgroup, kept for those that are gone.
_REMEMBERED = 4096
# Processes of one cgroup whose names are looked up: who has more is not one program.
_PROCESSES = 8
# Who talks in which cgroup is believed for so long.
_TENANTS_S = 10.0


class CoverageReporter:
    """Answers who asks. Used by the threads that answer requests."""

    def __init__(
        self,
        reader: VolumeReader,
        attribution: Attribution,
        describe_census: Callable[[], Mapping[str, Any]],
        read_facts: Callable[[], Facts],
    ) -> None:
        self._reader = reader
        self._attribution = attribution
        self._describe_census = describe_census
        self._read_facts = read_facts
        self._guard = threading.Lock()
        # By cgroup.
        self._processes: dict[int, str] = {}
        self._former: dict[int, Owner] = {}
        self._tenants: Mapping[int, Collection[int]] = {}
        self._tenants_until = 0.0

    def measure(self) -> Coverage:
        """Raises KernelError."""
        volumes = self._reader.read()
        rows = self._name_rows(volumes)
        plain = sum(each.size for each in volumes.plain.values())
        shown = rows[:_ROWS]
        everything = volumes.redirected + plain
        return Coverage(
            since=volumes.since,
            redirected_bytes=volumes.redirected,
            plain_bytes=plain,
            plain=tuple(
                PlainTraffic(
                    client, server, reason, volume.connections, volume.size, volume.size / everything
                )
                for (client, server, reason), volume in shown
            ),
            others_bytes=plain - sum(volume.size for _, volume in shown),
            is_complete=volumes.is_complete,
            older_uncounted=self._count_older(),
        )

    def advise(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        """Answer to `splicer advise`."""
        coverage = self.measure()
        found = advice.find(coverage, self._read_facts())
        return {
            "schema": SCHEMA,
            "coverage": coverage.to_json(),
            "advice": [each.to_json() for each in found],
        }

    def _name_rows(self, volumes: Volumes) -> list[tuple[tuple[Owner, Owner, str], Volume]]:
        """The largest first."""
        plain = {key: volume for key, volume in volumes.plain.items() if volume.size}
        cgroups = {cgroup for key in plain for cgroup in (key.client, key.server)}
        owners = {cgroup: self.find_owner(cgroup) for cgroup in cgroups}
        rows: defaultdict[tuple[Owner, Owner, str], Volume] = defaultdict(Volume)
        for key, volume in plain.items():
            reason = REASON_NAMES[key.reason] if key.reason < len(REASON_NAMES) else ""
            rows[owners[key.client], owners[key.server], reason] += volume
        return sorted(rows.items(), key=lambda item: -item[1].size)

    def find_owner(self, cgroup: int) -> Owner:
        """As it is now, or was when somebody last asked and it was there. A cgroup in which one program talks
        goes by the name of that, as its connections do."""
        if not cgroup:
            return Owner()
        owner = self._attribution.find_cgroup_owner(cgroup)
        with self._guard:
            if not (owner.container or owner.service or owner.pod):
                pids = self._find_tenants().get(cgroup, ())
                name = self._attribution.name_process(pids) if 0 < len(pids) <= _PROCESSES else ""
                if name:
                    _remember(self._processes, cgroup, name)
                owner = replace(owner, process=self._processes.get(cgroup, ""))
            if not owner.cgroup:
                return self._former.get(cgroup, owner)
            _remember(self._former, cgroup, owner)
        return owner

    def _find_tenants(self) -> Mapping[int, Collection[int]]:
        """Not anew for each who asks: it is a look at all pairs."""
        now = time.monotonic()
        if now >= self._tenants_until:
            self._tenants = self._reader.find_tenants()
            self._tenants_until = now + _TENANTS_S
        return self._tenants

    def _count_older(self) -> int | None:
        census = self._describe_census()
        if census["state"] in (OFF, UNAVAILABLE, FAILED):
            return None
        left: Mapping[str, int] = census["left"]
        # One end of those is elsewhere: they are not local to what splicer is attached to.
        return sum(count for reason, count in left.items() if reason not in ("outside", "closed"))


def _remember(names: dict[int, _T], cgroup: int, name: _T) -> None:
    """Those that were last seen longest ago are forgotten."""
    names.pop(cgroup, None)
    names[cgroup] = name
    while len(names) > _REMEMBERED:
        del names[next(iter(names))]
