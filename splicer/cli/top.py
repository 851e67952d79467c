# SPDX-License-Identifier: Apache-2.0
"""`splicer top`: how much goes between whom just now."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from splicer.errors import OK
from splicer.model import TOP_KEYS
from splicer.policy.values import seconds as seconds_from
from splicer.text import Column, human_age, human_bytes, human_count, legend, plural, table, terminal_width

from . import options, screen
from .context import Context
from .owners import name_owner
from .query import ask, number, seconds, section, sections, text

DESCRIPTION = """\
Show how many bytes and messages go between whom just now, redirected and
through TCP: for each pair of containers, services or programs, or for the
busiest connections. On a terminal it goes on until q is pressed, and keys
choose what is shown; elsewhere, or with --batch, it prints tables."""

INTERVAL_S = 2.0
_LONGEST_S = 60.0
_MOST_ROUNDS = 1_000_000
# How soon the first rates are there, whatever the interval.
_FIRST_S = 1.0
# So many rows are printed where no screen bounds them, and so many connections are asked for at most.
_ROWS = 20
_MOST_CONNECTIONS = 200
_KEYS = {"b": "bytes", "r": "redirected", "t": "plain", "m": "messages", "n": "connections"}
_FOOTER = "q quit  c connections  sort by: b bytes  r redirected  t tcp  m messages  n number"

_RATES = (
    Column("MSG/S", "right"),
    Column("SPLICED/S", "right"),
    Column("TCP/S", "right"),
)
_ENDS = (Column("CLIENT", elastic=True, least=8), Column("SERVER", elastic=True, least=8))
_PAIRS = (*_ENDS, Column("CONNS", "right"), Column("SPLICED", "right"), *_RATES)
_CONNECTIONS = (*_ENDS, Column("STATE"), Column("REASON", elastic=True, least=8), *_RATES)


def _make_epilog() -> str:
    columns = {
        "CLIENT, SERVER": "container, else service, pod, cgroup or process; of connections with the port",
        "CONNS": "open connections, without those that have hardly said anything",
        "SPLICED": "those of them that are spliced",
        "MSG/S": "messages a second of up to 32 KiB that were redirected, both ways; TCP knows no messages",
        "SPLICED/S": "bytes a second that were redirected, both ways",
        "TCP/S": "bytes a second that TCP has carried, both ways; of single connections of the first 1 000 "
        "that are not spliced",
        "STATE, REASON": "as splicer flows has them",
    }
    keys = {
        "q": "quit",
        "c": "connections instead of pairs, and back",
        "b": "sort by bytes, redirected and through TCP",
        "r, t": "sort by bytes redirected, or through TCP",
        "m, n": "sort by messages, or by the number of connections",
        "space": "look now",
    }
    return f"""\
columns:
{legend(columns)}

keys:
{legend(keys)}

examples:
  splicer top
  splicer top --connections --sort messages
  splicer top --batch -n 1                # once
  splicer top --json -n 10 | jq '.total.redirected_bytes_per_second'

exit codes:
  0 done, 1 failure, 2 usage, 3 not running, 130 interrupted"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer top`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    parser.add_argument(
        "--interval", metavar="SECONDS", help=f"time between two looks (default: {INTERVAL_S:g})"
    )
    parser.add_argument("-n", "--count", metavar="COUNT", help="end after so many tables or objects")
    parser.add_argument("--batch", action="store_true", help="tables, also on a terminal")
    parser.add_argument(
        "--connections", action="store_true", help="the busiest connections, not pairs of parties"
    )
    parser.add_argument(
        "--sort",
        choices=TOP_KEYS,
        default="bytes",
        metavar="KEY",
        help=f"{', '.join(TOP_KEYS)} (default: bytes)",
    )
    parser.add_argument(
        "--limit", metavar="N", help=f"so many rows at most (default: {_ROWS}; as many as fit on a screen)"
    )
    parser.add_argument("--json", action="store_true", help='one JSON object with "schema": 1 a look')
    options.add_run_dir(parser)
    options.add_config(parser)


@dataclass(frozen=True)
class View:
    """What is wanted."""

    run_dir: str
    sort: str = "bytes"
    connections: bool = False
    limit: int = _ROWS

    def ask(self) -> dict[str, object]:
        """What the daemon says. Raises SplicerError."""
        wanted = min(self.limit, _MOST_CONNECTIONS) if self.connections else 0
        return ask(self.run_dir, "top", {"sort": self.sort, "connections": wanted})


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Show rates until somebody has seen enough."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    interval = _read_interval(arguments.interval)
    count = options.read_whole(arguments.count, "-n", 1, _MOST_ROUNDS)
    limit = options.read_whole(arguments.limit, "--limit", 1, _MOST_ROUNDS)
    view = View(settings.run_dir, arguments.sort, arguments.connections, limit or _ROWS)
    is_plain = arguments.batch or arguments.json or not screen.is_possible(context.stdout, context.environ)
    if not is_plain:
        _show(view, interval, count, limit)
        return OK
    for index, answer in enumerate(_look(view, interval, count)):
        if arguments.json:
            context.write_json(answer)
        else:
            width = terminal_width(context.stdout)
            context.write([*([""] if index else []), *render(answer, view, width=width)])
        context.stdout.flush()
    return OK


def _read_interval(given: str | None) -> float:
    if given is None:
        return INTERVAL_S
    return float(str(options.read_value(seconds_from(0.5, _LONGEST_S), given, "--interval")))


def _look(view: View, interval: float, count: int | None) -> Iterator[dict[str, object]]:
    """What the daemon says, with rates: its first look has none."""
    if not has_rates(answer := view.ask(), view):
        time.sleep(min(_FIRST_S, interval))
        answer = view.ask()
    for index in itertools.count() if count is None else range(count):
        if index:
            time.sleep(interval)
            answer = view.ask()
        yield answer


def has_rates(answer: Mapping[str, object], view: View) -> bool:
    """Has the daemon looked before, at what is wanted?"""
    return seconds(answer, "seconds") > 0 and (not view.connections or answer.get("compared") is True)


# -- the screen --------------------------------------------------------------------------------------------


def _show(view: View, interval: float, count: int | None, limit: int | None) -> None:
    shown = 0
    # A daemon that does not run is said on the terminal as it is.
    answer = view.ask()
    with screen.opened() as terminal:
        while True:
            height, width = terminal.size
            view = replace(view, limit=limit or max(height, 1))
            lines = render(answer, view, width=width)
            terminal.show(lines, heading=2, footer=_FOOTER)
            shown += has_rates(answer, view)
            if count is not None and shown > count:
                return
            until = time.monotonic() + (interval if has_rates(answer, view) else min(_FIRST_S, interval))
            key = ""
            while key in ("", screen.RESIZED) and (left := until - time.monotonic()) > 0:
                key = terminal.read_key(left)
                if key == screen.RESIZED:
                    height, width = terminal.size
                    terminal.show(render(answer, view, width=width), heading=2, footer=_FOOTER)
            if key in ("q", "Q"):
                return
            view = turn(view, key)
            answer = view.ask()


def turn(view: View, key: str) -> View:
    """The view after a key was pressed."""
    if key == "c":
        return replace(view, connections=not view.connections)
    return replace(view, sort=_KEYS.get(key, view.sort))


# -- as lines ----------------------------------------------------------------------------------------------


def render(answer: Mapping[str, object], view: View, *, width: int | None = None) -> list[str]:
    """Two lines about all of it, and a table. `width` in characters, None for as wide as it takes."""
    total = section(answer, "total")
    if not has_rates(answer, view):
        return ["Looking: the first rates are there in a second.", ""]
    span = human_age(seconds(answer, "seconds"))
    known = plural(number(total, "connections"), "connection")
    lines = [
        f"{_spell_rate(total, 'redirected_bytes')} redirected, "
        f"{_spell_rate(total, 'plain_bytes')} through TCP; "
        f"{known}, {human_count(number(total, 'spliced'))} spliced",
        f"over {span}, by {view.sort}",
    ]
    rows = sections(answer, "connections" if view.connections else "pairs")
    if view.connections:
        listed = [_list_connection(row) for row in rows[: view.limit]]
        lines += table(_CONNECTIONS, listed, width=width)
        if not rows:
            lines.append("Nothing was sent.")
    else:
        listed = [_list_pair(row) for row in rows[: view.limit]]
        lines += table(_PAIRS, listed, width=width)
        if more := len(rows) - len(listed):
            lines.append(f"and {plural(more, 'more pair')}")
    return lines if width is None else [line[:width] for line in lines]


def _list_pair(row: Mapping[str, object]) -> list[str]:
    return [
        *_name_ends(row),
        human_count(number(row, "connections")),
        human_count(number(row, "spliced")),
        *_list_rates(row),
    ]


def _list_connection(row: Mapping[str, object]) -> list[str]:
    ends = zip(_name_ends(row), (text(row, "local"), text(row, "remote")), strict=True)
    named = [f"{name}:{address.rpartition(':')[2]}" if name != "?" else address for name, address in ends]
    return [*named, text(row, "state"), text(row, "reason"), *_list_rates(row)]


def _name_ends(row: Mapping[str, object]) -> Sequence[str]:
    return [name_owner(section(row, end)) or "?" for end in ("client", "server")]


def _list_rates(row: Mapping[str, object]) -> list[str]:
    return [
        human_count(round(seconds(row, "redirected_messages_per_second"))),
        human_bytes(round(seconds(row, "redirected_bytes_per_second"))),
        human_bytes(round(seconds(row, "plain_bytes_per_second"))),
    ]


def _spell_rate(row: Mapping[str, object], key: str) -> str:
    return f"{human_bytes(round(seconds(row, f'{key}_per_second')))}/s"
