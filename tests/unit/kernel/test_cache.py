# SPDX-License-Identifier: Apache-2.0
"""What was compiled, kept for the next start: under which name, and what is not believed."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from splicer.kernel import compiler
from splicer.kernel.cache import KEPT, OFF, Cache, CacheError
from splicer.kernel.compiled import Compiled, find_references
from splicer.kernel.compiler import Sources
from splicer.kernel.libbpf import LD_IMM64, PSEUDO_MAP_FD, MapShape
from splicer.kernel.programs import ANSWERS, MAPS, PROGRAMS, TAP, TAP_MAPS

NAME = "0123456789abcdef" * 2
OTHER = "f" * 32
ALL_MAPS = (*MAPS, *TAP_MAPS)
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def refer(number: int) -> bytes:
    """An instruction that loads the address of a map."""
    return struct.pack("=BBhiBBhi", LD_IMM64, PSEUDO_MAP_FD << 4 | 1, 0, number, 0, 0, 0, 0)


def make_compiled(**changes: object) -> Compiled:
    made = Compiled(
        tuple(MapShape(name, 1, 4, 8, 16, types=7, value_type=2) for name in ALL_MAPS),
        {7: b"types"},
        {program.function: refer(3) + EXIT for program in (*PROGRAMS, *ANSWERS, TAP)},
        {},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(directory: Path) -> Cache:
    return Cache(str(directory))


@pytest.fixture
def kept(cache: Cache, directory: Path) -> Path:
    """The file of NAME, as it should be."""
    cache.write(NAME, make_compiled())
    assert cache.read(NAME) == make_compiled()
    return directory / f"{NAME}.programs"


def refuse(cache: Cache) -> str:
    """Why NAME is not read."""
    with pytest.raises(CacheError) as caught:
        cache.read(NAME)
    return str(caught.value)


def test_what_is_kept_is_read(cache: Cache, directory: Path) -> None:
    assert cache.read(NAME) is None
    cache.write(NAME, make_compiled())
    assert cache.read(NAME) == make_compiled()
    assert cache.read(OTHER) is None
    (path,) = directory.iterdir()
    assert str(path) == cache.locate(NAME)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = Cache(OFF)
    cache.write(NAME, make_compiled())
    assert cache.read(NAME) is None
    assert list(tmp_path.iterdir()) == []


# -- damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["mark", "checksum", "body", "end"])
def test_a_changed_byte(cache: Cache, kept: Path, place: str) -> None:
    text = bytearray(kept.read_bytes())
    at = {"mark": 3, "checksum": 30, "body": len(text) // 2, "end": len(text) - 1}[place]
    text[at] ^= 1
    kept.write_bytes(text)
    assert "damaged" in refuse(cache)


@pytest.mark.parametrize("left", [0, 10, 84, 85, 1000])
def test_cut_off(cache: Cache, kept: Path, left: int) -> None:
    os.truncate(kept, left)
    assert "damaged" in refuse(cache)


def test_longer(cache: Cache, kept: Path) -> None:
    with kept.open("ab") as file:
        file.write(b" ")
    assert "damaged" in refuse(cache)


def test_too_large(cache: Cache, kept: Path) -> None:
    os.truncate(kept, 1 << 30)
    assert "too large" in refuse(cache)


def test_of_another_kernel(cache: Cache, directory: Path, kept: Path) -> None:
    """By its name it is for us, and inside it says what it is."""
    kept.rename(directory / f"{OTHER}.programs")
    with pytest.raises(CacheError, match="compiled for something else") as caught:
        cache.read(OTHER)
    assert os.uname().release in str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """With a checksum that is right."""
    head, body = path.read_bytes().split(b"\n", 1)
    document = json.loads(body)
    body = json.dumps(change(document) or document).encode()
    path.write_bytes(head[:-64] + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: [1],
        lambda document: {"name": NAME},
        lambda document: document.update(maps=[]),
        lambda document: document.update(maps=[{"name": "pairs"}]),
        lambda document: document.update(types={"x": ""}),
        lambda document: document.update(code={}),
        lambda document: document.update(code=dict.fromkeys(document["code"], "")),
        lambda document: document["code"].update(verdict="AAAA"),
        lambda document: document["code"].update(verdict="no base64!"),
        lambda document: document.pop("made_by") and None,
    ],
)
def test_no_sense(cache: Cache, kept: Path, change: Callable[[dict[str, object]], object]) -> None:
    rewrite(kept, change)
    assert "makes no sense" in refuse(cache)


@pytest.mark.parametrize("number", [-1, len(ALL_MAPS)])
def test_a_map_that_is_not_there(number: int) -> None:
    made = make_compiled()
    wrong = dataclasses.replace(made, code={**made.code, "guard": refer(number)})
    with pytest.raises(ValueError, match="guard refers to a map"):
        Compiled.from_document(wrong.to_document())


def test_whatever_was_wrong_is_written_anew(cache: Cache, kept: Path) -> None:
    kept.write_bytes(b"nonsense")
    refuse(cache)
    cache.write(NAME, make_compiled())
    assert cache.read(NAME) == make_compiled()


# -- who could have written it -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write(cache: Cache, kept: Path, mode: int) -> None:
    kept.chmod(mode)
    assert "others can write to it" in refuse(cache)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_directory_that_others_may_write(cache: Cache, directory: Path, kept: Path, mode: int) -> None:
    """It is not read, and not written either."""
    directory.chmod(mode)
    assert "others can write to the directory" in refuse(cache)
    before = kept.read_bytes()
    with pytest.raises(CacheError, match="others can write"):
        cache.write(NAME, make_compiled(made_by={"x": "y"}))
    assert kept.read_bytes() == before


@pytest.mark.parametrize("mode", [0o755, 0o500, 0o700])
def test_what_others_may_only_read(cache: Cache, directory: Path, kept: Path, mode: int) -> None:
    directory.chmod(mode)
    kept.chmod(0o644)
    assert cache.read(NAME) == make_compiled()
    directory.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["the directory", "it"])
def test_of_another_user(cache: Cache, directory: Path, kept: Path, what: str) -> None:
    os.chown(directory if what == "the directory" else kept, 65534, 65534)
    assert refuse(cache) == f"{what} belongs to another user (65534)"


def test_symbolic_links(cache: Cache, directory: Path, kept: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    assert refuse(cache) == "it is a symbolic link"
    cache.write(NAME, make_compiled(made_by={}))
    assert not kept.is_symlink() and cache.read(NAME)

    directory.rename(tmp_path / "moved")
    directory.symlink_to(tmp_path / "moved")
    for path in (str(directory), f"{directory}/"):
        assert refuse(Cache(path)) == "the directory is none, or a symbolic link"
    with pytest.raises(CacheError, match="symbolic link"):
        cache.write(OTHER, make_compiled())


def test_what_is_no_file(cache: Cache, kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept, 0o600)
    assert refuse(cache) == "it is no file"


# -- writing -----------------------------------------------------------------------------------------------


def test_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(CacheError):
            Cache(str(tmp_path / path)).write(NAME, make_compiled())
        with pytest.raises(CacheError):
            Cache(str(tmp_path / path)).read(NAME)


def test_another_one_writes(cache: Cache, directory: Path, kept: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(CacheError, match="another splicer is writing there"):
        cache.write(OTHER, make_compiled())
    os.close(fd)
    cache.write(OTHER, make_compiled())


def test_what_a_dead_one_left_is_no_obstacle(cache: Cache, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / "draft").write_text("half")
    cache.write(NAME, make_compiled())
    assert [path.name for path in directory.iterdir()] == [f"{NAME}.programs"]


def test_there_are_a_few_at_most(cache: Cache, directory: Path) -> None:
    """What was used last stays; files of others are let be."""
    names = [f"{number:032x}" for number in range(KEPT + 3)]
    (directory / "sub").mkdir(parents=True, mode=0o700)
    directory.chmod(0o700)
    (directory / "README").write_text("mine")
    for number, name in enumerate(names):
        cache.write(name, make_compiled())
        os.utime(cache.locate(name), (number, number))
        if number >= 1:
            cache.read(names[0])
    left = {path.stem for path in directory.glob("*.programs")}
    assert left == {names[0], *names[4:]}
    assert (directory / "README").exists() and (directory / "sub").exists()


# -- names -------------------------------------------------------------------------------------------------


SOURCES = Sources("text", ("-DA=1", "-DB=2"))


@pytest.mark.parametrize(
    "other",
    [
        Sources("text ", SOURCES.flags),
        Sources("text", ("-DA=1", "-DB=3")),
        Sources("text", ("-DA=1",)),
        Sources("text", ("-DA=1-DB=2",)),
    ],
)
def test_other_sources_have_another_name(other: Sources) -> None:
    assert other.name_compiled() != SOURCES.name_compiled()
    assert other.name_build(False) != SOURCES.name_build(False)


def test_another_kernel_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SOURCES.name_compiled()
    release, version, machine = compiler.describe_kernel()
    for other in ((f"{release}x", version, machine), (release, "#2", machine), (release, version, "x")):
        monkeypatch.setattr(compiler, "describe_kernel", lambda other=other: other)
        assert SOURCES.name_compiled() != before


def test_other_headers_have_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = tmp_path / "kernel/include/x.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(compiler, "find_sources", lambda: tmp_path)
    names = set()
    for text in ("", "#define A 1", "#define A 2"):
        header.write_text(text)
        names.add(SOURCES.name_compiled())
    assert len(names) == 3


def test_whether_fionread_is_answered_makes_another_build_of_the_same_programs() -> None:
    assert SOURCES.name_build(True) != SOURCES.name_build(False)


# -- the compiler ------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bcc that can be imported, and is not."""
    package = tmp_path / "bcc"
    package.mkdir()
    (package / "__init__.py").write_text("raise Exception('imported')")
    standard = [entry for entry in sys.path if "-packages" not in entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *standard])
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    file = tmp_path / "libbcc.so.0"
    file.write_text("1")
    return file


def test_another_compiler(cache: Cache, library: Path) -> None:
    made = make_compiled(made_by={str(library): compiler._describe_file(str(library))})
    cache.write(NAME, made)
    assert cache.read(NAME) == made
    library.write_text("12")
    assert refuse(cache) == "it was compiled by another compiler"
    library.unlink()
    assert refuse(cache) == "it was compiled by another compiler"


def test_no_compiler(cache: Cache, library: Path) -> None:
    """What is there has to do: splicer runs without bcc."""
    made = make_compiled(made_by={str(library): "another one"})
    cache.write(NAME, made)
    (library.parent / "bcc/__init__.py").unlink()
    (library.parent / "bcc").rmdir()
    assert cache.read(NAME) == made


# -- instructions ------------------------------------------------------------------------------------------


def test_maps_are_named_by_number_until_they_are_made() -> None:
    """What looks like a reference and is the second half of an instruction, or a number, is left alone."""
    number = struct.pack("=BBhiBBhi", LD_IMM64, 1, 0, 3, LD_IMM64, PSEUDO_MAP_FD << 4, 0, 5)
    code = number + refer(1) + EXIT + refer(0)
    assert list(find_references(code)) == [20, 44]
    made = make_compiled(code={"f": code})
    maps = {name: 100 + place for place, name in enumerate(MAPS)}
    assert made.link("f", maps) == number + refer(101) + EXIT + refer(100)
