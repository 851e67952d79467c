# SPDX-License-Identifier: Apache-2.0
"""`splicer flows`: which connections are spliced, and why the others are not."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from splicer.errors import OK, USAGE, SplicerError
from splicer.model import REASONS, STATES
from splicer.text import (
    PLAIN,
    Cell,
    Column,
    Palette,
    human_age,
    human_bytes,
    human_count,
    legend,
    plural,
    printable,
    table,
    terminal_width,
)

from . import grouping, options
from .context import Context
from .grouping import SORT_KEYS, STATE_STYLES
from .owners import FILTERS, describe_owner, matches, name_owner
from .query import ask_rows, number, seconds, section, text

DESCRIPTION = """\
List the connections with both ends on this host, one row for each: spliced
ones first, then by bytes. Of many, a summary comes first: how many between
whom, in which state and why. Connections to other hosts are never followed and
never shown. On a narrow terminal names stand in the place of addresses."""

STATE_NAMES = tuple(dict.fromkeys(STATES.values()))

LIMIT = 100
"""So many rows are shown to people who do not say how many; above them stands a summary."""
_ADDRESSES = (Column("LOCAL", elastic=True, least=11), Column("REMOTE", elastic=True, least=11))
_NAMED_ENDS = (Column("CLIENT", elastic=True, least=11), Column("SERVER", elastic=True, least=11))
# Beside names addresses are shown if most of both can be read.
_NAMES_AND_ADDRESSES = (
    Column("CLIENT", elastic=True, least=14),
    Column("SERVER", elastic=True, least=14),
    Column("LOCAL", elastic=True, least=15),
    Column("REMOTE", elastic=True, least=15),
)
_MESSAGES = Column("MESSAGES", "right")
_REST = (
    Column("STATE"),
    Column("REASON"),
    _MESSAGES,
    Column("BYTES", "right"),
    Column("AGE", "right"),
)
_UNREAD = (Column("CLIENT-UNREAD", "right"), Column("SERVER-UNREAD", "right"))


def _make_epilog() -> str:
    columns = {
        "CLIENT, SERVER": "container, else service, pod, cgroup, process; with --wide the process and its "
        "pid too; with the port where there is no room for addresses",
        "LOCAL": "the client's own address and port",
        "REMOTE": "what the client connected to; under DNAT the server's own is another (JSON: peer)",
        "STATE": "see below",
        "REASON": "why it is not spliced; empty when it is",
        "MESSAGES": "messages of up to 32 KiB redirected since pairing, both ways; not on a narrow terminal",
        "BYTES": "bytes redirected since pairing, both directions",
        "AGE": "time since pairing",
        "CLIENT-UNREAD, SERVER-UNREAD": "with --wide: bytes that wait to be read there, redirected ones and, "
        "marked so, those that came through TCP; only of what is spliced or draining",
    }
    states = {
        "paired": "both ends are on this host and known; plain TCP",
        "spliced": "messages go straight from socket to socket",
        "draining": "on its way back to plain TCP, as soon as what was redirected has been read",
    }
    return f"""\
columns:
{legend(columns)}

states:
{legend(states)}

reasons:
{legend(REASONS)}

examples:
  splicer flows
  splicer flows --summary                 # of thousands
  splicer flows --sort bytes --limit 10
  splicer flows --state paired            # what is not spliced, and why
  splicer flows --port 8080 --port 6379
  splicer flows --container 'demo-*' --wide
  splicer flows --json | jq '.flows[] | select(.reason == "splice_reader")'

exit codes:
  0 done, also when the list is empty; 1 failure, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer flows`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    parser.add_argument(
        "--state",
        action="append",
        choices=STATE_NAMES,
        metavar="STATE",
        help=f"only flows in this state: {', '.join(STATE_NAMES)}; may be repeated",
    )
    parser.add_argument(
        "--port",
        action="append",
        metavar="PORT",
        help="only flows with this port at either end, DNATed or not; may be repeated",
    )
    for name, what in zip(FILTERS, ("container", "compose service", "process"), strict=True):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="NAME",
            help=f"only flows with this {what} at either end, a name or a pattern such as 'web-*'; "
            "may be repeated",
        )
    parser.add_argument(
        "--sort",
        choices=SORT_KEYS,
        default="state",
        metavar="KEY",
        help=f"{', '.join(SORT_KEYS)} (default: state)",
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        help=f"so many rows at most, 0 for all (default: {LIMIT}; all with --json)",
    )
    parser.add_argument("--summary", action="store_true", help="nothing but the summary")
    parser.add_argument(
        "--wide", action="store_true", help="names, processes and addresses in full, however wide that is"
    )
    options.add_asking(parser, patient=True)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's flows."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    states = frozenset(arguments.state or ())
    ports = frozenset(read_port(given) for given in arguments.port or ())
    names = {name: given for name in FILTERS if (given := getattr(arguments, name))}
    # 0 is all.
    limit = options.read_whole(arguments.limit, "--limit", 0, 1_000_000)
    patience = options.read_timeout(arguments)
    # What waits unread is counted socket by socket, for those who see it.
    unread = {"unread": arguments.wide or arguments.json}
    answer, rows = ask_rows(settings.run_dir, "flows", "flows", unread, patience=patience)
    if arguments.json:
        # As the daemon gives them, unless somebody wants another order.
        ordered: Iterable[Mapping[str, object]] = choose(rows, states, ports, names)
        if arguments.sort != "state":
            ordered = grouping.sort(list(ordered), arguments.sort)
        context.write_json_rows(answer, "flows", itertools.islice(ordered, limit or None))
        return OK
    known = 0

    def count() -> Iterator[Mapping[str, object]]:
        nonlocal known
        for row in rows:
            known += 1
            yield row

    chosen = select(count(), states, ports, names)
    width = terminal_width(context.stdout)
    if chosen and arguments.summary:
        context.write(grouping.summarise(chosen, palette=context.palette, width=width))
    elif chosen:
        shown = grouping.sort(chosen, arguments.sort)[: LIMIT if limit is None else limit or None]
        if more := len(chosen) - len(shown):
            context.write([*grouping.summarise(chosen, palette=context.palette, width=width), ""])
        context.write(
            render(shown, palette=context.palette, width=width, wide=arguments.wide, sort=arguments.sort)
        )
        if more:
            said = f"and {plural(more, 'more connection')}: splicer flows --limit 0, or choose some (--help)"
            context.write([context.palette.paint(said, "dim")])
    elif known:
        context.write([f"No flow matches ({plural(known, 'flow')} without the filters)."])
    else:
        context.write(
            ["No local connections. Those to other hosts are not listed; splicer status says more."]
        )
    return OK


def read_port(given: str) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= 65535):
        raise SplicerError(
            f"bad value for --port: {printable(given)}",
            hint="accepted: a whole number from 1 to 65535",
            exit_code=USAGE,
        )
    return int(given)


def select(
    flows: Iterable[Mapping[str, object]],
    states: Collection[str],
    ports: Set[int],
    names: Mapping[str, Collection[str]] | None = None,
) -> list[Mapping[str, object]]:
    """The flows that pass every filter, as `choose` finds them."""
    return list(choose(flows, states, ports, names))


def choose(
    flows: Iterable[Mapping[str, object]],
    states: Collection[str],
    ports: Set[int],
    names: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Mapping[str, object]]:
    """The flows that pass every filter, one by one; empty filters let all through.

    In one of `states`, with one of `ports` at either end, and for each key of `names` with one of its
    patterns at either end.
    """

    def passes(flow: Mapping[str, object]) -> bool:
        ends = (section(flow, "client"), section(flow, "server"))
        return (
            (not states or flow.get("state") in states)
            and (not ports or not ports.isdisjoint(_ports(flow)))
            and all(
                any(matches(end, key, patterns) for end in ends) for key, patterns in (names or {}).items()
            )
        )

    return filter(passes, flows)


def _ports(flow: Mapping[str, object]) -> set[int]:
    tails = (text(flow, key).rpartition(":")[2] for key in ("local", "remote", "peer"))
    return {int(tail) for tail in tails if tail.isascii() and tail.isdigit()}


def render(
    flows: Sequence[Mapping[str, object]],
    *,
    palette: Palette = PLAIN,
    width: int | None = None,
    wide: bool = False,
    sort: str = "state",
) -> list[str]:
    """The flows for people, in the order of `sort` (one of SORT_KEYS). `width` in characters, None for as
    wide as it takes; `wide` overrides it."""
    ordered = grouping.sort(flows, sort)
    addresses = [[text(flow, "local"), text(flow, "remote")] for flow in ordered]
    owners = [(section(flow, "client"), section(flow, "server")) for flow in ordered]
    names = [[name_owner(owner) for owner in pair] for pair in owners]
    rests = [_list_rest(flow) for flow in ordered]
    if wide:
        described = [[describe_owner(owner) for owner in pair] for pair in owners]
        rows = [[*who, *where, *rest] for who, where, rest in zip(described, addresses, rests, strict=True)]
        rows = [[*row, *_list_unread(flow)] for row, flow in zip(rows, ordered, strict=True)]
        return table((*_NAMES_AND_ADDRESSES, *_REST, *_UNREAD), rows, palette=palette)
    if not any(map(any, names)):
        rows = [[*where, *rest] for where, rest in zip(addresses, rests, strict=True)]
        return table((*_ADDRESSES, *_REST), rows, width=width, palette=palette)
    rows = [[*who, *where, *rest] for who, where, rest in zip(names, addresses, rests, strict=True)]
    if width is None or _fits((*_NAMES_AND_ADDRESSES, *_REST), rows, width):
        return table((*_NAMES_AND_ADDRESSES, *_REST), rows, width=width, palette=palette)
    rows = [
        [*map(_name_end, who, where), *rest] for who, where, rest in zip(names, addresses, rests, strict=True)
    ]
    columns: Sequence[Column] = (*_NAMED_ENDS, *_REST)
    if max(map(len, table(columns, rows))) > width:
        # Bytes say nearly the same, and names want the room.
        dropped = columns.index(_MESSAGES)
        columns = (*columns[:dropped], *columns[dropped + 1 :])
        rows = [[*row[:dropped], *row[dropped + 1 :]] for row in rows]
    return table(columns, rows, width=width, palette=palette)


def _list_rest(flow: Mapping[str, object]) -> list[str | Cell]:
    return [
        Cell(text(flow, "state"), STATE_STYLES.get(text(flow, "state"))),
        text(flow, "reason"),
        human_count(number(flow, "redirected_messages")),
        human_bytes(number(flow, "redirected_bytes")),
        human_age(seconds(flow, "age_seconds")),
    ]


def _list_unread(flow: Mapping[str, object]) -> list[str | Cell]:
    """What waits at the client, and at the server."""
    found: list[str | Cell] = []
    for end in ("client_unread", "server_unread"):
        unread = section(flow, end)
        redirected, through_tcp = number(unread, "redirected_bytes"), number(unread, "tcp_bytes")
        words = [human_bytes(redirected)] if redirected or not through_tcp else []
        words += [f"{human_bytes(through_tcp)} TCP"] if through_tcp else []
        found.append(" + ".join(words) if unread else "-")
    return found


def _fits(columns: Sequence[Column], rows: Sequence[Sequence[str | Cell]], width: int) -> bool:
    return max(map(len, table(columns, rows, width=width))) <= width


def _name_end(name: str, address: str) -> str:
    """The name in the place of the host, if there is one: web-1:8080."""
    return f"{name}:{address.rpartition(':')[2]}" if name else address
