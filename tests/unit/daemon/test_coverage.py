# SPDX-License-Identifier: Apache-2.0
"""Rows of who talks to whom, from what the kernel has by cgroup."""

from __future__ import annotations

from typing import Any

import pytest

from splicer.daemon.census import OFF, UNAVAILABLE
from splicer.daemon.coverage import CoverageReporter
from splicer.kernel.volume import Volume, VolumeKey, Volumes
from splicer.model import REASON_NAMES, Owner
from splicer.policy.advice import Facts

BLOCKING, COLD = REASON_NAMES.index("blocking_reader"), REASON_NAMES.index("cold")
DB = Owner(container="db-1", service="db", cgroup="/docker/db")
PATHS = {3: Owner(cgroup="/system.slice/web.service"), 4: Owner(cgroup="/user.slice")}
FACTS = Facts("on", "allow", 65536, 16)


class World:
    """Cgroups 1 and 2 are of one container, 3 has one program and 4 several."""

    def __init__(self) -> None:
        self.plain: dict[VolumeKey, Volume] = {}
        self.redirected = 0
        self.census: dict[str, Any] = {"state": "done", "left": {}}
        self.owners = {1: DB, 2: DB, **PATHS}
        self.tenants = {1: {10}, 3: {30, 31}, 4: {40, 41}}
        self.processes = {10: "mariadbd", 30: "nginx", 31: "nginx", 40: "sshd", 41: "curl"}
        self.reporter = CoverageReporter(self, self, lambda: self.census, lambda: FACTS)  # type: ignore[arg-type]

    def read(self) -> Volumes:
        return Volumes(1000.0, self.redirected, self.plain, True)

    def find_tenants(self) -> dict[int, set[int]]:
        return self.tenants

    def find_cgroup_owner(self, cgroup: int) -> Owner:
        return self.owners.get(cgroup, Owner())

    def name_process(self, pids: set[int]) -> str:
        names = {self.processes[pid] for pid in pids}
        return names.pop() if len(names) == 1 else ""


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_yet(world: World) -> None:
    seen = world.reporter.measure().to_json()
    assert (seen["share"], seen["plain"], seen["plain_bytes"], seen["since"]) == (None, (), 0, 1000.0)
    assert world.reporter.advise({})["advice"] == []


def test_rows_are_of_parties(world: World) -> None:
    """Two cgroups of one container are one; a cgroup with one program goes by its name."""
    world.redirected = 600
    world.plain = {
        VolumeKey(3, 1, BLOCKING): Volume(1, 100),
        VolumeKey(3, 2, BLOCKING): Volume(2, 150),
        VolumeKey(4, 1, COLD): Volume(5, 50),
        VolumeKey(0, 99, 200): Volume(0, 100),
        VolumeKey(4, 4, COLD): Volume(7, 0),
    }
    seen = world.reporter.measure()
    assert (seen.share, seen.plain_bytes, seen.others_bytes) == (0.6, 400, 0)
    nginx = Owner(process="nginx", cgroup="/system.slice/web.service")
    assert [(row.client, row.server, row.reason, row.connections, row.share) for row in seen.plain] == [
        (nginx, DB, "blocking_reader", 3, 0.25),
        (Owner(), Owner(), "", 0, 0.1),
        (PATHS[4], DB, "cold", 5, 0.05),
    ]


def test_who_has_gone_keeps_the_name(world: World) -> None:
    world.plain = {VolumeKey(3, 1, COLD): Volume(1, 100)}
    before = world.reporter.measure()
    world.owners, world.tenants = {}, {}
    assert world.reporter.measure() == before


def test_many_rows(world: World) -> None:
    """The largest are shown, and nothing gets lost."""
    world.owners = {number: Owner(cgroup=f"/{number}") for number in range(1, 201)}
    world.tenants = {}
    world.plain = {VolumeKey(number, 1, COLD): Volume(1, number) for number in range(1, 201)}
    seen = world.reporter.measure()
    assert len(seen.plain) == 100
    assert seen.plain[0].plain_bytes == 200
    assert seen.others_bytes == sum(range(1, 101))
    assert sum(row.plain_bytes for row in seen.plain) + seen.others_bytes == seen.plain_bytes


@pytest.mark.parametrize(
    ("state", "left", "expected"),
    [
        ("done", {"unmarked": 3, "ambiguous": 1, "outside": 7, "closed": 2}, 4),
        ("running", {}, 0),
        ("earlier", {}, 0),
        (OFF, {}, None),
        (UNAVAILABLE, {}, None),
    ],
)
def test_older_ones(world: World, state: str, left: dict[str, int], expected: int | None) -> None:
    world.census = {"state": state, "left": left}
    assert world.reporter.measure().older_uncounted == expected


def test_advice_is_about_the_rows(world: World) -> None:
    world.plain = {VolumeKey(3, 1, BLOCKING): Volume(1, 100)}
    answer = world.reporter.advise({})
    assert answer["schema"] == 1
    assert answer["coverage"]["plain_bytes"] == 100
    assert [each["toml"] for each in answer["advice"]] == ['[[policy]]\nservice = "db"\nblocking = "allow"']
