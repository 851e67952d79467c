# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from splicer.text import (
    Cell,
    ColourChoice,
    Column,
    Palette,
    elide,
    human_age,
    human_bytes,
    human_count,
    is_terminal,
    legend,
    plural,
    printable,
    table,
    terminal_width,
    two_columns,
    wants_colour,
)

from .conftest import Terminal


@pytest.mark.parametrize(
    ("choice", "tty", "environ", "wanted"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
    ],
)
def test_colour(choice: ColourChoice, tty: bool, environ: dict[str, str], wanted: bool) -> None:
    stream = Terminal() if tty else io.StringIO()
    assert wants_colour(choice, stream, environ) is wanted


def test_a_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not is_terminal(stream)
    assert terminal_width(stream) is None


def test_palette_paints_only_when_enabled() -> None:
    assert Palette(True).paint("x", "red") == "\x1b[31mx\x1b[0m"
    assert Palette(True).paint("x", None) == "x"
    assert Palette(False).paint("x", "red") == "x"


def test_printable_disarms_escapes() -> None:
    assert printable("a\x1b[2Jb\nc") == "a?[2Jb?c"


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [("abc", 3, "abc"), ("[2001:db8::1]:443", 12, "[20..:1]:443"), ("abcdef", 2, "ab"), ("abcdef", 3, "..f")],
)
def test_elide_keeps_the_end(text: str, width: int, shown: str) -> None:
    assert elide(text, width) == shown
    assert len(elide(text, width)) <= width


def test_table_aligns_and_has_no_trailing_blanks() -> None:
    lines = table(
        (Column("NAME"), Column("N", "right"), Column("WHY")), [("a", "1", "x"), ("bcdef", "234", "")]
    )
    assert lines == ["NAME     N  WHY", "a        1  x", "bcdef  234"]


def test_table_colour_does_not_move_columns() -> None:
    rows = [(Cell("spliced", "green"), "x"), (Cell("on", None), "y")]
    columns = (Column("STATE"), Column("Z"))
    plain = table(columns, rows)
    painted = table(columns, rows, palette=Palette(True))
    assert [
        line.replace("\x1b[32m", "").replace("\x1b[1m", "").replace("\x1b[0m", "") for line in painted
    ] == plain


def test_table_shrinks_elastic_columns_only() -> None:
    columns = (Column("A", elastic=True, least=10), Column("B"), Column("C", elastic=True, least=10))
    rows = [("a" * 40, "b" * 20, "c" * 15)]
    lines = table(columns, rows, width=60)
    assert max(len(line) for line in lines) == 60
    assert "b" * 20 in lines[1]
    assert "c" * 15 in lines[1]
    assert len(table(columns, rows, width=10)[1]) == 10 + 2 + 20 + 2 + 10


def test_table_disarms_cells() -> None:
    assert table((Column("A"),), [("\x1b[31m",)])[1] == "?[31m"


def test_pairs_and_legend() -> None:
    assert two_columns([("a", "1"), ("long", "2")]) == ["  a     1", "  long  2"]
    text = legend({"cold": "word " * 30, "stop": "x"}, width=40)
    lines = text.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert lines[0].startswith("  cold  word")
    assert lines[1].startswith("        word")
    assert lines[-1] == "  stop  x"


@pytest.mark.parametrize(
    ("human", "number", "shown"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 1023, "1023 B"),
        (human_bytes, 1024, "1.00 KiB"),
        (human_bytes, 10 * 1024, "10.0 KiB"),
        (human_bytes, 1024 * 1024 - 1, "1.00 MiB"),
        (human_bytes, 123 * 1024**3, "123 GiB"),
        (human_bytes, 2**64, "16.0 EiB"),
        (human_count, 0, "0"),
        (human_count, 99_999, "99999"),
        (human_count, 100_000, "100 k"),
        (human_count, 999_600, "1.00 M"),
        (human_count, 4_500_000, "4.50 M"),
        (human_age, -1.0, "0.0s"),
        (human_age, 0.44, "0.4s"),
        (human_age, 9.94, "9.9s"),
        (human_age, 9.96, "10s"),
        (human_age, 59.6, "1m00s"),
        (human_age, 185.0, "3m05s"),
        (human_age, 7620.0, "2h07m"),
        (human_age, 86400.0 * 4 + 3600 * 11, "4d11h"),
    ],
)
def test_numbers_for_people(human: Callable[[float], str], number: float, shown: str) -> None:
    assert human(number) == shown


def test_plural() -> None:
    assert [plural(count, "message") for count in (0, 1, 2)] == ["0 messages", "1 message", "2 messages"]
    assert plural(2, "match", "matches") == "2 matches"
