# SPDX-License-Identifier: Apache-2.0
"""What hints lead to, how inventories follow one another, and what the kernel is asked about a container."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from splicer.containers.engine import Event, InspectedContainer, ListedContainer
from splicer.containers.inventory import (
    EMPTY,
    MOST_DIRTY,
    NO_HINTS,
    Hint,
    Hints,
    collect_hints,
    find_changed,
    is_complete,
    is_current,
    locate,
    merge,
    sort_by_need,
)
from splicer.host import namespaces
from splicer.host.scopes import Scopes
from splicer.model import Container

ONE, TWO, THREE = "1a" * 32, "2b" * 32, "3c" * 32


def container(identifier: str, name: str = "c", mode: str = "bridge", pid: int = 1) -> Container:
    return Container(identifier, name, "image", {}, pid=pid, cgroup_id=1, netns=1, network_mode=mode)


# -- hints ---------------------------------------------------------------------------------------------------


def test_nothing_to_do() -> None:
    assert not collect_hints([])
    assert not NO_HINTS
    assert Hints(everything=True)


@pytest.mark.parametrize(
    ("actions", "hint"),
    [
        (["start"], Hint.STARTED),
        (["die", "start"], Hint.STARTED),
        (["start", "die"], Hint.STARTED),
        (["start", "die", "start", "die"] * 50, Hint.STARTED),
        (["connect", "start", "disconnect", "die", "destroy"], Hint.STARTED),
        (["rename", "rename"], Hint.STARTED),
        (["die", "disconnect", "destroy"], Hint.MOVED),
        (["died", "cleanup", "remove"], Hint.ENDED),
        (["what may come"], Hint.STARTED),
    ],
)
def test_one_container_is_asked_about_once(actions: list[str], hint: Hint) -> None:
    assert collect_hints(Event(action, ONE, 0) for action in actions) == Hints({ONE: hint})


def test_hints_add_up_in_their_order() -> None:
    work = collect_hints([Event("start", TWO, 0), Event("die", ONE, 0)])
    work = collect_hints([Event("die", TWO, 0), Event("start", THREE, 0)], work)
    assert list(work.dirty.items()) == [(TWO, Hint.STARTED), (ONE, Hint.ENDED), (THREE, Hint.STARTED)]


def test_a_burst_leads_to_everything() -> None:
    work = collect_hints(Event("start", str(number), 0) for number in range(MOST_DIRTY))
    assert len(work.dirty) == MOST_DIRTY
    work = collect_hints([Event("start", "one more", 0)], work)
    assert work == Hints({}, everything=True)
    assert collect_hints((Event("start", str(number), 0) for number in range(1000)), work) is work


def sort(hints: dict[str, Hint], *stale: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    known = {ONE: container(ONE), TWO: container(TWO), "half": replace(container("half"), netns=0)}
    return sort_by_need(hints, known, lambda each: each.id not in stale)


def test_who_is_asked_about() -> None:
    assert sort({}) == ((), ())
    assert sort({ONE: Hint.STARTED, THREE: Hint.STARTED}) == ((ONE, THREE), ())
    assert sort({THREE: Hint.MOVED, TWO: Hint.MOVED}) == ((TWO,), ()), (
        "one that starts is not ready to answer"
    )
    assert sort({THREE: Hint.ENDED}) == ((), ()), "nobody knew it"
    assert sort({ONE: Hint.ENDED}) == ((ONE,), ()), "it looks alive"
    assert sort({ONE: Hint.ENDED, TWO: Hint.ENDED}, ONE) == ((TWO,), (ONE,))
    assert sort({ONE: Hint.MOVED}, ONE) == ((ONE,), ())
    assert sort({"half": Hint.ENDED}, "half") == (("half",), ()), "nobody here can tell"


def test_a_namespace_is_shared() -> None:
    inventory = {
        ONE: container(ONE, "web"),
        TWO: container(TWO, "side", f"container:{ONE}"),
        THREE: container(THREE, "by-name", "container:web"),
        "4": container("4", "host", "host"),
    }

    def pick(*ids: str) -> tuple[str, ...]:
        return sort_by_need(dict.fromkeys(ids, Hint.MOVED), inventory, lambda _: True)[0]

    assert pick(ONE) == (ONE, TWO, THREE)
    assert pick(TWO, ONE) == (TWO, ONE, THREE)
    assert pick("4", "unknown") == ("4",)


# -- inventories ---------------------------------------------------------------------------------------------


def test_merging() -> None:
    first = merge(EMPTY, [container(ONE), container(TWO)], [])
    assert list(first) == [ONE, TWO]
    second = merge(first, [container(ONE, "renamed")], [TWO, THREE])
    assert second == {ONE: container(ONE, "renamed")}
    assert len(first) == 2, "who holds a snapshot keeps it"
    with pytest.raises(TypeError):
        second[TWO] = container(TWO)  # type: ignore[index]


def test_the_same_again_is_the_same_object() -> None:
    first = merge(EMPTY, [container(ONE)], [])
    assert merge(first, [container(ONE)], [TWO]) is first
    assert merge(first, [], []) is first
    assert merge(EMPTY, [], [ONE]) is EMPTY


def test_what_to_inspect_of_a_list() -> None:
    inventory = {ONE: container(ONE), TWO: container(TWO)}
    listed = [ListedContainer(ONE, 10), ListedContainer(TWO, 20), ListedContainer(THREE, 30)]

    def pick(known: dict[str, int], *stale: str) -> dict[str, int]:
        return find_changed(inventory, listed, known, lambda each: each.id not in stale)

    everything = {ONE: 10, TWO: 20, THREE: 30}
    assert pick({}) == everything
    assert pick(everything) == {THREE: 30}, "whatever its fingerprint, there is no record"
    assert pick({**everything, ONE: 11}) == {ONE: 10, THREE: 30}
    assert pick(everything, TWO) == {TWO: 20, THREE: 30}, "it was restarted, and nobody told"


# -- what the kernel says ------------------------------------------------------------------------------------


class Tree(Scopes):
    """A cgroup tree of one container, with a process that says it is in there."""

    def __init__(self, base: Path, pid: int) -> None:
        self.directory = base / "cgroup/docker" / ONE
        self.directory.mkdir(parents=True)
        self.line = base / "proc" / str(pid) / "cgroup"
        self.line.parent.mkdir(parents=True)
        self.line.write_text(f"0::/docker/{ONE}\n")
        super().__init__(str(base / "cgroup"), proc=str(base / "proc"))


def inspected(pid: int) -> InspectedContainer:
    published = ("0.0.0.0:80->80/tcp",)
    return InspectedContainer(ONE, "web", "nginx", {"a": "b"}, pid, "bridge", published, {"c": "d"}, "shop")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="setns(2) takes root")


@needs_root
def test_a_container_is_located(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    tree = Tree(tmp_path, sleeper.pid)
    found = locate(inspected(sleeper.pid), tree)
    assert found == Container(
        id=ONE,
        name="web",
        image="nginx",
        labels={"a": "b"},
        pid=sleeper.pid,
        cgroup=str(tree.directory),
        cgroup_id=tree.directory.stat().st_ino,
        netns=namespaces.read_own_cookie(),
        network_mode="bridge",
        addresses=namespaces.read_addresses("/proc/self/ns/net"),
        published=("0.0.0.0:80->80/tcp",),
        annotations={"c": "d"},
        pod="shop",
    )
    assert is_complete(found)
    assert is_current(found)
    assert not is_current(replace(found, cgroup_id=found.cgroup_id + 1)), "it was restarted"
    assert not is_current(replace(found, netns=0)), "something is missing"
    tree.directory.rmdir()
    assert not is_current(found)


@needs_root
def test_a_reused_pid_says_nothing_about_the_container(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    tree = Tree(tmp_path, sleeper.pid)
    tree.line.write_text("0::/system.slice/other.service\n")
    found = locate(inspected(sleeper.pid), tree)
    assert (found.netns, found.addresses) == (0, ())
    assert found.cgroup == str(tree.directory), "that one is found by its name"
    assert not is_complete(found)


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    found = locate(inspected(0x7FFFFFFF), Tree(tmp_path, 0x7FFFFFFF))
    assert found.netns == 0
    assert found.cgroup_id
    assert not is_current(replace(found, netns=1))


def test_a_container_without_a_cgroup_of_its_own(tmp_path: Path) -> None:
    tree = Tree(tmp_path, 0x7FFFFFFF)
    tree.line.write_text("0::/user.slice\n")
    tree.directory.rmdir()
    found = locate(inspected(0x7FFFFFFF), tree)
    assert (found.cgroup, found.cgroup_id, found.netns) == ("", 0, 0)
    assert not is_current(found)


def test_compose_labels() -> None:
    def read(**labels: str) -> tuple[str, str]:
        found = replace(
            container(ONE), labels={key.replace("_", "."): value for key, value in labels.items()}
        )
        return found.project, found.service

    assert read() == ("", "")
    assert read(com_docker_compose_project="demo", com_docker_compose_service="web") == ("demo", "web")
    assert read(io_podman_compose_project="demo", com_docker_compose_service="web") == ("demo", "web")
    assert read(com_docker_stack_namespace="s", com_docker_swarm_service_name="s_web") == ("s", "s_web")
