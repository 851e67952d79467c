# SPDX-License-Identifier: Apache-2.0
"""Who else uses BPF: told apart from splicer's own, found where they are, unknown where nobody may look."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from splicer.host.cgroups import Cgroup
from splicer.kernel import libbpf, neighbours, objects
from splicer.model import ANOTHER_SPLICER, HOOKS, Neighbour, Neighbourhood

SOCK_OPS, SK_SKB, SK_MSG, SOCKOPT, SK_LOOKUP = 13, 14, 16, 25, 30
SOCKMAP, HASH = 15, 1

_Listed = TypeVar("_Listed")


class FakeKernel:
    """Programs, maps and links; what is attached to a directory or a map, by attach type; what is refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pins: Path) -> None:
        self.programs: list[objects.Program] = []
        self.maps: list[objects.Table] = []
        self.links: list[objects.Link] = []
        self.on_cgroups: dict[tuple[str, int], list[int]] = {}
        self.on_maps: dict[tuple[int, int], list[int]] = {}
        self.pinned: dict[str, objects.Program | objects.Table | objects.Link] = {}
        self.refused: dict[str, int] = {}
        self.queried = 0
        self._pins = pins
        monkeypatch.setattr(objects, "list_programs", self._guarded("programs", lambda: self.programs))
        monkeypatch.setattr(objects, "list_maps", self._guarded("maps", lambda: self.maps))
        monkeypatch.setattr(objects, "list_links", self._guarded("links", lambda: self.links))
        monkeypatch.setattr(objects, "query", self._query)
        monkeypatch.setattr(objects, "query_map", self._query_map)
        monkeypatch.setattr(objects, "read_pin", self.pinned.get)

    def _guarded(self, what: str, answer: Callable[[], _Listed]) -> Callable[[], _Listed]:
        def ask() -> _Listed:
            self._refuse(what)
            return answer()

        return ask

    def _refuse(self, what: str) -> None:
        if number := self.refused.get(what):
            raise libbpf.KernelError(number, what)

    def _query(self, fd: int, attach_type: int) -> list[int]:
        self._refuse("cgroups")
        self.queried += 1
        return self.on_cgroups.get((os.readlink(f"/proc/self/fd/{fd}"), attach_type), [])

    def _query_map(self, number: int, attach_type: int) -> list[int]:
        self._refuse("sockmaps")
        return self.on_maps.get((number, attach_type), [])

    def pin(self, name: str, item: objects.Program | objects.Table | objects.Link) -> None:
        path = self._pins / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.pinned[str(path)] = item


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    return FakeKernel(monkeypatch, tmp_path / "pins")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Cgroups: above/own/below, and above/beside."""
    above = tmp_path / "above"
    (above / "own/below").mkdir(parents=True)
    (above / "beside").mkdir()
    return above


def look(tree: Path, place: str = "own", most: int = 100) -> Neighbourhood:
    path = tree / place
    cgroup = Cgroup(str(path), str(path), path.stat().st_ino)
    found = neighbours.find(cgroup, str(tree.parent / "pins"), most=most)
    # The directories above are those of the machine, and no cgroups: the root is never found.
    return Neighbourhood(
        found.neighbours, tuple(each for each in found.unknown if "cannot be seen" not in each)
    )


def test_nobody(kernel: FakeKernel, tree: Path) -> None:
    """Then no cgroup is looked at."""
    kernel.programs = [objects.Program(1, SOCK_OPS, "register"), objects.Program(2, 5, "trace")]
    kernel.pin("programs/register", kernel.programs[0])
    kernel.maps = [objects.Table(3, HASH, "pairs")]
    assert look(tree) == Neighbourhood()
    assert kernel.queried == 0


def test_on_cgroups(kernel: FakeKernel, tree: Path) -> None:
    """Above, at and below ours, and not beside it; ours is not named where both are."""
    names = ("register", "first", "second", "third", "elsewhere")
    kernel.programs = [objects.Program(number, SOCK_OPS, name) for number, name in enumerate(names)]
    kernel.pin("programs/register", kernel.programs[0])
    kernel.on_cgroups = {
        (str(tree), 3): [1],
        (str(tree / "own"), 3): [0, 2],
        (str(tree / "own/below"), 22): [3],
        (str(tree / "beside"), 3): [4],
    }
    found = look(tree)
    assert [(each.hook, each.program, each.id, each.where) for each in found.neighbours] == [
        ("sock_ops", "first", 1, str(tree)),
        ("sock_ops", "second", 2, str(tree / "own")),
        ("setsockopt", "third", 3, str(tree / "own/below")),
    ]
    assert {each.place for each in found.neighbours} == {"cgroup"}
    assert found.neighbours[0].where_id == tree.stat().st_ino
    assert not found.unknown


def test_too_many_cgroups(kernel: FakeKernel, tree: Path) -> None:
    """What was not looked at is said."""
    for number in range(20):
        (tree / f"own/{number}").mkdir()
    kernel.programs = [objects.Program(1, SOCKOPT, "other")]
    assert look(tree).unknown == ()
    [unknown] = look(tree, most=10).unknown
    assert unknown == f"cgroups below {tree / 'own'} beyond the first 10"


def test_on_sockmaps(kernel: FakeKernel, tree: Path) -> None:
    """With programs and without; ours, pinned now or left of a generation that has gone, are not named."""
    kernel.programs = [
        objects.Program(1, SK_MSG, "verdict"),
        objects.Program(2, SK_SKB, "join"),
        objects.Program(3, SK_MSG, "mesh"),
    ]
    kernel.maps = [
        objects.Table(10, libbpf.BPF_MAP_TYPE_SOCKHASH, "spliced"),
        objects.Table(11, libbpf.BPF_MAP_TYPE_SOCKHASH, "spliced"),
        objects.Table(12, SOCKMAP, "proxy"),
        objects.Table(13, SOCKMAP, "agent"),
        objects.Table(14, HASH, "other"),
    ]
    kernel.pin("programs/verdict", kernel.programs[0])
    kernel.pin("maps/spliced", kernel.maps[0])
    kernel.pin("left-1/spliced", kernel.maps[1])
    kernel.on_maps = {(10, 7): [1], (12, 5): [2], (12, 7): [3]}
    found = look(tree)
    assert [(each.hook, each.program, each.where, each.where_id) for each in found.neighbours] == [
        ("sk_msg", "mesh", "proxy", 12),
        ("skb_verdict", "join", "proxy", 12),
        ("sockmap", "", "agent", 13),
    ]
    assert {each.place for each in found.neighbours} == {"map"}


def test_another_splicer(kernel: FakeKernel, tree: Path) -> None:
    """By the name and type of its programs; a program that has only the name is not one."""
    kernel.programs = [objects.Program(1, SK_MSG, "verdict"), objects.Program(2, SK_SKB, "verdict")]
    kernel.maps = [objects.Table(10, 18, "spliced"), objects.Table(11, SOCKMAP, "other")]
    kernel.on_maps = {(10, 7): [1], (11, 38): [2]}
    [theirs, other] = look(tree).neighbours
    assert theirs.is_splicer and theirs.meaning == ANOTHER_SPLICER
    assert not other.is_splicer and other.meaning == HOOKS["skb_verdict"]


def test_in_namespaces(kernel: FakeKernel, tree: Path) -> None:
    kernel.programs = [objects.Program(1, SK_LOOKUP, "steer")]
    kernel.links = [
        objects.Link(20, 5, 1, 76, 36),
        objects.Link(21, 5, 1, 77, 36),
        objects.Link(22, 5, 1, 78, 17),  # a flow dissector
        objects.Link(23, 3, 1, 0, 36),
    ]
    assert look(tree).neighbours == (
        Neighbour("sk_lookup", "steer", 1, "netns", "net:[76]", 76),
        Neighbour("sk_lookup", "steer", 1, "netns", "net:[77]", 77),
    )


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        ("programs", "BPF programs: programs: Operation not permitted"),
        ("maps", "BPF maps: maps: Operation not permitted"),
        ("links", "BPF links: links: Operation not permitted"),
        ("cgroups", "programs on cgroups: cgroups: Operation not permitted"),
        ("sockmaps", "programs on sockmaps: sockmaps: Operation not permitted"),
    ],
)
def test_what_the_kernel_does_not_tell(kernel: FakeKernel, tree: Path, refused: str, told: str) -> None:
    """It is unknown, said once, and the rest is found."""
    kernel.programs = [objects.Program(1, SOCK_OPS, "other"), objects.Program(2, SK_LOOKUP, "steer")]
    kernel.maps = [objects.Table(12, SOCKMAP, "a"), objects.Table(13, SOCKMAP, "b")]
    kernel.links = [objects.Link(21, 5, 2, 77, 36)]
    kernel.on_cgroups = {(str(tree / "own"), 3): [1]}
    everything = {each.hook for each in look(tree).neighbours}
    assert everything == {"sock_ops", "sockmap", "sk_lookup"}
    kernel.refused = {refused: errno.EPERM}
    found = look(tree)
    assert found.unknown == (told,)
    missing = {"programs": everything, "maps": {"sockmap"}, "links": {"sk_lookup"}, "cgroups": {"sock_ops"}}
    assert {each.hook for each in found.neighbours} == everything - missing.get(refused, {"sockmap"})


def test_gone_meanwhile(kernel: FakeKernel, tree: Path) -> None:
    """A program that was loaded after they were listed has no name yet; a cgroup that has gone is nothing."""
    kernel.programs = [objects.Program(1, SOCK_OPS, "other")]
    kernel.on_cgroups = {(str(tree / "own"), 3): [9]}
    assert [(each.program, each.id) for each in look(tree).neighbours] == [("", 9)]
    kernel.refused = {"cgroups": errno.ENODEV}
    assert look(tree) == Neighbourhood()
