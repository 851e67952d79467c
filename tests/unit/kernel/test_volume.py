# SPDX-License-Identifier: Apache-2.0
"""What is read of the maps, and what of a share of them that is not there."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

import pytest

from splicer.kernel import libbpf
from splicer.kernel.layout import (
    COUNT_PLAIN,
    COUNTERS,
    RECENT_VOLUME,
    SEED,
    TALLY_PAIRS,
    TALLY_REQUEST_SIZE,
    VOLUME,
    VOLUME_KEY,
)
from splicer.kernel.volume import Volume, VolumeKey, VolumeReader

CPUS = 2


class FakeMap:
    """A map of bytes."""

    def __init__(self, entries: dict[bytes, bytes] | None = None, room: int = 100) -> None:
        self.entries = entries or {}
        self.max_entries = room

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def items(self) -> list[tuple[bytes, bytes]]:
        return list(self.entries.items())

    def delete(self, key: bytes) -> bool:
        return self.entries.pop(key, None) is not None

    def walk(self) -> Any:
        steps = [(memoryview(b"".join(self.entries)), memoryview(b"".join(self.entries.values())))]
        return type("Walk", (), {"step": lambda _, _wanted: steps.pop() if steps else None})()


def make_place(name: int) -> bytes:
    fields = [0] * len(SEED.unpack(bytes(SEED.size)))
    fields[11], fields[15] = 1, name
    return SEED.pack(*fields)


class Kernel:
    """The maps, and tally, which finds so many bytes of each connection."""

    def __init__(self, names: int = 0) -> None:
        self.asked: list[int] = []
        self.size = 10
        self.maps = {
            "counters": FakeMap(),
            "volumes": FakeMap(),
            "recent": FakeMap(room=2),
            "standing": FakeMap({VOLUME_KEY.pack(9, 9, 9): VOLUME.pack(9, 9)}),
            "pairs": FakeMap({struct.pack("=Q", name + 1): b"" for name in range(0, names, 3)}),
            "seeds": FakeMap({struct.pack("=Q", name + 1): b"" for name in range(1, names, 3)}),
            "young": FakeMap(
                {struct.pack("=I", name): make_place(name + 1) for name in range(2, names, 3)}
                | {struct.pack("=I", 255): bytes(SEED.size)}
            ),
        }

    def count(self, index: int, *values: int) -> None:
        self.maps["counters"].entries[struct.pack("=I", index)] = struct.pack(f"={CPUS}Q", *values)

    def make_run(self, program: int, size: int) -> Any:
        assert (program, size) == (7, TALLY_REQUEST_SIZE)
        kernel, context = self, bytearray(size)

        class Run:
            def __init__(self) -> None:
                self.context = context

            def run(self) -> int:
                found = [name for (name,) in struct.iter_unpack("=Q", context) if name]
                kernel.asked += found
                standing = kernel.maps["standing"].entries
                key = VOLUME_KEY.pack(1, 2, 3)
                old = VOLUME.unpack(standing.get(key, bytes(VOLUME.size)))
                standing[key] = VOLUME.pack(old[0] + len(found), old[1] + kernel.size * len(found))
                return 0

        return Run()


@pytest.fixture
def pin_dir(tmp_path: Path) -> str:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "counters").touch()
    return str(tmp_path)


def read(kernel: Kernel, pin_dir: str, monkeypatch: pytest.MonkeyPatch, program: int | None = 7) -> Any:
    monkeypatch.setattr(libbpf, "TestRun", kernel.make_run)
    return VolumeReader(kernel.maps, program, pin_dir).read()  # type: ignore[arg-type]


def test_closed_ones_of_all_places(pin_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the map, at each CPU, and what is left of a sum is nobody's."""
    kernel = Kernel()
    kernel.count(COUNTERS.index("redirected_bytes"), 1000, 234)
    kernel.count(COUNT_PLAIN + 3, 100, 60)
    kernel.maps["volumes"].entries[VOLUME_KEY.pack(1, 2, 3)] = VOLUME.pack(2, 50)
    empty = bytes(RECENT_VOLUME.size)
    slots = [RECENT_VOLUME.pack(1, 2, 3, 1, 30) + empty, RECENT_VOLUME.pack(5, 2, 3, 1, 40) * CPUS]
    kernel.maps["recent"].entries = {struct.pack("=I", i): slot for i, slot in enumerate(slots)}
    found = read(kernel, pin_dir, monkeypatch)
    assert found.redirected == 1234
    assert found.is_complete
    expected = {
        VolumeKey(1, 2, 3): Volume(3, 80),
        VolumeKey(5, 2, 3): Volume(2, 80),
    }
    assert found.plain == expected
    kernel.count(COUNT_PLAIN + 3, 100, 90)
    assert read(kernel, pin_dir, monkeypatch).plain == expected | {VolumeKey(0, 0, 3): Volume(0, 30)}


@pytest.mark.parametrize("names", [0, 1, TALLY_PAIRS, TALLY_PAIRS + 1, 100])
def test_open_ones(names: int, pin_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked about once, and what another reader has left behind does not count."""
    kernel = Kernel(names)
    found = read(kernel, pin_dir, monkeypatch)
    assert sorted(kernel.asked) == list(range(1, names + 1))
    assert found.plain == ({VolumeKey(1, 2, 3): Volume(names, 10 * names)} if names else {})
    assert kernel.maps["standing"].entries == {}


def test_more_parties_than_there_is_room_for(pin_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(3)
    kernel.maps["standing"].max_entries = 1
    assert not read(kernel, pin_dir, monkeypatch).is_complete


def test_a_kernel_that_refuses_tally(pin_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(3)
    kernel.count(COUNT_PLAIN, 5, 0)
    found = read(kernel, pin_dir, monkeypatch, program=None)
    assert not found.is_complete and not kernel.asked
    assert found.plain == {VolumeKey(0, 0, 0): Volume(0, 5)}


def test_a_kernel_that_runs_it_no_more(pin_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self, _program: int, size: int) -> None:
            self.context = bytearray(size)

        def run(self) -> int:
            raise libbpf.KernelError(errno.EPERM, "run a program")

    kernel = Kernel(3)
    kernel.count(COUNT_PLAIN, 5, 0)
    monkeypatch.setattr(libbpf, "TestRun", Refused)
    found = VolumeReader(kernel.maps, 7, pin_dir).read()  # type: ignore[arg-type]
    assert not found.is_complete
    assert found.plain == {VolumeKey(0, 0, 0): Volume(0, 5)}
