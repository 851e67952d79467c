# SPDX-License-Identifier: Apache-2.0
"""Whose connection it is: by cgroup first, by namespace where nothing else is known, and afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splicer.daemon.attribution import Attribution
from splicer.host.process import Process
from splicer.kernel.layout import End
from splicer.kernel.tally import Amount
from splicer.model import Container, Owner


@pytest.fixture(autouse=True)
def _host_pids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splicer.daemon.attribution.sees_host_pids", lambda: True)


WEB, APP = "a" * 64, "b" * 64
COMPOSE = {"com.docker.compose.service": "web", "com.docker.compose.project": "shop"}


class Scopes:
    """Paths of cgroups by id."""

    def __init__(self, paths: dict[int, str]) -> None:
        self.paths = paths

    def find_path(self, cgroup_id: int) -> str | None:
        return self.paths.get(cgroup_id)


class Processes:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def find(self, pid: int) -> Process:
        self.asked.append(pid)
        return Process("nginx", "nginx: worker process") if pid == 44 else Process()


def container(identifier: str, name: str, cgroup_id: int, netns: int, **labels: str) -> Container:
    return Container(identifier, name, "image", labels, cgroup_id=cgroup_id, netns=netns)


class World:
    def __init__(self) -> None:
        self.inventory: dict[str, Container] = {
            WEB: container(WEB, "shop-web-1", 7, 1007, **COMPOSE),
            APP: container(APP, "app", 8, 1008),
        }
        self.scopes = Scopes({7: f"/docker/{WEB}", 8: f"/docker/{APP}", 9: "/system.slice/redis.service"})
        self.processes = Processes()
        self.attribution = Attribution(
            lambda: self.inventory,
            self.scopes,  # type: ignore[arg-type]
            self.processes,  # type: ignore[arg-type]
        )


def end(cgroup: int, netns: int = 0, tgid: int = 0) -> End:
    return End("10.0.0.1:1", "10.0.0.2:2", netns, cgroup, 0, tgid, 0)


def living(client: int, server: int, redirected: int) -> tuple[tuple[int, int], Amount]:
    return (client, server), Amount(1, redirected, redirected // 10)


def test_a_container_is_known_by_its_cgroup() -> None:
    party = World().attribution.find_cgroup_owner(7)
    assert party == Owner("shop-web-1", "web", "shop", cgroup=f"/docker/{WEB}")


def test_what_a_container_makes_below_its_cgroup_is_its_own() -> None:
    world = World()
    world.scopes.paths[70] = f"/docker/{WEB}/system.slice/nginx.service"
    party = world.attribution.find_cgroup_owner(70, 1008)
    assert (party.container, party.service) == ("shop-web-1", "web")
    assert party.cgroup == f"/docker/{WEB}/system.slice/nginx.service"


def test_a_container_in_a_container_is_known_by_the_outer_one() -> None:
    world = World()
    world.scopes.paths[71] = f"/docker/{WEB}/docker/{'e' * 64}"
    assert world.attribution.find_cgroup_owner(71).container == "shop-web-1"


def test_a_host_service_is_known_by_its_cgroup() -> None:
    assert World().attribution.find_cgroup_owner(9) == Owner(cgroup="/system.slice/redis.service")


def test_a_container_that_no_engine_told_about_has_an_id_and_a_pod() -> None:
    world = World()
    pod = "0a1b2c3d_0000_4000_8000_0123456789ab"
    world.scopes.paths[10] = f"/kubepods.slice/kubepods-pod{pod}.slice/cri-containerd-{'c' * 64}.scope"
    party = world.attribution.find_cgroup_owner(10)
    assert party.container == "c" * 12
    assert party.pod == pod.replace("_", "-")


def test_a_pod_is_named_by_the_engine_or_else_by_the_path() -> None:
    world = World()
    world.inventory[WEB] = replace(world.inventory[WEB], pod="shop")
    uid = "0a1b2c3d-0000-4000-8000-0123456789ab"
    world.scopes.paths[8] = f"/kubepods/burstable/pod{uid}/{APP}"
    world.scopes.paths[80] = f"{world.scopes.paths[8]}/inner"
    assert [world.attribution.find_cgroup_owner(each).pod for each in (7, 8, 80)] == ["shop", uid, uid]


def test_without_a_cgroup_the_namespace_tells_unless_it_is_shared() -> None:
    world = World()
    assert world.attribution.find_cgroup_owner(0, 1007).container == "shop-web-1"
    assert world.attribution.find_cgroup_owner(0, 4711) == Owner()
    world.inventory = {**world.inventory, "d" * 64: container("d" * 64, "sidecar", 11, 1007)}
    assert world.attribution.find_cgroup_owner(0, 1007) == Owner()


def test_an_unknown_cgroup_is_not_taken_for_a_container_in_its_namespace() -> None:
    """With host networking, host processes and containers share one."""
    assert World().attribution.find_cgroup_owner(99, 1007) == Owner()


def test_a_container_that_is_gone_is_remembered() -> None:
    world = World()
    world.attribution.refresh()
    world.inventory = {}
    # Its directory may still be known, and may not.
    assert world.attribution.find_cgroup_owner(7).container == "shop-web-1"
    del world.scopes.paths[7]
    assert world.attribution.find_cgroup_owner(7).container == "shop-web-1"


def test_the_process_is_looked_up_once_in_an_answer() -> None:
    world = World()
    found: dict[tuple[int, int, int], Owner] = {}
    for _ in range(3):
        party = world.attribution.find_owner(end(7, 1007, 44), found)
        assert (party.container, party.process, party.pid) == ("shop-web-1", "nginx", 44)
    assert world.processes.asked == [44]
    gone = world.attribution.find_owner(end(7, 1007, 45), found)
    assert (gone.container, gone.process, gone.pid) == ("shop-web-1", "", 45)


def test_traffic_is_summed_by_owner() -> None:
    world = World()
    closed = [
        ((7, 8), Amount(3, 1000, 100)),
        ((9, 7), Amount(1, 50, 5)),
        ((7, 9), Amount()),
    ]
    rows = world.attribution.sum_traffic([*closed, living(7, 8, 500), living(8, 7, 20), living(7, 8, 0)])
    assert [
        (row.client.container, row.server.container, row.connections, row.redirected_bytes) for row in rows
    ] == [("shop-web-1", "app", 4, 1500), ("", "shop-web-1", 1, 50), ("app", "shop-web-1", 1, 20)]
    assert rows[0].redirected_messages == 150
