# SPDX-License-Identifier: Apache-2.0
"""`splicer tap` without a kernel: what it makes of records, and what it refuses. That there are any is
tests/kernel/test_tap.py."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from splicer.cli.capture import Capture, Text, dump_hex, summarise, to_text
from splicer.kernel.layout import CLIENT, SERVER, TAP_RECORD, TapChoice

from ..conftest import Invoke

CLIENT_END = (0, 0, 0xFFFF, 0x0A000001), 40000
SERVER_END = (0, 0, 0xFFFF, 0x0A000002), 80
NOTHING = ((0, 0), (0, 0))


def make_record(
    data: bytes, *, seq: int = 1, sender: int = CLIENT, missed: tuple[int, int] = (0, 0), **changes: Any
) -> memoryview:
    """`missed`: pieces and bytes so far."""
    viewer = changes.get("viewer", CLIENT)
    ends = (CLIENT_END, SERVER_END) if viewer == CLIENT else (SERVER_END, CLIENT_END)
    head = TAP_RECORD.pack(
        changes.get("name", 7),
        1000,
        *ends[0][0],
        *ends[1][0],
        5,
        ends[0][1],
        ends[1][1],
        seq,
        9,
        changes.get("size", len(data)),
        len(data),
        sender,
        viewer,
        TapChoice.UNDECIDED,
        missed[1],
        missed[0],
    )
    return memoryview(head + data)


class Scene:
    """A capture that writes text."""

    def __init__(self, rows: Mapping[int, Mapping[str, object]], wanted: bool | None) -> None:
        self.out = io.StringIO()
        self.chosen: dict[int, TapChoice] = {}
        self.asked: list[Sequence[int]] = []
        self._rows = rows
        is_wanted = None if wanted is None else (lambda row: row.get("local") == "10.0.0.1:40000")
        self.capture = Capture(
            Text(self.out, hexadecimal=False), self._describe, is_wanted, self.chosen.__setitem__
        )

    def _describe(self, names: Sequence[int]) -> Mapping[int, Mapping[str, object]]:
        self.asked.append(names)
        return self._rows

    @property
    def heads(self) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.out.getvalue().splitlines() if " > " in line]


@pytest.fixture
def scene() -> Scene:
    return Scene({}, None)


@pytest.mark.parametrize("viewer", [CLIENT, SERVER])
def test_who_sends_to_whom(scene: Scene, viewer: int) -> None:
    scene.capture.take(
        [make_record(b"ask", viewer=viewer), make_record(b"say", sender=SERVER, viewer=viewer)]
    )
    assert scene.heads == [
        "10.0.0.1:40000 > 10.0.0.2:80: seq 1:4, length 3",
        "10.0.0.2:80 > 10.0.0.1:40000: seq 1:4, length 3",
    ]
    assert scene.asked == [[7]]
    assert summarise(scene.capture.totals) == ["2 messages (6 B) of 1 connection; none missed"]


@pytest.mark.parametrize(
    ("seq", "missed", "said"),
    [
        (4, (0, 0), ""),
        (10, (0, 0), "6 bytes before this went through TCP"),
        (10, (2, 6), "6 bytes before this missed by splicer tap (2 messages: no room in the buffer)"),
        (10, (1, 1), "1 byte before this missed by splicer tap (1 message: no room in the buffer); 5 bytes"),
    ],
)
def test_gaps(scene: Scene, seq: int, missed: tuple[int, int], said: str) -> None:
    scene.capture.take([make_record(b"ask"), make_record(b"ask", seq=seq, missed=missed)])
    notes = [line for line in scene.out.getvalue().splitlines() if line.startswith("(")]
    assert len(notes) == bool(said) and said in "".join(notes)
    assert scene.capture.totals.missed == missed


def test_numbers_begin_again_after_four_gigabytes(scene: Scene) -> None:
    first = make_record(b"ask", seq=(1 << 32) - 2)
    scene.capture.take([first, make_record(b"ask", seq=1), make_record(b"ask", seq=10)])
    assert "(6 bytes before this went through TCP, where tcpdump sees them)" in scene.out.getvalue()
    assert "seq 4294967294:1, length 3" in scene.out.getvalue()


def test_what_was_missed_last_is_counted(scene: Scene) -> None:
    """Of connections that have ended, of those that go on, and of those without room in the table."""
    scene.capture.take([make_record(b"ask", missed=(1, 10)), make_record(b"ask", name=8)])
    scene.capture.close_flow(7, ((30, 3), (5, 1)))
    scene.capture.close_flow(99, ((30, 3), (5, 1)))
    scene.capture.finish(lambda name: ((100, 2), (0, 0)) if name == 8 else NOTHING, (50, 4))
    assert scene.capture.totals.missed == (3 + 1 + 2 + 4, 30 + 5 + 100 + 50)
    lines = summarise(scene.capture.totals, most=2)
    assert lines[1] == "missed: 10 messages (185 bytes), there was no room in the buffer"
    assert lines[2:5] == [
        "  10.0.0.1:40000 > 10.0.0.2:80: 5 messages, 130 bytes",
        "  other connections: 4 messages, 50 bytes",
        "  and 1 more",
    ]


def test_what_is_wanted_by_the_rows_of_the_daemon() -> None:
    scene = Scene({7: {"local": "10.0.0.1:40000"}, 8: {"local": "10.0.0.3:1"}}, True)
    for _ in range(2):
        scene.capture.take([make_record(b"ask"), make_record(b"no", name=8)])
    assert scene.chosen == {7: TapChoice.WANTED, 8: TapChoice.UNWANTED}
    assert len(scene.heads) == 2 and len(scene.asked) == 1
    assert scene.capture.totals.undecided == 0
    assert sorted(scene.capture.names) == [7, 8]


def test_what_the_daemon_does_not_know_is_known_by_its_addresses() -> None:
    scene = Scene({}, True)
    scene.capture.take([make_record(b"ask")])
    assert scene.chosen == {7: TapChoice.WANTED} and len(scene.heads) == 1


def test_what_nobody_knows_is_left_out_and_said() -> None:
    scene = Scene({}, True)
    scene.capture._is_wanted = lambda row: "client" in row
    for _ in range(2):
        scene.capture.take([make_record(b"ask")])
    assert not scene.chosen and not scene.heads and len(scene.asked) == 2
    assert "left out: 2 messages" in summarise(scene.capture.totals)[-1]


def test_text_steers_no_terminal() -> None:
    assert to_text(b"a\x1b[2J\r\n\tb\xff\x00\n") == "a.[2J.\n\tb.."
    assert dump_hex(b"GET / HTTP/1.1\r\n\x00") == [
        "  000000  47 45 54 20 2f 20 48 54 54 50 2f 31 2e 31 0d 0a  GET / HTTP/1.1..",
        "  000010  00                                               .",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "0"), "bad value for --port: 0"),
        (("--address", "10.0.0.300"), "bad value for --address: 10.0.0.300"),
        (("--snaplen", "39"), "--snaplen"),
        (("--count", "0"), "--count"),
        (("--buffer", "much"), "--buffer"),
        (("--hex", "-w", "file"), "--hex is for the terminal"),
    ],
)
def test_bad_options(invoke: Invoke, arguments: tuple[str, ...], said: str) -> None:
    done = invoke("tap", *arguments)
    assert done.code == 2 and said in done.stderr and "hint: " in done.stderr
