# SPDX-License-Identifier: Apache-2.0
"""How much of the local traffic is redirected, in words and as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping

from splicer.policy.advice import REMEDIES
from splicer.text import PLAIN, Column, Palette, elide, human_bytes, plural, table

from .owners import name_owner
from .query import number, seconds, section, sections, text

_ROWS = 5
_UNKNOWN = "?"
_LONGEST_NAME = 60
_COLUMNS = (
    Column("PLAIN", "right"),
    Column("BYTES", "right"),
    Column("CLIENT", elastic=True, least=10),
    Column("SERVER", elastic=True, least=10),
    Column("REASON"),
    Column("WHAT WOULD CHANGE IT"),
)


def describe_share(share: float) -> str:
    """In per cent, and neither all nor nothing unless it is."""
    return "<1 %" if 0 < share < 0.005 else ">99 %" if 0.995 <= share < 1 else f"{share * 100:.0f} %"


def describe_time(since: float, now: float | None = None) -> str:
    """The local time of day, or the date if that was another day: 10:02, 28 Nov."""
    then, today = time.localtime(since), time.localtime(now)
    return time.strftime("%H:%M" if then[:3] == today[:3] else "%d %b", then)


def headline(coverage: Mapping[str, object], palette: Palette = PLAIN) -> str:
    """Which share of the bytes is redirected; empty if nobody has measured it."""
    if not coverage:
        return ""
    since = describe_time(seconds(coverage, "since"))
    redirected = number(coverage, "redirected_bytes")
    everything = redirected + number(coverage, "plain_bytes")
    if not everything:
        return f"No local TCP bytes yet (since {since})."
    share = palette.paint(describe_share(redirected / everything), "bold")
    amount, total = human_bytes(redirected), human_bytes(everything)
    if amount.split()[1] == total.split()[1]:
        amount = amount.split()[0]
    return f"{share} of local TCP bytes are redirected ({amount} of {total} since {since})."


def list_notes(coverage: Mapping[str, object]) -> list[str]:
    """What is not among the bytes."""
    notes = []
    if coverage.get("is_complete") is False:
        notes.append("Plain connections that are open count when they close.")
    older = coverage.get("older_uncounted", 0)
    if older is None:
        notes.append("Connections older than splicer are not counted.")
    elif isinstance(older, int) and older:
        notes.append(f"Not counted: {plural(older, 'connection')} older than splicer.")
    return notes


def name_parties(row: Mapping[str, object]) -> str:
    """Who talks to whom, no longer than two lines."""
    names = (elide(name_owner(section(row, end)), _LONGEST_NAME) for end in ("client", "server"))
    return " -> ".join(name or _UNKNOWN for name in names)


def list_plain(
    coverage: Mapping[str, object], *, width: int | None = None, palette: Palette = PLAIN
) -> list[str]:
    """The largest rows of what is not redirected, and what would change them; empty if there are none. Bytes
    are left out where there is no room for names beside them."""
    plain = [row for row in sections(coverage, "plain") if number(row, "plain_bytes")]
    if not plain:
        return []
    rows = [_make_row(row) for row in plain[:_ROWS]]
    if width is not None and max(map(len, table(_COLUMNS, rows))) > width:
        rows = [[row[0], *row[2:]] for row in rows]
        lines = table([_COLUMNS[0], *_COLUMNS[2:]], rows, width=width, palette=palette)
    else:
        lines = table(_COLUMNS, rows, palette=palette)
    rest = number(coverage, "others_bytes") + sum(number(row, "plain_bytes") for row in plain[_ROWS:])
    if rest:
        lines.append(palette.paint(f"and {human_bytes(rest)} in smaller rows: splicer status --json", "dim"))
    return lines


def _make_row(row: Mapping[str, object]) -> list[str]:
    remedy = REMEDIES.get(text(row, "reason"))
    return [
        describe_share(seconds(row, "share")),
        human_bytes(number(row, "plain_bytes")),
        name_owner(section(row, "client")) or _UNKNOWN,
        name_owner(section(row, "server")) or _UNKNOWN,
        text(row, "reason") or "-",
        remedy.hint if remedy else _UNKNOWN,
    ]
