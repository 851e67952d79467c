# SPDX-License-Identifier: Apache-2.0
"""A directory on any file system has an inode number, so a temporary one can stand in for the cgroup tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splicer.host.scopes import Place, Scope, Scopes, cut_path, read_path

ONE = "1a" * 32
TWO = "2b" * 32
UID = "3f2a7c1e-0b5d-4e6f-8a9b-0c1d2e3f4a5b"
DASHLESS = UID.replace("-", "")
SLICE = UID.replace("-", "_")


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/", Scope()),
        ("/system.slice/nginx.service", Scope()),
        (f"/docker/{ONE}", Scope(ONE)),
        (f"/docker/{ONE}/init.scope", Scope(ONE)),
        (f"/sys/fs/cgroup/unified/docker/{ONE}/system.slice/app.service", Scope(ONE)),
        (f"/system.slice/docker-{ONE}.scope", Scope(ONE)),
        (f"/machine.slice/libpod-{ONE}.scope/container", Scope(ONE)),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ONE}.scope", Scope(ONE)),
        (f"/system.slice/web.service/libpod-payload-{ONE}", Scope(ONE)),
        (f"/machine.slice/libpod-conmon-{ONE}.scope", Scope()),
        (f"/kubepods.slice/crio-conmon-{ONE}.scope", Scope()),
        (f"/system.slice/{ONE}.service", Scope()),  # a health check that Podman has systemd run
        (f"/kubepods/burstable/pod{UID}/{ONE}", Scope(ONE, UID)),
        (f"/kubepods/pod{UID}/{ONE}", Scope(ONE, UID)),
        (f"/kubepods/besteffort/pod{DASHLESS}/{ONE}", Scope(ONE, UID)),  # a static pod
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ONE}.scope",
            Scope(ONE, UID),
        ),
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice/crio-{ONE}.scope", Scope(ONE, UID)),
        (f"/kubepods.slice/kubepods-pod{SLICE}.slice", Scope("", UID)),
        (
            f"/system.slice/containerd.service/kubepods-besteffort-pod{SLICE}.slice:cri-containerd:{ONE}",
            Scope(ONE),
        ),
        (f"/docker/{TWO}/kubelet/kubepods/pod{UID}/{ONE}", Scope(ONE, UID, (TWO,))),  # kind
        (f"/docker/{TWO}/docker/{ONE}", Scope(ONE, "", (TWO,))),
        (f"/docker/{ONE[:-1]}", Scope()),
        (f"/docker/{ONE}0", Scope()),
        ("/system.slice/podman.service", Scope()),
    ],
)
def test_what_a_path_says(path: str, scope: Scope) -> None:
    assert read_path(path) == scope
    assert Scopes("/nowhere").read_path(path) == scope


def test_a_path_is_cut_at_the_container() -> None:
    assert cut_path(f"/docker/{ONE}/init.scope/x", ONE) == f"/docker/{ONE}"
    assert cut_path(f"/docker/{ONE}/docker/{TWO}", TWO) == f"/docker/{ONE}/docker/{TWO}"
    assert cut_path(f"/docker/{ONE}/docker/{TWO}", ONE) == f"/docker/{ONE}"
    assert cut_path(f"/docker/{ONE}", TWO) is None
    assert cut_path("", TWO) is None


class Host:
    """A tree of directories and a /proc beside it; the clock stands still unless it is moved."""

    def __init__(self, base: Path, most: int = 1000) -> None:
        self.root = base / "cgroup"
        self.proc = base / "proc"
        self.root.mkdir()
        self.proc.mkdir()
        self.now = 100.0
        self.scopes = Scopes(str(self.root), proc=str(self.proc), most=most, clock=lambda: self.now)

    def add(self, below: str) -> Place:
        path = self.root / below.lstrip("/")
        path.mkdir(parents=True)
        return Place(str(path), path.stat().st_ino)

    def start(self, pid: int, line: str) -> None:
        (self.proc / str(pid)).mkdir()
        (self.proc / str(pid) / "cgroup").write_text(f"9:name=systemd:/\n4:memory:/x\n0::{line}\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_path_by_id(host: Host) -> None:
    place = host.add("/system.slice/a.service/deeper/still")
    assert host.scopes.find_path(place.id) == "/system.slice/a.service/deeper/still"
    assert host.scopes.find_path(host.root.stat().st_ino) == "/"
    assert host.scopes.find_path(0) is None


def test_what_is_not_there_costs_a_walk_a_second_at_most(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walks.append(path) or real(path))
    unknown = 1 << 60
    for _ in range(100):
        assert host.scopes.find_path(unknown) is None
    assert len(walks) == 1
    young = host.add("/young")
    assert host.scopes.find_path(young.id) is None
    host.now += 1.1
    assert host.scopes.find_path(young.id) == "/young"
    for _ in range(100):
        assert host.scopes.find_path(young.id) == "/young"
    assert len(walks) == 2


def test_a_long_walk_is_followed_by_a_long_rest(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    real = os.scandir

    def crawl(path: str) -> object:
        walks.append(path)
        host.now += 1.0
        return real(path)

    monkeypatch.setattr(os, "scandir", crawl)
    host.scopes.find_path(1 << 60)
    for expected, seconds in ((1, 15), (2, 6)):
        host.now += seconds
        host.scopes.find_path(1 << 60)
        assert len(walks) == expected


def test_memory_is_bounded(tmp_path: Path) -> None:
    host = Host(tmp_path, most=10)
    for number in range(50):
        host.add(f"/n{number}/below")
    host.scopes.find_path(1 << 60)
    assert len(host.scopes._by_id) == 10


def test_memory_is_bounded_between_walks(tmp_path: Path) -> None:
    host = Host(tmp_path, most=10)
    for number in range(50):
        place = host.add(f"/docker/{number:064x}")
        assert host.scopes.find_container(f"{number:064x}") == place
        assert host.scopes.find_path(place.id) == f"/docker/{number:064x}"
    assert len(host.scopes._by_id) <= 10


def test_what_is_gone_is_forgotten(host: Host) -> None:
    place = host.add("/gone")
    assert host.scopes.find_path(place.id) == "/gone"
    (host.root / "gone").rmdir()
    host.now += 2
    host.scopes.find_path(1 << 60)
    assert host.scopes.find_path(place.id) is None


def test_no_tree_at_all(tmp_path: Path) -> None:
    scopes = Scopes(str(tmp_path / "missing"))
    assert scopes.find_path(1) is None
    assert scopes.find_container(ONE) is None


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str) -> None:
        raise AssertionError("a walk")

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("below", [f"/odd/place/{ONE}", f"/a.slice/any-{ONE}.scope"])
def test_a_container_by_its_process(host: Host, no_walk: None, below: str) -> None:
    place = host.add(below)
    host.start(7, below)
    assert host.scopes.find_container(ONE, 7) == place
    assert host.scopes.holds(place, ONE, 7)
    # The next one is alike, and needs no process.
    other = host.add(below.replace(ONE, TWO))
    assert host.scopes.find_container(TWO) == other
    assert host.scopes.find_path(other.id) == below.replace(ONE, TWO)


@pytest.mark.parametrize(
    "below", [f"/docker/{ONE}", f"/system.slice/docker-{ONE}.scope", f"/machine.slice/libpod-{ONE}.scope"]
)
def test_a_container_where_engines_put_it(host: Host, no_walk: None, below: str) -> None:
    place = host.add(below)
    assert host.scopes.find_container(ONE) == place


@pytest.mark.parametrize("inner", ["init.scope", "container", "system.slice/sshd.service"])
def test_a_container_with_cgroups_inside(host: Host, inner: str) -> None:
    host.add(f"/docker/{ONE}/{inner}")
    host.start(7, f"/docker/{ONE}/{inner}")
    place = host.scopes.find_container(ONE, 7)
    assert place is not None
    assert place.path == f"{host.root}/docker/{ONE}"
    assert place.id == os.stat(place.path).st_ino


@pytest.mark.parametrize("line", [f"/../../odd/{ONE}", f"/../{ONE}", "/", "/../.."])
def test_seen_from_another_cgroup_namespace(host: Host, line: str) -> None:
    place = host.add(f"/odd/pl/{ONE}")
    host.start(7, line)
    assert host.scopes.find_container(ONE, 7) == place
    assert host.scopes.holds(place, ONE, 7) == (ONE in line)
    (Path(place.path) / "cgroup.procs").write_text("1\n7\n")
    assert host.scopes.holds(place, ONE, 7)


def test_a_reused_pid_is_not_the_containers(host: Host) -> None:
    place = host.add(f"/docker/{ONE}")
    host.add(f"/docker/{TWO}")
    host.start(7, f"/docker/{TWO}")
    assert host.scopes.find_container(ONE, 7) == place
    assert not host.scopes.holds(place, ONE, 7)
    assert not host.scopes.holds(place, ONE, 8)
    assert not host.scopes.holds(None, ONE, 8)


def test_a_container_in_somebody_elses_cgroup_has_none(host: Host) -> None:
    host.add("/system.slice/a.service")
    host.start(7, "/system.slice/a.service")
    assert host.scopes.find_container(ONE, 7) is None
    assert not host.scopes.holds(None, ONE, 7)


def test_a_container_that_was_restarted(host: Host) -> None:
    place = host.add(f"/odd/{ONE}")
    assert host.scopes.find_container(ONE) == place
    (host.root / "odd" / ONE).rmdir()
    assert host.scopes.find_container(ONE) is None
    (host.root / "odd" / "keeps the inode number busy").mkdir()
    assert host.scopes.find_container(ONE) is None
    again = host.add(f"/odd/{ONE}")
    host.start(7, f"/odd/{ONE} (deleted)")
    assert host.scopes.find_container(ONE, 7) == again


def test_patterns_are_bounded(host: Host) -> None:
    for number in range(100):
        below = f"/p{number}/{ONE}"
        host.add(below)
        host.start(1000 + number, below)
        assert host.scopes.find_container(ONE, 1000 + number) is not None
    assert len(host.scopes._patterns) == 16


def test_this_host() -> None:
    from splicer.host.cgroups import find_v2_mount, read_mounts

    root = find_v2_mount(read_mounts())
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted here")
    scopes = Scopes(root)
    for directory, below, _ in os.walk(root):
        for name in below:
            path = os.path.join(directory, name)
            assert scopes.find_path(os.stat(path).st_ino) == path.removeprefix(root)
        break
