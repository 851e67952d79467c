# SPDX-License-Identifier: Apache-2.0
"""The reconciler on maps that are dictionaries: what it writes, keeps, refuses and says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from splicer.errors import SplicerError
from splicer.kernel.layout import NETWORK_KEY, NOTHING_SAID, RULE, RULE_KEY, KernelSettings
from splicer.kernel.libbpf import KernelError
from splicer.kernel.settings import SettingsMap
from splicer.model import Container
from splicer.policy.config import Settings
from splicer.policy.reconciler import PolicyReconciler
from splicer.policy.rules import Rule

from ..conftest import Log

NONE = KernelSettings.unpack(bytes(56))
CGROUP, NETWORK, PORT = 1, 2, 0


class Table:
    """A map."""

    def __init__(self, room: int = 1000) -> None:
        self.content: dict[bytes, bytes] = {}
        self.room = room

    def get(self, key: bytes) -> bytes | None:
        return self.content.get(key)

    def set(self, key: bytes, value: bytes) -> None:
        if key not in self.content and len(self.content) >= self.room:
            raise KernelError(7, "update of rules")
        self.content[key] = value

    def delete(self, key: bytes) -> bool:
        return self.content.pop(key, None) is not None

    def walk_keys(self) -> Iterator[bytes]:
        return iter(list(self.content))

    def items(self) -> list[tuple[bytes, bytes]]:
        return list(self.content.items())


@dataclasses.dataclass
class World:
    """A reconciler and everything around it."""

    run_dir: Path
    live: SettingsMap
    rules: Table
    networks: Table
    log: Log
    containers: dict[str, Container] | None

    def govern(self, **settings: Any) -> PolicyReconciler:
        return PolicyReconciler(
            Settings(run_dir=str(self.run_dir), **settings),
            self.live,
            {"rules": self.rules, "networks": self.networks},  # type: ignore[dict-item]
            str(self.run_dir),
            lambda: self.containers,
            self.log,
        )

    def read_rules(self) -> dict[tuple[int, int, int], tuple[int | None, ...]]:
        """(kind, who, port) to (mode, blocking, tcp_inq)."""
        found = {}
        for key, value in self.rules.items():
            who, kind, port = RULE_KEY.unpack(key)
            found[kind, who, port] = tuple(
                None if word == NOTHING_SAID else word & 0xFFFFFFFF for word in RULE.unpack(value)
            )
        return found

    def run(self, name: str, number: int, **labels: str) -> None:
        """Start a container whose cgroup has this id."""
        assert self.containers is not None
        container = Container(
            f"{number:064x}",
            name,
            "image",
            {f"splicer.{key}": value for key, value in labels.items()},
            pid=number,
            cgroup=f"{self.run_dir}/docker/{number:064x}",
            cgroup_id=number,
            netns=number + 1000,
        )
        self.containers = {**self.containers, container.id: container}


@pytest.fixture
def world(tmp_path: Path) -> World:
    settings: Any = Table()
    settings.set(bytes(4), NONE.pack())
    return World(tmp_path, SettingsMap(settings), Table(), Table(), Log(), {})


def test_nothing_to_say_is_one_number(world: World) -> None:
    reconciler = world.govern()
    assert reconciler.apply()
    assert not world.rules.content
    assert world.live.read() == dataclasses.replace(NONE, mode=1, policy=1, allow_inq=True)
    assert not reconciler.apply(), "nothing has changed"
    assert world.live.read().policy == 1


def test_the_programs_are_let_to_work_after_the_policy(world: World) -> None:
    world.govern(default="off", blocking="allow", hot_reads=3).start_splicing()
    settings = world.live.read()
    assert (settings.mode, settings.allow_blocking, settings.policy) == (0, True, 1)
    assert settings.allow_inq
    assert (settings.splicing, settings.registering, settings.hot_reads) == (True, True, 3)
    assert settings.queue_messages
    assert settings.queue_bytes


def test_a_policy_that_refuses_is_another_number(world: World) -> None:
    world.govern().apply()
    world.govern(tcp_inq="refuse").apply()
    assert (world.live.read().allow_inq, world.live.read().policy) == (False, 2)


def test_the_number_never_becomes_zero(world: World) -> None:
    world.live.write(policy=0xFFFFFFFF)
    world.govern().apply()
    assert world.live.read().policy == 1


def test_labels_come_and_go_with_their_container(world: World) -> None:
    reconciler = world.govern()
    reconciler.apply()
    world.run("web", 7, mode="off")
    world.run("app", 8)
    assert reconciler.apply()
    assert world.read_rules() == {(CGROUP, 7, 0): (0, None, None)}
    assert world.live.read().has_rules == 1 << CGROUP
    world.containers = {}
    assert reconciler.apply()
    assert not world.rules.content
    assert world.live.read().has_rules == 0
    assert world.live.read().policy == 3


def test_rules_by_port_network_and_cgroup(world: World) -> None:
    (world.run_dir / "slice").mkdir()
    inode = (world.run_dir / "slice").stat().st_ino
    policies = (
        Rule(ports=(80, 81), mode="off"),
        Rule(cidr="10.0.0.0/8", blocking="allow"),
        Rule(cgroup="slice", mode="eager"),
        Rule(cgroup="missing", mode="off"),
        Rule(ports=(82,), tcp_inq="refuse"),
    )
    reconciler = world.govern(policies=policies)
    reconciler.apply()
    said = world.read_rules()
    assert said[PORT, 0, 80] == said[PORT, 0, 81] == (0, None, None)
    assert said[CGROUP, inode, 0] == (2, None, None)
    assert said[PORT, 0, 82] == (None, None, 0)
    assert (NETWORK, 1, 0) in said or len([key for key in said if key[0] == NETWORK]) == 1
    prefixes = {NETWORK_KEY.unpack(key)[0] for key, _ in world.networks.items()}
    assert prefixes == {104}
    assert world.live.read().has_eager
    assert not reconciler.have_cgroups_changed()
    (world.run_dir / "missing").mkdir()
    assert reconciler.have_cgroups_changed()
    assert reconciler.apply()
    assert not reconciler.have_cgroups_changed()


def test_of_equal_ranks_the_one_with_the_port_comes_first(world: World) -> None:
    world.run("web", 7, ports="80")
    world.govern().apply()
    words = {RULE_KEY.unpack(key)[2]: RULE.unpack(value)[0] for key, value in world.rules.items()}
    assert words[80] < words[0]
    assert (words[80] & 3, words[0] & 3) == (1, 0)


def test_until_the_containers_are_known_an_earlier_daemons_rules_hold(world: World) -> None:
    world.run("web", 7, mode="off")
    world.govern().apply()
    before = dict(world.rules.content)
    world.containers = None
    later = world.govern(policies=(Rule(ports=(80,), mode="off"),))
    later.apply()
    assert before.items() <= world.rules.content.items()
    assert (PORT, 0, 80) in world.read_rules()
    world.containers = {}
    later.apply()
    assert set(world.read_rules()) == {(PORT, 0, 80)}


def test_rules_that_do_not_fit_are_said_and_tried_again(world: World) -> None:
    world.rules.room = 2
    reconciler = world.govern(policies=(Rule(ports=tuple(range(80, 90)), mode="off"),))
    assert reconciler.failing_seconds == 0
    reconciler.apply()
    assert "does not fit" in reconciler.failure
    since = reconciler.failing_seconds
    reconciler.apply()
    assert reconciler.failing_seconds > since > 0
    assert "policy_incomplete" in world.log.names()
    world.rules.room = 100
    reconciler.apply()
    assert (reconciler.failure, reconciler.failing_seconds) == ("", 0)
    assert len(world.rules.content) == 10


def test_an_override_is_stored_applied_and_taken_back(world: World) -> None:
    world.run("web", 7)
    reconciler = world.govern()
    reconciler.apply()
    assert reconciler.override("web", "off") == (["web"], [])
    assert reconciler.override("web", "off") == ([], ["web"])
    assert world.read_rules() == {(CGROUP, 7, 0): (0, None, None)}
    # By name: it holds for the container that follows, also in the next daemon.
    world.containers = {}
    world.run("web", 9, mode="adaptive")
    another = world.govern()
    another.apply()
    assert world.read_rules()[CGROUP, 9, 0] == (0, None, None)
    assert another.override("web", None) == (["web"], [])
    assert world.read_rules()[CGROUP, 9, 0] == (1, None, None)
    assert another.override("web", None) == ([], ["web"])


def test_an_override_can_be_taken_back_when_its_container_is_gone(world: World) -> None:
    world.run("web", 7)
    reconciler = world.govern()
    reconciler.override("web", "off")
    world.containers = {}
    assert reconciler.override("web", None) == (["web"], [])
    with pytest.raises(SplicerError, match="no running container"):
        reconciler.override("web", None)


def test_an_override_that_cannot_be_stored_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run("web", 7)
    reconciler = world.govern()
    reconciler.apply()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("splicer.policy.reconciler.overrides.store", refuse)
    with pytest.raises(SplicerError, match="No space left"):
        reconciler.override("web", "off")
    assert not world.rules.content


def find_ids(world: World) -> Callable[[str], list[str]]:
    reconciler = world.govern()
    return lambda text: [each.name for each in reconciler.find_containers(text)]


def test_containers_are_found_by_name_service_and_id(world: World) -> None:
    assert world.containers is not None
    labels: Mapping[str, str] = {"com.docker.compose.service": "web", "com.docker.compose.project": "shop"}
    for number, name in enumerate(("shop-web-1", "shop-web-2", "web")):
        identifier = f"{number}abc".ljust(64, "0")
        world.containers[identifier] = Container(
            identifier, name, "image", labels if name.startswith("shop") else {}, cgroup_id=number + 1
        )
    find = find_ids(world)
    assert find("shop-web-2") == ["shop-web-2"]
    assert find("web") == ["web"], "a name goes before a service"
    assert find("1abc") == ["shop-web-2"]
    del world.containers["2abc".ljust(64, "0")]
    assert find("web") == ["shop-web-1", "shop-web-2"]
    with pytest.raises(SplicerError) as refusal:
        find("shop-web-3")
    assert refusal.value.hint is not None
    assert "shop-web-" in refusal.value.hint
    with pytest.raises(SplicerError):
        find("1ab")


def test_bad_labels_are_complained_about_once(world: World) -> None:
    world.run("web", 7, enable="maybe")
    reconciler = world.govern()
    reconciler.apply()
    reconciler.apply()
    assert world.log.names().count("bad_label") == 1
    [problem] = reconciler.list_problems()
    assert (problem["container"], problem["label"], problem["value"]) == ("web", "splicer.enable", "maybe")
    assert world.read_rules()[CGROUP, 7, 0] == (0, None, None), "left alone"


def test_settings_read_again_take_effect(world: World) -> None:
    reconciler = world.govern()
    reconciler.apply()
    reconciler.use_settings(Settings(run_dir=str(world.run_dir), default="off"))
    assert reconciler.apply()
    assert world.live.read().mode == 0
    assert reconciler.describe() == {
        "default": "off",
        "mode": "adaptive",
        "blocking": "refuse",
        "tcp_inq": "allow",
        "paused": False,
    }


def test_rules_are_counted_by_the_containers_they_are_about(world: World) -> None:
    world.run("web-1", 7)
    world.run("web-2", 8)
    world.run("db", 9)
    reconciler = world.govern(
        policies=(Rule(container="web-*", mode="off"), Rule(cgroup="docker", mode="off"))
    )
    assert [count for _, count in reconciler.list_rules()] == [2, 3]
    [explained] = reconciler.explain("web-1")
    assert explained.to_json()["mode"] == "off"
    assert len(reconciler.explain(None)) == 3


# -- holds ---------------------------------------------------------------------------------------------------


def test_while_everything_is_held_nothing_else_counts(world: World) -> None:
    """Labels, overrides and rules are back as they were afterwards, and nothing of it is stored."""
    world.run("web", 7, mode="eager")
    reconciler = world.govern(mode="eager", policies=(Rule(ports=(80,), mode="eager"),))
    reconciler.apply()
    reconciler.override("web", "adaptive")
    before, rules = world.live.read(), world.read_rules()
    stored = sorted(path.name for path in world.run_dir.iterdir())
    assert reconciler.hold("a measurement", 20, None) is None
    held = world.live.read()
    assert not world.rules.content
    assert (held.mode, held.has_rules, held.has_eager, held.policy) == (0, 0, False, before.policy + 1)
    assert reconciler.describe_hold()["holder"] == "a measurement"
    assert sorted(path.name for path in world.run_dir.iterdir()) == stored
    assert not reconciler.release("somebody else")
    assert world.live.read() == held
    assert reconciler.release("a measurement")
    assert world.read_rules() == rules
    assert world.live.read() == dataclasses.replace(before, policy=before.policy + 2)


def test_a_hold_of_a_container_is_about_no_other(world: World) -> None:
    world.run("web", 7, mode="eager")
    world.run("db", 8, mode="eager")
    reconciler = world.govern()
    reconciler.apply()
    before = world.read_rules()
    assert reconciler.hold("a measurement", 20, ["web"]) == ["web"]
    after = world.read_rules()
    assert after[CGROUP, 7, 0] == (0, None, None)
    assert after[CGROUP, 8, 0] == before[CGROUP, 8, 0] == (2, None, None)
    assert reconciler.explain("web")[0].to_json()["parts"][0]["source"] == "override"
    assert reconciler.release("a measurement")
    assert world.read_rules() == before


def test_a_hold_of_a_container_that_is_not_there(world: World) -> None:
    world.run("web", 7)
    reconciler = world.govern()
    with pytest.raises(SplicerError, match="no running container"):
        reconciler.hold("a measurement", 20, ["wbe"])
    assert reconciler.describe_hold() == {}


def test_everything_is_held_before_the_containers_are_known(world: World) -> None:
    """What an earlier daemon knew of them is kept for later, and not in force meanwhile."""
    world.run("web", 7, mode="eager")
    world.govern().apply()
    world.containers = None
    later = world.govern()
    later.apply()
    assert world.read_rules()
    later.hold("a measurement", 20, None)
    assert not world.read_rules()


def test_overrides_by_place_and_by_process(world: World) -> None:
    """Each as its key, the newest with the lowest rank; processes are looked up again."""
    (world.run_dir / "slice").mkdir()
    inode = (world.run_dir / "slice").stat().st_ino
    pids = {"redis*": frozenset({4711})}
    reconciler = world.govern()
    reconciler._find_processes = lambda names: {name: pids[name] for name in names}
    for kind, text in (
        ("cgroup", "slice"),
        ("port", "80,81"),
        ("address", "10.0.0.0/8"),
        ("process", "redis*"),
    ):
        assert reconciler.override(text, "off", kind)[0]
        assert reconciler.override(text, "off", kind)[0] == []
    assert set(world.read_rules()) == {
        (CGROUP, inode, 0),
        (PORT, 0, 80),
        (PORT, 0, 81),
        (NETWORK, 1, 0),
        (4, 4711, 0),
    }
    ranks = {RULE_KEY.unpack(key)[1]: RULE.unpack(value)[0] >> 33 for key, value in world.rules.items()}
    assert ranks == {4: 1, NETWORK: 2, PORT: 3, CGROUP: 4}
    assert not reconciler.have_processes_changed()
    pids["redis*"] = frozenset({4711, 4712})
    assert reconciler.have_processes_changed()
    reconciler.apply()
    assert (4, 4712, 0) in world.read_rules()
    another = world.govern()
    assert [mode for _, mode in another.list_overrides()] == ["off"] * 4
    assert [subject.kind for subject, _ in another.list_overrides()] == [
        "process",
        "address",
        "port",
        "cgroup",
    ]
    for kind, text in (
        ("cgroup", "slice"),
        ("port", "80-81"),
        ("address", "10.0.0.0/8"),
        ("process", "redis*"),
    ):
        assert reconciler.override(text, None, kind)[0]
    assert not world.rules.content


def test_set_anew_is_the_newest(world: World) -> None:
    reconciler = world.govern()
    reconciler.override("80", "off", "port")
    reconciler.override("::1", "adaptive", "address")
    assert reconciler.override("80", "off", "port") == (["port 80"], [])
    assert reconciler.list_overrides()[0][0].kind == "port"


def test_too_many_overrides(world: World) -> None:
    reconciler = world.govern()
    for port in range(1, 257):
        reconciler.override(str(port), "off", "port")
    with pytest.raises(SplicerError, match="too many overrides"):
        reconciler.override("1000", "off", "port")


def test_paused_nothing_is_spliced_whatever_is_said(world: World) -> None:
    """Also of containers that are not known yet; resumed, all is as before; a next daemon knows."""
    world.run("web", 7, mode="eager")
    reconciler = world.govern(mode="eager")
    reconciler.apply()
    before = world.read_rules()
    assert reconciler.pause(True)
    assert not reconciler.pause(True)
    assert (world.live.read().mode, world.live.read().has_eager, world.read_rules()) == (0, False, {})
    assert reconciler.describe()["paused"]
    world.containers = None
    another = world.govern(mode="eager")
    another.apply()
    assert (world.live.read().mode, world.read_rules()) == (0, {})
    assert another.paused_seconds is not None
    world.containers = {}
    world.run("web", 7, mode="eager")
    assert another.pause(False)
    assert not another.pause(False)
    assert (world.live.read().mode, world.read_rules()) == (2, before)
    assert world.govern().paused_seconds is None


def test_a_pause_that_cannot_be_stored_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = world.govern()
    reconciler.apply()

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("splicer.policy.reconciler.overrides.store_pause", refuse)
    with pytest.raises(SplicerError, match="Read-only"):
        reconciler.pause(True)
    assert world.live.read().mode == 1
