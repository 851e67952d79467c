# SPDX-License-Identifier: Apache-2.0
"""Text for people: colour, tables, and numbers with units. Needs no terminal library."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

ColourChoice = Literal["auto", "always", "never"]
Align = Literal["left", "right"]

GAP = "  "
ELISION = ".."
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def is_terminal(stream: TextIO) -> bool:
    """True when `stream` is open and writes to a terminal."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def wants_colour(choice: ColourChoice, stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Decide on colour. An explicit choice beats NO_COLOR (no-color.org), which beats the terminal."""
    if choice != "auto":
        return choice == "always"
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb":
        return False
    return is_terminal(stream)


@dataclass(frozen=True)
class Palette:
    """Paints text, or leaves it alone when colour is off."""

    enabled: bool = False

    def paint(self, text: str, style: str | None) -> str:
        """`text` in `style` ("bold", "dim", "red", "green", "yellow", "cyan"); None leaves it alone."""
        if not self.enabled or style is None or not text:
            return text
        return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


PLAIN = Palette()


def printable(text: str) -> str:
    """Replace what could steer a terminal: names of cgroups and files may hold any byte."""
    return "".join(character if character.isprintable() else "?" for character in text)


def elide(text: str, width: int) -> str:
    """Shorten to `width` characters by cutting out of the middle, keeping more of the end: the port."""
    if len(text) <= width:
        return text
    kept = width - len(ELISION)
    if kept <= 0:
        return text[:width]
    tail = (2 * kept + 2) // 3
    return text[: kept - tail] + ELISION + text[len(text) - tail :]


@dataclass(frozen=True)
class Column:
    """One column of a table. An `elastic` one may be elided, down to `least` characters, to fit a width."""

    title: str
    align: Align = "left"
    elastic: bool = False
    least: int = 12


@dataclass(frozen=True)
class Cell:
    """Text with a style, for `table`."""

    text: str
    style: str | None = None


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | Cell]],
    *,
    width: int | None = None,
    palette: Palette = PLAIN,
) -> list[str]:
    """Lay out a heading and `rows`. With `width` (characters), elastic columns give way, widest first."""
    cells = [[entry if isinstance(entry, Cell) else Cell(entry) for entry in row] for row in rows]
    cells = [[Cell(printable(cell.text), cell.style) for cell in row] for row in cells]
    widths = [
        max([len(column.title), *(len(row[index].text) for row in cells)])
        for index, column in enumerate(columns)
    ]
    if width is not None:
        widths = _shrink(columns, widths, width)
    heading = [Cell(column.title, "bold") for column in columns]
    return [_line(columns, row, widths, palette) for row in [heading, *cells]]


def _shrink(columns: Sequence[Column], widths: list[int], width: int) -> list[int]:
    widths = list(widths)
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        candidates = [
            index
            for index, column in enumerate(columns)
            if column.elastic and widths[index] > max(column.least, len(column.title))
        ]
        if not candidates:
            break
        widths[max(candidates, key=lambda index: widths[index])] -= 1
    return widths


def _line(columns: Sequence[Column], row: Sequence[Cell], widths: Sequence[int], palette: Palette) -> str:
    parts = []
    for position, (column, cell, width) in enumerate(zip(columns, row, widths, strict=True)):
        shown = elide(cell.text, width)
        padding = " " * (width - len(shown))
        painted = palette.paint(shown, cell.style)
        if column.align == "right":
            parts.append(padding + painted)
        elif position == len(columns) - 1:
            parts.append(painted)
        else:
            parts.append(painted + padding)
    return GAP.join(parts).rstrip()


def two_columns(rows: Sequence[tuple[str, str]], *, palette: Palette = PLAIN, indent: int = 2) -> list[str]:
    """Names and values in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return [
        " " * indent + palette.paint(name.ljust(width), "dim") + GAP + printable(value)
        for name, value in rows
    ]


def legend(entries: Mapping[str, str], *, width: int = 79, indent: int = 2) -> str:
    """Names with explanations, wrapped to `width` characters under a hanging indent."""
    lines: list[str] = []
    column = indent + max((len(name) for name in entries), default=0) + len(GAP)
    for name, explanation in entries.items():
        first = (" " * indent + name).ljust(column)
        lines += textwrap.wrap(
            explanation,
            width,
            initial_indent=first,
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [first.rstrip()]
    return "\n".join(lines)


def terminal_width(stream: TextIO) -> int | None:
    """Characters per line when `stream` is a terminal; None when it is not and nothing should be cut."""
    return shutil.get_terminal_size((100, 24)).columns if is_terminal(stream) else None


def human_bytes(count: int) -> str:
    """Bytes in binary units, three significant digits: 999 B, 1.50 KiB, 12.3 MiB."""
    return f"{count} B" if count < 1024 else _scale(count, 1024, ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def human_count(count: int) -> str:
    """A number of things: exact below 100 000, then with decimal prefixes: 123 k, 4.50 M."""
    return str(count) if count < 100_000 else _scale(count, 1000, ("k", "M", "G", "T", "P", "E"))


def _scale(count: int, base: int, units: Sequence[str]) -> str:
    value, power = float(count), -1
    # 999.5 would be shown as 1000: it belongs to the next unit.
    while value >= base - 0.5 and power + 1 < len(units):
        value /= base
        power += 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[power]}"


def human_age(seconds: float) -> str:
    """A duration in its two largest units: 0.4s, 12s, 3m05s, 2h07m, 4d11h."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h"


def plural(count: int, singular: str, several: str | None = None) -> str:
    """`1 connection`, `2 connections`."""
    return f"{human_count(count)} {singular if count == 1 else several or singular + 's'}"
