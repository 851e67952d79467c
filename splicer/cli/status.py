# SPDX-License-Identifier: Apache-2.0
"""`splicer status`: is it running, and does it help?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from splicer.errors import FAILURE, NOT_RUNNING, OK, SplicerError
from splicer.model import REASONS, SCHEMA
from splicer.policy.config import Settings
from splicer.text import (
    PLAIN,
    Cell,
    Column,
    Palette,
    human_age,
    human_bytes,
    human_count,
    plural,
    printable,
    table,
    terminal_width,
    two_columns,
)

from . import leftovers, options
from .context import Context
from .coverage import headline, list_notes, list_plain
from .owners import name_party
from .query import ask, number, seconds, section, sections, text, texts

DESCRIPTION = """\
Say whether splicer is running and what it has done. The first line is the
answer in words, the next how much of the local traffic is redirected. Totals
count from when the programs were loaded and survive a restart of the daemon.
With --brief the first line is all, and the exit code says whether all is well:
for health checks."""

EPILOG = """\
plain:
  who talks to whom in the bytes that are not redirected, why, and what would
  change it; the largest first. They are those that TCP has carried both ways,
  without what its headers take. A connection's count for the reason that it
  has now, or had when it was closed; the dash is for those of connections that
  are spliced by now. splicer advise says what to do

docker:
  connected   containers are followed as they come and go
  absent      no container engine was found; it is looked for again
  lost        the engine does not answer; what was known of the containers holds
  off         --docker off

kernel:
  class A   does not count redirected bytes in its answer to FIONREAD
  class B   does not count bytes that came through TCP
  class C   counts both
  answered  splicer puts the answer right, and applications see class C

older:
  connections that were there before splicer are looked for once, when its
  programs are loaded. What is found is spliced like any other once both ends
  read. What is between namespaces that no process is in is not found

totals:
  paired      connections found to have both ends on this host
  spliced     times a connection was spliced
  drained     times a spliced connection went back to plain TCP
  redirected  what went from socket to socket, past TCP and the network devices
  passed      messages of such connections that went through TCP
  rescued     connections taken back because bytes waited unread
  refused     connections left plain, by reason; see splicer flows --help
  traffic     what was redirected between whom, the largest first; all of it
              with --json

neighbours:
  others that use BPF at the hooks that splicer uses, each with its program, the
  program's id, and where it is: a cgroup, a map with its id, or a network
  namespace by its number in /proc. docs/operations.md says what each means

examples:
  splicer status
  splicer status --brief                # HEALTHCHECK CMD in a Dockerfile
  splicer status --json | jq .connections.spliced

exit codes:
  0 running, 1 failure, 2 usage, 3 not running; --json then prints
  {"schema":1,"running":false,"loaded":false}, or "loaded":true if programs of
  an earlier run are still in the kernel. With --brief: 0 healthy, 1 running but
  not healthy or no answer within 1.5 seconds, 3 not running"""


_TRAFFIC_ROWS = 10
_NEIGHBOUR_ROWS = 10
_FIONREAD = {"splicer": ", FIONREAD answered", "nobody": ", FIONREAD not answered; see the log"}


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer status`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--brief", action="store_true", help="one line, and in the exit code whether all is well"
    )
    options.add_json(form)
    options.add_timeout(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's status."""
    settings = options.resolve_settings(arguments, context, only=("run_dir", "pin_dir")).settings
    if arguments.brief:
        return _check_health(settings, context, options.read_timeout(arguments))
    try:
        patience = options.read_timeout(arguments)
        asked = {"neighbours": True, "coverage": True}
        status = ask(settings.run_dir, "status", asked, patience=patience)
    except SplicerError as error:
        if error.exit_code != NOT_RUNNING:
            raise
        if arguments.json:
            loaded = leftovers.are_loaded(settings.pin_dir)
            context.write_json({"schema": SCHEMA, "running": False, "loaded": loaded})
            return NOT_RUNNING
        raise
    if arguments.json:
        context.write_json(status)
    else:
        context.write(render(status, palette=context.palette, width=terminal_width(context.stdout)))
    return OK


def _check_health(settings: Settings, context: Context, patience: float) -> int:
    try:
        status = ask(settings.run_dir, "status", patience=patience)
    except SplicerError as error:
        # The answer to the question, and not a failure to answer it: one line, where data goes.
        context.write([printable(leftovers.mention(error, settings.pin_dir).message)])
        return error.exit_code
    context.write([verdict(status, context.palette)])
    return OK if _is_healthy(status) else FAILURE


def _is_healthy(status: Mapping[str, object]) -> bool:
    return status.get("healthy") is not False


def render(status: Mapping[str, object], *, palette: Palette = PLAIN, width: int | None = None) -> list[str]:
    """The status for people."""
    totals = section(status, "totals")
    switched = {"on": ", for everything local", "off": ", for what is switched on (splicer policy)"}
    about = [
        ("mode", text(status, "mode") + switched.get(text(status, "default"), "")),
        ("cgroup", text(status, "cgroup")),
        ("pid", str(number(status, "pid"))),
        ("version", text(status, "version")),
    ]
    if kernel_class := text(status, "kernel_class"):
        about.append(("kernel", f"class {kernel_class}{_FIONREAD.get(text(status, 'fionread'), '')}"))
    if text(status, "adoption") == "walk":
        about.append(
            ("adoption", "by walk, late and dear: the kernel runs no tc program for us; see the log")
        )
    if text(status, "blocking_readers") == "refused":
        about.append(("blocking", "all refused: no way to tell on this kernel who sleeps; see the log"))
    if text(section(status, "networks"), "state") == "unavailable":
        about.append(("networks", "not watched: what is spliced outlives its network; see the log"))
    if text(section(status, "leases"), "state") == "forbidden":
        about.append(("leases", "not kept: conntrack and IPVS may forget what is spliced; see the log"))
    if docker := section(status, "docker"):
        about.append(("docker", describe_docker(docker)))
    if census := section(status, "census"):
        about.append(("older", describe_census(census)))
    if uptime := seconds(status, "uptime_seconds"):
        about.append(("uptime", human_age(uptime)))
    messages = plural(number(totals, "redirected_messages"), "message")
    done = [
        ("paired", human_count(number(totals, "paired"))),
        ("spliced", human_count(number(totals, "spliced"))),
        ("drained", human_count(number(totals, "drained"))),
        ("redirected", f"{human_bytes(number(totals, 'redirected_bytes'))} in {messages}"),
        ("passed", f"{plural(number(totals, 'passed_messages'), 'message')} through TCP"),
        ("rescued", human_count(number(totals, "rescued"))),
    ]
    lines = [verdict(status, palette), *_lead_with_coverage(section(status, "coverage"), width, palette)]
    lines += ["", *two_columns(about, palette=palette)]
    lines += ["", palette.paint("Totals", "bold"), *two_columns(done, palette=palette)]
    lines += _list_refused(section(totals, "refused"), width, palette)
    lines += _list_traffic(sections(status, "traffic"), width, palette)
    lines += _list_neighbours(section(status, "neighbours"), width, palette)
    return lines + _list_problems(sections(status, "problems"), width, palette)


def _lead_with_coverage(coverage: Mapping[str, object], width: int | None, palette: Palette) -> list[str]:
    if not coverage:
        return []
    plain = list_plain(coverage, width=width, palette=palette)
    return [headline(coverage, palette), *list_notes(coverage), *(["", *plain] if plain else [])]


def _list_refused(refused: Mapping[str, object], width: int | None, palette: Palette) -> list[str]:
    counts = {name: number(refused, name) for name in refused if number(refused, name)}
    columns = (Column("REFUSED"), Column("COUNT", "right"), Column("BECAUSE", elastic=True, least=30))
    rows = [
        (
            name,
            human_count(count),
            REASONS.get(name, "(a reason this version of the command does not know)"),
        )
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return ["", *table(columns, rows, width=width, palette=palette)] if rows else []


def _list_traffic(traffic: Sequence[Mapping[str, object]], width: int | None, palette: Palette) -> list[str]:
    columns = (
        Column("CLIENT", elastic=True),
        Column("SERVER", elastic=True),
        Column("CONNECTIONS", "right"),
        Column("MESSAGES", "right"),
        Column("BYTES", "right"),
    )
    rows = [
        (
            name_party(section(row, "client")) or "?",
            name_party(section(row, "server")) or "?",
            human_count(number(row, "connections")),
            human_count(number(row, "redirected_messages")),
            human_bytes(number(row, "redirected_bytes")),
        )
        for row in traffic[:_TRAFFIC_ROWS]
    ]
    if not rows:
        return []
    more = len(traffic) - len(rows)
    return [
        "",
        *table(columns, rows, width=width, palette=palette),
        *([palette.paint(f"and {plural(more, 'more row')}: splicer status --json", "dim")] if more else []),
    ]


def _list_neighbours(neighbours: Mapping[str, object], width: int | None, palette: Palette) -> list[str]:
    columns = (
        Column("HOOK"),
        Column("PROGRAM"),
        Column("ID", "right"),
        Column("AT", elastic=True, least=12),
        Column("NEIGHBOUR", elastic=True, least=22),
    )
    others = sections(neighbours, "others")
    rows = [
        (
            text(each, "hook"),
            text(each, "program") or "-",
            str(number(each, "id") or "-"),
            _name_place(each),
            text(each, "meaning"),
        )
        for each in others[:_NEIGHBOUR_ROWS]
    ]
    lines = ["", *table(columns, rows, width=width, palette=palette)] if rows else []
    if (more := len(others) - len(rows)) > 0:
        lines.append(palette.paint(f"and {plural(more, 'more row')}: splicer status --json", "dim"))
    unknown = [f"Not known of neighbours: {printable(each)}" for each in texts(neighbours, "unknown")]
    return lines + (["", *unknown] if unknown else [])


def _name_place(neighbour: Mapping[str, object]) -> str:
    """A path, a map with its id, or a network namespace."""
    where = text(neighbour, "where")
    return f"{where} ({number(neighbour, 'where_id')})" if text(neighbour, "place") == "map" else where


def _list_problems(
    problems: Sequence[Mapping[str, object]], width: int | None, palette: Palette
) -> list[str]:
    columns = (
        Column("CONTAINER", elastic=True),
        Column("BAD LABEL", elastic=True),
        Column("VALUE", elastic=True, least=8),
        Column("ACCEPTED", elastic=True, least=20),
        *((Column("DID YOU MEAN", elastic=True),) if any(text(each, "meant") for each in problems) else ()),
    )
    rows = [
        (
            text(problem, "container"),
            Cell(text(problem, "label"), "yellow"),
            f'"{text(problem, "value")}"',
            text(problem, "accepted"),
            text(problem, "meant"),
        )[: len(columns)]
        for problem in problems
    ]
    return ["", *table(columns, rows, width=width, palette=palette)] if rows else []


def describe_docker(docker: Mapping[str, object]) -> str:
    """The connection to the container engine, in words."""
    state, endpoint, error = text(docker, "state"), text(docker, "endpoint"), text(docker, "error")
    where = f" ({endpoint})" if endpoint else ""
    because = f": {error}" if error else ""
    if state == "connected":
        return f"connected{where}, {plural(number(docker, 'containers'), 'container')}"
    if state == "absent":
        return f"no container engine found{because or where}"
    if state == "lost":
        since = human_age(seconds(docker, "since_seconds"))
        return f"lost {since} ago{where}{because}; what was known of containers holds"
    if state == "off":
        return "off (--docker off)"
    return f"{state or 'unknown'}{where}{because}"


# What keeps a connection from being followed that is older than splicer and has both ends on this host.
_CENSUS_REASONS = {
    "ambiguous": "whose name a third socket has as well",
    "outside": "with an end outside of the cgroup",
    "repaired": "under TCP_REPAIR",
    "closed": "closed meanwhile",
    "map_full": "beyond --max-connections",
    "unmarked": "since this kernel cannot (Linux 6.12 and newer can)",
}
_NO_CENSUS = {
    "running": "are being looked for",
    "off": "are left alone (--no-census)",
    "earlier": "were looked for when the programs were loaded",
    "unavailable": "cannot be looked for: the kernel refused the census program; see the log",
    "failed": "could not be looked for; see the log",
}


def describe_census(census: Mapping[str, object]) -> str:
    """What became of the connections that are older than splicer, in words."""
    state = text(census, "state")
    if state != "done":
        return "connections older than splicer " + _NO_CENSUS.get(state, state or "unknown")
    words = f"{plural(number(census, 'found'), 'connection')} older than splicer found"
    left = section(census, "left")
    if left:
        listed = [f"{human_count(number(left, name))} {_CENSUS_REASONS.get(name, name)}" for name in left]
        words += f"; not followed: {', '.join(listed)}"
    if held_up := number(census, "held_up"):
        words += f"; {plural(held_up, 'namespace')} could not be visited"
    return words


def verdict(status: Mapping[str, object], palette: Palette = PLAIN) -> str:
    """One line: does splicer do anything for this host?"""
    if not _is_healthy(status):
        trouble = text(status, "trouble") or "see the daemon's log"
        return palette.paint("Running, but not healthy", "red") + f": {printable(trouble)}."
    if hold := section(status, "hold"):
        names = texts(hold, "containers")
        what = ", ".join(map(printable, names)) if names else "everything"
        left = human_age(seconds(hold, "seconds"))
        return palette.paint("Running", "green") + f": a measurement keeps {what} plain, for {left} at most."
    if failed := text(section(status, "reload"), "failed"):
        since = human_age(seconds(section(status, "reload"), "since_seconds"))
        said = f": those before hold, since a reload failed {since} ago: {printable(failed)}. "
        return palette.paint("Running on old settings", "yellow") + said + _describe_activity(status, palette)
    return _describe_activity(status, palette)


def _describe_activity(status: Mapping[str, object], palette: Palette) -> str:
    connections = section(status, "connections")
    paired, spliced, draining = (number(connections, state) for state in ("paired", "spliced", "draining"))
    if paused := section(status, "paused"):
        back = spliced + draining
        tail = f" ({human_count(back)} going back to TCP)" if back else ""
        age = human_age(seconds(paused, "since_seconds"))
        return (
            palette.paint("Paused", "yellow")
            + f" since {age}{tail}: nothing is spliced until splicer resume."
        )
    if spliced:
        others = [f"{human_count(paired)} local but not spliced"] if paired else []
        others += [f"{human_count(draining)} going back to TCP"] if draining else []
        tail = f" ({', '.join(others)})" if others else ""
        return palette.paint("Running", "green") + f": {plural(spliced, 'connection')} spliced{tail}."
    if paired or draining:
        local = plural(paired + draining, "local connection")
        return palette.paint("Running", "green") + f": {local}, none spliced now; splicer flows says why."
    if text(status, "default") == "off":
        switched = "no local connection of what is switched on (splicer policy) right now."
        return palette.paint("Running", "green") + f": {switched}"
    older = section(status, "census")
    if text(older, "state") in ("running", "off", "unavailable", "failed"):
        said = f": no local connections since it runs; {describe_census(older)}."
        return palette.paint("Running", "green") + said
    return palette.paint("Running", "green") + ": no local connections right now."
