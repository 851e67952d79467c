# SPDX-License-Identifier: Apache-2.0
"""The pins of what answers FIONREAD: both or neither, and kept for ends that outlive splicer."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from splicer.kernel import answer, bpffs, generation, libbpf
from splicer.kernel.programs import ANSWERS

FOUR, SIX = answer.NAMES


class FakeMap:
    """A SOCKHASH as a file: a byte for each end that is in it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def walk_keys(self) -> Iterator[bytes]:
        yield from (bytes([each]) for each in os.pread(self.fd, 100, 0))

    def close(self) -> None:
        os.close(self.fd)

    @classmethod
    def open(cls, path: str) -> FakeMap:
        return cls(path)


class FakeKernel:
    """Files for objects: a pin is another name of one. Which links it refuses, and which pins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: set[str] = set()
        self.linked: list[str] = []
        monkeypatch.setattr(libbpf, "open_pin", lambda path: os.open(path, os.O_RDONLY))
        monkeypatch.setattr(libbpf, "link_function", self._link)
        monkeypatch.setattr(libbpf, "pin", self._pin)
        monkeypatch.setattr(libbpf, "Map", FakeMap)

    def _link(self, program: int) -> int:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{program}"))
        if name in self.refused:
            raise libbpf.KernelError(errno.EBUSY, "attach to the function")
        self.linked.append(name)
        return os.dup(program)

    def _pin(self, fd: int, path: str) -> None:
        if os.path.basename(path) in self.refused:
            raise libbpf.KernelError(errno.EPERM, f"pin {path}")
        os.link(os.readlink(f"/proc/self/fd/{fd}"), path)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(monkeypatch)


@pytest.fixture
def pin_dir(tmp_path: Path) -> Path:
    """A generation's pins, as the loader leaves them, with three ends in its SOCKHASH."""
    for name in ("programs", "links", "maps"):
        (tmp_path / "pins" / name).mkdir(parents=True)
    for program in ANSWERS:
        (tmp_path / "pins/programs" / program.name).touch()
    (tmp_path / "pins/maps/spliced").write_bytes(b"abc")
    return tmp_path / "pins"


def list_pins(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def open_spliced(pin_dir: Path) -> libbpf.Map:
    return libbpf.Map.open(str(pin_dir / "maps/spliced"))


def leave(pin_dir: Path) -> bool:
    """What a generation does when it goes."""
    links = answer.open_links(str(pin_dir))
    spliced = open_spliced(pin_dir)
    try:
        return answer.keep(str(pin_dir), links, spliced)
    finally:
        spliced.close()
        for fd in links.values():
            os.close(fd)


def test_both_are_attached_and_pinned(kernel: FakeKernel, pin_dir: Path) -> None:
    assert answer.attach(str(pin_dir)) == ""
    assert kernel.linked == [FOUR, SIX]
    links = answer.open_links(str(pin_dir))
    assert list(links) == [FOUR, SIX]
    for fd in links.values():
        os.close(fd)


@pytest.mark.parametrize("refused", [FOUR, SIX])
def test_one_alone_is_none(kernel: FakeKernel, pin_dir: Path, refused: str) -> None:
    """IPv6 without IPv4, or the other way round, would be one kind of wrong answer for another."""
    kernel.refused = {refused}
    assert "attach to the function" in answer.attach(str(pin_dir))
    assert list_pins(pin_dir) == {"maps/spliced"}
    assert answer.open_links(str(pin_dir)) == {}


@pytest.mark.usefixtures("kernel")
def test_one_that_is_missing_is_not_opened(pin_dir: Path) -> None:
    answer.attach(str(pin_dir))
    (pin_dir / "links" / SIX).unlink()
    before = os.listdir("/proc/self/fd")
    assert answer.open_links(str(pin_dir)) == {}
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("kernel")
def test_links_stay_while_ends_are_left(pin_dir: Path) -> None:
    """Across the removal of the generation, and of the next one, which leaves ends as well."""
    for number in (1, 2):
        for name in ("programs", "links", "maps"):
            (pin_dir / name).mkdir(exist_ok=True)
        for program in ANSWERS:
            (pin_dir / "programs" / program.name).touch()
        (pin_dir / "maps/spliced").write_bytes(b"abc"[number:])
        assert answer.attach(str(pin_dir)) == ""
        assert generation.exists(str(pin_dir))
        assert leave(pin_dir)
        generation._remove_pins(str(pin_dir))
        assert not generation.exists(str(pin_dir))
    kept = {f"left-{number}/{name}" for number in (1, 2) for name in (FOUR, SIX, "spliced")}
    assert list_pins(pin_dir) == kept
    assert answer.list_left(str(pin_dir)) == ["left-1", "left-2"]
    assert answer.release(str(pin_dir)) == ([], 3)

    # The last end of the second one is closed.
    (pin_dir / "left-2/spliced").write_bytes(b"")
    removed, ends = answer.release(str(pin_dir))
    assert len(removed) == 3 and ends == 2
    assert answer.list_left(str(pin_dir)) == ["left-1"]
    (pin_dir / "left-1/spliced").write_bytes(b"")
    generation._remove_pins(str(pin_dir))
    assert not pin_dir.exists()


@pytest.mark.usefixtures("kernel")
def test_nothing_stays_where_no_end_is_left(pin_dir: Path) -> None:
    answer.attach(str(pin_dir))
    (pin_dir / "maps/spliced").write_bytes(b"")
    assert not leave(pin_dir)
    generation._remove_pins(str(pin_dir))
    assert not pin_dir.exists()


@pytest.mark.usefixtures("kernel")
def test_nothing_stays_where_nothing_answered(pin_dir: Path) -> None:
    assert not leave(pin_dir)
    assert answer.list_left(str(pin_dir)) == []


def test_a_place_where_nothing_can_be_pinned(kernel: FakeKernel, pin_dir: Path) -> None:
    """Somebody has unmounted the file system of pins: the stop goes on."""
    answer.attach(str(pin_dir))
    kernel.refused = {"spliced"}
    assert not leave(pin_dir)
    assert answer.list_left(str(pin_dir)) == []


@pytest.mark.usefixtures("kernel")
def test_half_of_what_is_left_is_removed(pin_dir: Path) -> None:
    """Without its SOCKHASH nobody could ever tell when the links may go. It was pinned first."""
    (pin_dir / "left-1").mkdir()
    (pin_dir / "left-1" / FOUR).touch()
    assert answer.release(str(pin_dir)) == ([str(pin_dir / "left-1" / FOUR)], 0)


def test_a_note_says_why_not(pin_dir: Path) -> None:
    answer.note(str(pin_dir), "the kernel refused the answer4 program (EPERM): Operation not permitted")
    assert generation._read_note(str(pin_dir), answer.NOTE).startswith("the kernel refused")


def test_what_is_kept_in_a_tree_stays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "file").touch()
    (tmp_path / "t/file").touch()
    removed = bpffs.remove_tree(str(tmp_path / "t"), keep=["b"])
    assert sorted(removed) == [str(tmp_path / "t/a/file"), str(tmp_path / "t/file")]
    assert list_pins(tmp_path / "t") == {"b/file"}
