# SPDX-License-Identifier: Apache-2.0
"""Any directory can be made to look like a cgroup, by a mount table that says so of its device number."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from splicer.errors import UNSUPPORTED, SplicerError
from splicer.host.cgroups import Cgroup, Mount, find, find_v2_mount, parse_mount, read_mounts


def device(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def line(path: Path, kind: str, *, root: str = "/", number: str | None = None) -> str:
    return f"41 31 {number or device(path)} {root} {path} rw,relatime shared:9 - {kind} {kind} rw"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "cgroup"
    directory.mkdir()
    return directory


Find = Callable[..., Cgroup]


@pytest.fixture
def look(tmp_path: Path, root: Path) -> Find:
    """`find` where these lines are the mount table, and `root` is where cgroups usually are."""

    def call(requested: object, *lines: str) -> Cgroup:
        file = tmp_path / "mountinfo"
        file.write_text("".join(line + "\n" for line in lines))
        return find(str(requested), mountinfo=file, conventional_root=str(root))

    return call


@pytest.fixture
def refuse(look: Find) -> Callable[..., SplicerError]:
    """The same where it fails; the error, which matches `match`."""

    def call(match: str, requested: object, *lines: str) -> SplicerError:
        with pytest.raises(SplicerError, match=match) as caught:
            look(requested, *lines)
        return caught.value

    return call


Refuse = Callable[..., SplicerError]


def test_a_v2_directory_is_taken_as_it_is(look: Find, root: Path) -> None:
    child = root / "system.slice"
    child.mkdir()
    cgroup = look(child, line(root, "cgroup2"))
    assert cgroup == Cgroup(str(child), str(child), child.stat().st_ino)
    assert not cgroup.substituted


def test_a_path_is_normalised_but_not_substituted(look: Find, root: Path) -> None:
    cgroup = look(f"{root}/../cgroup/", line(root, "cgroup2"))
    assert cgroup.path == str(root)
    assert not cgroup.substituted


# Two device numbers are needed to tell the tmpfs from what is mounted in it: /proc and the directory of the
# test.
HYBRID = Path("/proc/self/fd")


def test_the_usual_root_of_a_hybrid_host_is_substituted(look: Find, root: Path) -> None:
    cgroup = look(root, line(root, "tmpfs"), line(HYBRID, "cgroup2"))
    assert cgroup.path == str(HYBRID)
    assert cgroup.requested == str(root)
    assert cgroup.substituted


def test_nothing_else_is_substituted(refuse: Refuse, tmp_path: Path, root: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    error = refuse("not in a cgroup filesystem", other, line(root, "tmpfs"), line(HYBRID, "cgroup2"))
    assert error.hint is not None
    assert str(HYBRID) in error.hint


def test_a_v1_directory(refuse: Refuse, root: Path) -> None:
    memory = root / "memory"
    memory.mkdir()
    error = refuse("is a cgroup v1 directory", memory, line(memory, "cgroup"), line(HYBRID, "cgroup2"))
    assert error.exit_code == 1
    assert str(HYBRID) in str(error.hint)


@pytest.mark.parametrize("below", ["docker/abc", "memory/docker/abc"])
def test_a_v1_path_is_answered_with_its_v2_twin(refuse: Refuse, root: Path, below: str) -> None:
    unified = root / "unified"
    (unified / "docker/abc").mkdir(parents=True)
    error = refuse("no such cgroup", root / below, line(unified, "cgroup2"))
    assert error.hint == f"the cgroup v2 directory of that name is: --cgroup {unified}/docker/abc"


def test_a_missing_path(refuse: Refuse, root: Path) -> None:
    refuse(r"no such cgroup \(/nowhere/at/all\)", "/nowhere/at/all", line(root, "cgroup2"))


def test_a_file(refuse: Refuse, root: Path) -> None:
    file = root / "cgroup.procs"
    file.touch()
    error = refuse("is a file", file, line(root, "cgroup2"))
    assert error.hint == f"name the directory: --cgroup {root}"
    refuse("no such cgroup", f"{file}/x", line(root, "cgroup2"))


def test_a_host_without_v2(refuse: Refuse, root: Path) -> None:
    error = refuse("no cgroup v2 hierarchy", root, line(root, "tmpfs"))
    assert error.exit_code == UNSUPPORTED
    assert error.hint is not None


def test_a_path_no_system_call_takes(refuse: Refuse, root: Path) -> None:
    for path in ("a\0b", "/" + "x" * 300):
        refuse("cannot use the cgroup", path, line(root, "cgroup2"))


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(SplicerError, match="mount table"):
        read_mounts(tmp_path / "missing")


def test_mountinfo_is_parsed() -> None:
    text = r"41 31 0:38 /a\040b /mnt/c\134d\011 rw,relatime shared:9 master:1 - cgroup2 none rw,nsdelegate"
    assert parse_mount(text) == Mount(os.makedev(0, 38), "/a b", "/mnt/c\\d\t", "cgroup2")
    for broken in ("", "41 31 0:38 / /x rw", "41 31 x:y / /x rw - t t rw", "41 - cgroup2"):
        assert parse_mount(broken) is None


def test_the_best_mount_is_found(tmp_path: Path, root: Path) -> None:
    unified, elsewhere, partial = root / "unified", tmp_path / "elsewhere", root / "partial"
    for directory in (unified, elsewhere, partial):
        directory.mkdir()
    number = root.stat().st_dev
    hidden = Mount(number + 1, "/", str(root), "cgroup2")  # something else is mounted on top of it
    gone = Mount(number, "/", str(root / "gone"), "cgroup2")
    mounts = [
        hidden,
        gone,
        Mount(number, "/docker/x", str(partial), "cgroup2"),
        Mount(number, "/", str(elsewhere), "cgroup2"),
        Mount(number, "/", str(unified), "cgroup2"),
    ]
    assert find_v2_mount(mounts, str(root)) == str(unified)
    assert find_v2_mount(mounts[:4], str(root)) == str(elsewhere)
    assert find_v2_mount(mounts[:3], str(root)) == str(partial)
    assert find_v2_mount(mounts[:2], str(root)) is None


def test_this_host() -> None:
    unified = find_v2_mount(read_mounts())
    if unified is None:
        pytest.skip("no cgroup v2 hierarchy is mounted here")
    assert find(unified).id == os.stat(unified).st_ino
    assert find("/sys/fs/cgroup").path == unified
