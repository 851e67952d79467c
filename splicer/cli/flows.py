# SPDX-License-Identifier: Apache-2.0
"""`splicer flows`: which connections are spliced, and why the others are not."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence, Set

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

from . import options
from .context import Context
from .query import ask, number, seconds, text

SUMMARY = "list local connections, and why each is spliced or not"

DESCRIPTION = """\
List the connections with both ends on this host, one row for each: spliced
ones first, then by bytes. Connections to other hosts are never followed and
never shown."""

STATE_NAMES = tuple(STATES.values())

_STATE_STYLES = {"spliced": "green", "draining": "yellow"}
_STATE_ORDER = {"spliced": 0, "draining": 1, "paired": 2}
_COLUMNS = (
    Column("LOCAL", elastic=True, least=11),
    Column("REMOTE", elastic=True, least=11),
    Column("STATE"),
    Column("REASON"),
    Column("MESSAGES", "right"),
    Column("BYTES", "right"),
    Column("AGE", "right"),
)


def _make_epilog() -> str:
    columns = {
        "LOCAL": "the client's own address and port",
        "REMOTE": "what the client connected to; under DNAT the server's own is another (JSON: peer)",
        "STATE": "see below",
        "REASON": "why it is not spliced; empty when it is",
        "MESSAGES": "messages redirected since pairing, both directions",
        "BYTES": "bytes redirected since pairing, both directions",
        "AGE": "time since pairing",
    }
    states = {
        "paired": "both ends are on this host and known; plain TCP",
        "spliced": "messages go straight from socket to socket",
        "draining": "on its way back to plain TCP: new messages go through TCP already",
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
  splicer flows --state paired            # what is not spliced, and why
  splicer flows --port 8080 --port 6379
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
    options.add_json(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's flows."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    states = frozenset(arguments.state or ())
    ports = frozenset(_read_port(given) for given in arguments.port or ())
    answer = ask(settings.run_dir, "flows")
    listed = answer.get("flows")
    known = [flow for flow in listed if isinstance(flow, dict)] if isinstance(listed, list) else []
    chosen = select(known, states, ports)
    if arguments.json:
        context.write_json({**answer, "flows": chosen})
    elif chosen:
        context.write(render(chosen, palette=context.palette, width=terminal_width(context.stdout)))
    elif known:
        context.write([f"No flow matches ({plural(len(known), 'flow')} without the filters)."])
    else:
        context.write(
            ["No local connections. Those to other hosts are not listed; splicer status says more."]
        )
    return OK


def _read_port(given: str) -> int:
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= 65535):
        raise SplicerError(
            f"bad value for --port: {printable(given)}",
            hint="accepted: a whole number from 1 to 65535",
            exit_code=USAGE,
        )
    return int(given)


def select(
    flows: Sequence[Mapping[str, object]], states: Collection[str], ports: Set[int]
) -> list[Mapping[str, object]]:
    """The flows in one of `states` with one of `ports` at either end; empty filters let all through."""
    return [
        flow
        for flow in flows
        if (not states or flow.get("state") in states) and (not ports or not ports.isdisjoint(_ports(flow)))
    ]


def _ports(flow: Mapping[str, object]) -> set[int]:
    tails = (text(flow, key).rpartition(":")[2] for key in ("local", "remote", "peer"))
    return {int(tail) for tail in tails if tail.isascii() and tail.isdigit()}


def render(
    flows: Sequence[Mapping[str, object]], *, palette: Palette = PLAIN, width: int | None = None
) -> list[str]:
    """The flows for people. `width` in characters, None for as wide as it takes."""

    def rank(flow: Mapping[str, object]) -> tuple[int, int, str]:
        order = _STATE_ORDER.get(text(flow, "state"), len(_STATE_ORDER))
        return order, -number(flow, "redirected_bytes"), text(flow, "local")

    rows = [
        (
            text(flow, "local"),
            text(flow, "remote"),
            Cell(text(flow, "state"), _STATE_STYLES.get(text(flow, "state"))),
            text(flow, "reason"),
            human_count(number(flow, "redirected_messages")),
            human_bytes(number(flow, "redirected_bytes")),
            human_age(seconds(flow, "age_seconds")),
        )
        for flow in sorted(flows, key=rank)
    ]
    return table(_COLUMNS, rows, width=width, palette=palette)
