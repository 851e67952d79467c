# SPDX-License-Identifier: Apache-2.0
"""The Python mirror of bpf/types.h: enumerations by name and order, structures by size and content."""

from __future__ import annotations

import re
import struct

import pytest

from splicer import model
from splicer.kernel import layout
from splicer.kernel.compiler import find_sources

TYPES = (find_sources() / "types.h").read_text()


def read_enum(name: str) -> list[str]:
    body = re.search(rf"enum {name} \{{(.*?)\}};", TYPES, re.S)
    assert body, f"no enum {name} in types.h"
    text = re.sub(r"/\*.*?\*/", "", body.group(1), flags=re.S)
    return [item.split("=")[0].strip() for item in text.split(",") if item.strip()]


def test_each_reason_of_the_programs_has_a_name_and_a_sentence() -> None:
    assert len(read_enum("reason")) - 1 == len(model.REASON_NAMES)
    assert all(text.endswith(".") for text in model.REASONS.values())
    assert len(set(model.REASON_NAMES)) == len(model.REASON_NAMES)


@pytest.mark.parametrize(
    ("constant", "name"),
    [
        ("REASON_COLD", "cold"),
        ("REASON_PENDING", "pending"),
        ("REASON_BLOCKING", "blocking_reader"),
        ("REASON_SPLICE", "splice_reader"),
        ("REASON_FULL", "map_full"),
        ("REASON_BACKPRESSURE", "backpressure"),
        ("REASON_STOP", "stop"),
        ("REASON_REQUEST", "request"),
        ("REASON_WAITALL", "waitall_reader"),
        ("REASON_UNACCEPTED", "unaccepted"),
        ("REASON_NETWORK", "network_gone"),
    ],
)
def test_reasons_are_in_the_order_of_the_programs(constant: str, name: str) -> None:
    assert model.REASON_NAMES[read_enum("reason").index(constant)] == name


def test_counters_are_in_the_order_of_the_programs() -> None:
    names = [name.removeprefix("COUNT_").lower() for name in read_enum("counter")]
    assert tuple(names[: layout.COUNT_REFUSED]) == layout.COUNTERS
    assert names[layout.COUNT_REFUSED] == "refused"


def test_sweep_counters_are_in_the_order_of_the_programs() -> None:
    names = [name.removeprefix("SWEEP_").lower() for name in read_enum("sweep_counter")]
    assert tuple(names[:-1]) == layout.SWEEP


def test_states_are_those_of_the_programs() -> None:
    names = read_enum("pair_state")
    assert names == ["STATE_PAIRED", "STATE_SPLICED", "STATE_DRAINING", "STATE_LEAVING"]
    for number, name in enumerate(names, start=1):
        assert getattr(layout, name) == number
        assert model.STATES[number] == ("draining" if number > 2 else name.removeprefix("STATE_").lower())


@pytest.mark.parametrize(
    ("words", "port", "text"),
    [
        ((0, 0, 0xFFFF, 0x7F000001), 80, "127.0.0.1:80"),
        ((0x20010DB8, 0, 0, 1), 443, "[2001:db8::1]:443"),
        ((0, 0, 0, 0), 0, "[::]:0"),
    ],
)
def test_endpoints_read_as_people_write_them(words: tuple[int, ...], port: int, text: str) -> None:
    assert layout.format_endpoint(words, port) == text


def test_settings_survive_a_round_trip() -> None:
    settings = layout.KernelSettings(1, True, True, 0, 16, 7, 0b1010, True, 1, 2, 3, 4, True)
    assert layout.KernelSettings.unpack(settings.pack()) == settings


def test_a_pair_is_read_field_by_field() -> None:
    def end(last_byte: int, port: int, peer_port: int, netns: int, flags: int) -> tuple[int, ...]:
        local = (0, 0, 0xFFFF, 0x0A000000 | last_byte)
        remote = (0, 0, 0xFFFF, 0x0A0000FF)
        return (*local, *remote, netns, port, peer_port, 0xFFFF8000, 7, 99, 0, 0, 16, 4711, flags, 0)

    directions = (100, 10, 1, *[0] * 10), (200, 20, 2, *[0] * 10)
    value = layout.PAIR.pack(
        11,
        22,
        layout.STATE_SPLICED,
        0,
        *end(1, 40000, 80, 1001, layout.EndFlag.IN_MAP),
        *end(2, 80, 40000, 1002, 0),
        5,
        6,
        0,
        0,
        0,
        0,
        0,
        1,
        *[0] * 6,
        *directions[0],
        *directions[1],
    )
    pair = layout.read_pair(value)
    assert pair.id == (11, 22)
    assert (pair.client.local, pair.client.remote) == ("10.0.0.1:40000", "10.0.0.255:80")
    assert (pair.client.netns, pair.server.netns) == (1001, 1002)
    assert (pair.client.cgroup, pair.server.cgroup) == (99, 99)
    assert (pair.client.tgid, pair.client.reads) == (4711, 16)
    assert pair.is_in_map
    assert (pair.born_ns, pair.changed_ns, pair.announced) == (5, 6, True)
    states, amounts = layout.read_amounts(memoryview(value))
    assert (states, list(amounts)) == ([layout.STATE_SPLICED], [(99, 99, 100, 10, 200, 20)])
    both = memoryview(value + value.replace(struct.pack("=Q", 1002), struct.pack("=Q", 1003)))
    client, server = (
        layout.pack_place(netns, bytes(10) + b"\xff\xff\x0a\0\0" + bytes([last]))
        for netns, last in ((1001, 1), (1002, 2))
    )
    assert layout.read_places(both) == [
        (layout.STATE_SPLICED, client, server),
        (layout.STATE_SPLICED, client, (1003, *server[1:])),
    ]
    assert layout.read_whereabouts(both) == {(1001, 4711), (1002, 4711), (1003, 4711)}
    plain = memoryview(value[:8] + struct.pack("=I", layout.STATE_PAIRED) + value[12:])
    assert layout.read_whereabouts(plain) == set()
    assert layout.read_in_map(both) == [True, True]
    assert layout.read_ends(both, [False, True]) == {(1001, 4711), (1003, 4711)}
    assert pair.client_sends == layout.Direction(100, 10, 1)
    assert pair.server_sends == layout.Direction(200, 20, 2)


def test_of_many_pairs_those_to_look_at_are_read_quickly() -> None:
    def pair(name: tuple[int, int], state: int, *readers: int) -> bytes:
        ends = [(*[0] * 17, reader, *[0] * 2) for reader in readers]
        return layout.PAIR.pack(*name, state, 0, *ends[0], *ends[1], *[0] * 14, *[0] * 26)

    pairs = [
        pair((number, 1), state, 10 * number, 10 * number + 1)
        for number, state in enumerate((0, layout.STATE_PAIRED, layout.STATE_SPLICED, 3, 4))
    ]
    values = memoryview(b"".join(pairs))
    assert layout.read_watched(values) == [1 << 32 | n for n in (2, 3, 4)]
    assert layout.read_names(values) == [1 << 32 | n for n in range(5)]
    assert layout.read_readers(values) == [(10 * n, 10 * n + 1) for n in range(5)]


SEED = struct.pack(
    "=4I 4I Q I I 4Q 2I H B x I", *[0, 0, 0xFFFF, 1] * 2, 7, 80, 5000, 1, 2, 3, 4, 11, 12, 0, 0, 5
)


def test_a_place_is_free_without_a_socket() -> None:
    socket = struct.calcsize("=4I 4I Q I I")
    assert layout.read_place(SEED) == struct.pack("=2I", 11, 12)
    assert layout.read_place(SEED[:socket] + bytes(8) + SEED[socket + 8 :]) is None


def test_a_seed_is_read_field_by_field() -> None:
    pair = layout.read_seed(SEED)
    assert pair.id == (11, 12)
    assert (pair.server.local, pair.server.remote) == ("0.0.0.1:80", "0.0.0.1:5000")
    assert (pair.born_ns, pair.changed_ns) == (4, 4)


def test_looks_are_those_of_the_programs() -> None:
    assert [f"LOOK_{look.name}" for look in layout.Look] == read_enum("look")
    assert [look.value for look in layout.Look] == [1 << bit for bit in range(layout.LOOK_BITS)]
    assert f"#define LOOK_BITS\t{layout.LOOK_BITS}\n" in TYPES
    assert layout.LOOK_BITS * layout.WATCH_PAIRS <= 32
    assert [f"ASK_{each.name}" for each in layout.Question] == read_enum("question")
    assert [each.value for each in layout.Question] == list(range(len(layout.Question)))
    assert f"#define WATCH_PAIRS\t{layout.WATCH_PAIRS}\n" in TYPES


def test_requests_of_enlist_are_as_the_program_has_them() -> None:
    for names, prefix in ((layout.EnlistTask, "enlist_task"), (layout.EnlistOutcome, "enlist_outcome")):
        assert [f"ENLIST_{each.name}" for each in names] == read_enum(prefix)
        assert [each.value for each in names] == list(range(len(names)))
    assert f"#define ENLIST_PAIRS\t{layout.ENLIST_PAIRS}\t" in TYPES
    assert read_enum("announced")[layout.ANNOUNCED_BY_WALK] == "ANNOUNCED_BY_WALK"
    # A page, but for what the kernel puts around a packet; outcomes are read as one column.
    assert layout.ENLIST_SIZE < 4096 - 512
    assert layout.ENLIST_HEAD.size % 4 == layout.ENLIST_REQUEST.size % 4 == 0


def test_settings_of_an_earlier_build_have_fewer_fields() -> None:
    settings = layout.KernelSettings(1, True, True, 0, 16, 7, 0b1010, True, 1, 2, 3, 4, True)
    assert layout.KernelSettings.unpack(settings.pack()[:-4]) == settings


def test_an_event_is_read_field_by_field() -> None:
    record = struct.pack("=2I 2I 2Q 2I", 2, 16, 1, 2, 1001, 1002, 30, 40) + b"\0" * 8
    event = layout.read_event(record)
    assert event == layout.Event(layout.EventType.DRAIN, 16, 2 << 32 | 1, (1001, 1002), (30, 40))


def test_what_the_tap_writes_is_as_the_program_has_it() -> None:
    assert [f"TAP_{each.name}" for each in layout.TapChoice] == read_enum("tap_choice")
    assert f"#define TAP_PORTS\t{layout.TAP_PORTS}\n" in TYPES
    sizes = dict(re.findall(r"_Static_assert\(sizeof\(struct (tap_\w+)\) == (\d+),", TYPES))
    assert {name: int(size) for name, size in sizes.items()} == {
        "tap_settings": layout.TAP_SETTINGS.size,
        "tap_flow": layout.TAP_FLOW.size,
        "tap_record": layout.TAP_RECORD.size,
    }
