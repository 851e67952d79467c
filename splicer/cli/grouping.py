# SPDX-License-Identifier: Apache-2.0
"""Many connections at a glance: how many between whom are in which state, and why; and their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splicer.text import PLAIN, Cell, Column, Palette, human_bytes, human_count, plural, table

from .owners import name_owner, name_party
from .query import number, seconds, section, text

Flow = Mapping[str, object]
_MOST_GROUPS = 20

STATE_STYLES = {"spliced": "green", "draining": "yellow"}
_STATE_ORDER = {"spliced": 0, "draining": 1, "paired": 2}


def _rank_state(flow: Flow) -> tuple[int, int, str]:
    order = _STATE_ORDER.get(text(flow, "state"), len(_STATE_ORDER))
    return order, -number(flow, "redirected_bytes"), text(flow, "local")


_KEYS: dict[str, Callable[[Flow], tuple[object, ...]]] = {
    "state": _rank_state,
    "bytes": lambda flow: (-number(flow, "redirected_bytes"),),
    "messages": lambda flow: (-number(flow, "redirected_messages"),),
    "age": lambda flow: (-seconds(flow, "age_seconds"),),
    "reason": lambda flow: (text(flow, "reason"), *_rank_state(flow)),
    "client": lambda flow: (name_owner(section(flow, "client")), *_rank_state(flow)),
    "server": lambda flow: (name_owner(section(flow, "server")), *_rank_state(flow)),
}
SORT_KEYS = tuple(_KEYS)
"""What flows can be sorted by: amounts and ages the largest first, names from a to z."""


def sort(flows: Sequence[Flow], key: str) -> list[Flow]:
    """The flows in the order of a key (one of SORT_KEYS)."""
    return sorted(flows, key=_KEYS[key])


@dataclass(frozen=True)
class _Group:
    client: str
    server: str
    state: str
    reason: str


def summarise(flows: Sequence[Flow], *, palette: Palette = PLAIN, width: int | None = None) -> list[str]:
    """A table of who talks to whom in which state, the most connections first."""
    counts: dict[_Group, int] = {}
    amounts: dict[_Group, int] = {}
    for flow in flows:
        group = _Group(
            _name(flow, "client", "local", with_port=False),
            _name(flow, "server", "remote", with_port=True),
            text(flow, "state"),
            text(flow, "reason"),
        )
        counts[group] = counts.get(group, 0) + 1
        amounts[group] = amounts.get(group, 0) + number(flow, "redirected_bytes")
    order = sorted(counts, key=lambda group: (-counts[group], group.client, group.server, group.reason))
    columns = (
        Column("CLIENT", elastic=True),
        Column("SERVER", elastic=True),
        Column("STATE"),
        Column("REASON"),
        Column("CONNECTIONS", "right"),
        Column("BYTES", "right"),
    )
    rows = [
        (
            group.client,
            group.server,
            Cell(group.state, STATE_STYLES.get(group.state)),
            group.reason,
            human_count(counts[group]),
            human_bytes(amounts[group]),
        )
        for group in order[:_MOST_GROUPS]
    ]
    lines = table(columns, rows, width=width, palette=palette)
    if more := len(order) - len(rows):
        left = sum(counts[group] for group in order[_MOST_GROUPS:])
        lines.append(palette.paint(f"and {plural(more, 'more row')} ({plural(left, 'connection')})", "dim"))
    return lines


def _name(flow: Flow, end: str, address: str, *, with_port: bool) -> str:
    host, _, port = text(flow, address).rpartition(":")
    name = name_party(section(flow, end)) or host
    return f"{name}:{port}" if with_port else name
