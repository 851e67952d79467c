# SPDX-License-Identifier: Apache-2.0
"""Reading maps in steps: everything that is there is met once, however small the steps are."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from splicer.kernel import libbpf
from splicer.kernel.libbpf import Map

HASH, ARRAY = 1, 2  # enum bpf_map_type
ENTRIES = 500


def _pack(number: int) -> bytes:
    return struct.pack("=I", number)


@pytest.fixture
def make_map(_prerequisites: None) -> Iterator[Callable[[int, int], Map]]:
    """A scratch map of numbers, number to its square; it has room for just as many."""
    made: list[Map] = []

    def make(kind: int, entries: int) -> Map:
        scratch = Map(libbpf.create_map(kind, "scratch", 4, 8, max(entries, 1)))
        made.append(scratch)
        for number in range(entries):
            scratch.set(_pack(number), struct.pack("=Q", number * number))
        return scratch

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("kind", [HASH, ARRAY], ids=["hash", "array"])
@pytest.mark.parametrize("wanted", [1, 2, 7, ENTRIES - 1, ENTRIES, 10 * ENTRIES])
def test_walk_meets_each_entry_once(make_map: Callable[[int, int], Map], kind: int, wanted: int) -> None:
    """Also where a hash bucket has more entries than a step has room for."""
    walk = make_map(kind, ENTRIES).walk()
    found: list[tuple[int, int]] = []
    while (step := walk.step(wanted)) is not None:
        keys, values = (each.tobytes() for each in step)
        found += zip(
            (number for (number,) in struct.iter_unpack("=I", keys)),
            (value for (value,) in struct.iter_unpack("=Q", values)),
            strict=True,
        )
    assert sorted(found) == [(number, number * number) for number in range(ENTRIES)]
    assert walk.step(wanted) is None


def test_walk_in_a_map_that_changes(make_map: Callable[[int, int], Map]) -> None:
    """Entries that go and come between the steps: those that stay are met, and no step fails."""
    scratch = make_map(HASH, ENTRIES)
    walk = scratch.walk()
    met: list[int] = []
    gone = iter(range(0, ENTRIES, 2))
    while (step := walk.step(10)) is not None:
        met += (number for (number,) in struct.iter_unpack("=I", step[0].tobytes()))
        for number in [next(gone, None), next(gone, None)]:
            if number is not None:
                scratch.delete(_pack(number))
                scratch.set(_pack(number + ENTRIES), bytes(8))
    assert {number for number in met if number < ENTRIES and number % 2} == set(range(1, ENTRIES, 2))
    assert len(met) == len(set(met))


def test_empty_map(make_map: Callable[[int, int], Map]) -> None:
    scratch = make_map(HASH, 0)
    step = scratch.walk().step(10)
    assert step is None or len(step[0]) == 0
    assert scratch.items() == []
    assert list(scratch.walk_keys()) == []


def test_walk_over_keys_comes_to_an_end(make_map: Callable[[int, int], Map]) -> None:
    """Where the key in hand goes away each time, the kernel begins anew each time."""
    scratch = make_map(HASH, ENTRIES)
    assert sorted(scratch.walk_keys()) == sorted(map(_pack, range(ENTRIES)))
    steps = 0
    for key in scratch.walk_keys():
        scratch.delete(key)
        scratch.set(key, bytes(8))
        scratch.delete(key)
        if steps % 2:
            scratch.set(key, bytes(8))
        steps += 1
    assert steps <= 2 * ENTRIES
