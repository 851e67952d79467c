# SPDX-License-Identifier: Apache-2.0
"""`splicer policy`: what holds for whom, and who says so."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby

from splicer.errors import OK
from splicer.policy.labels import ENABLE, MODE, PORTS
from splicer.policy.overrides import CONTAINER
from splicer.policy.rules import SAYS, show_ports
from splicer.text import (
    PLAIN,
    Cell,
    Column,
    Palette,
    human_count,
    plural,
    printable,
    table,
    terminal_width,
    two_columns,
)

from . import options
from .context import Context
from .query import ask, number, section, sections, text, texts
from .status import describe_docker

DESCRIPTION = """\
Show the policy: of the host, of the configuration file's rules, and of each
running container. With a container (name, compose service, or the first
digits of its id): everything that is said about it, and what decides."""

EPILOG = """\
What is said about an end of a connection, the first that says something counts,
for mode, blocking and tcp_inq each by itself:
  1 override   splicer set, until splicer unset; the newest first
  2 labels     splicer.enable, splicer.mode, splicer.ports of its container
  3 rules      [[policy]] tables of the configuration file, in their order
A connection is off if either end is off; else what is said about the server's
end holds, else about the client's, else the host's: --mode with --default on,
off with --default off.

columns:
  MODE         of connections to and from the container whose other end says
               nothing
  BECAUSE      what decides it
  NOTE         ports that differ, labels with a mistake, and what else to know
  CONTAINERS   how many running ones the rule is about
  CONNECTIONS  how many local ones the rule is about, at either end

examples:
  splicer policy
  splicer policy demo-web-1
  splicer policy --json | jq -r '.containers[] | "\\(.name) \\(.mode)"'

exit codes:
  0 done, 1 failure or no such container, 2 usage, 3 not running"""

LABELS = (ENABLE, MODE, PORTS)
_MODE_STYLES = {"adaptive": "green", "eager": "green", "off": "yellow"}


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer policy`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("container", nargs="?", metavar="CONTAINER", help="name, compose service, or id")
    options.add_asking(parser, patient=True)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's policy."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    fields = {"container": arguments.container} if arguments.container is not None else {}
    answer = ask(settings.run_dir, "policy", fields, patience=options.read_timeout(arguments))
    if arguments.json:
        context.write_json(answer)
        return OK
    width = terminal_width(context.stdout)
    if arguments.container is None:
        context.write(render(answer, palette=context.palette, width=width))
        return OK
    for position, told in enumerate(sections(answer, "containers")):
        if position:
            context.write([""])
        context.write(render_container(told, palette=context.palette, width=width))
    return OK


def render(answer: Mapping[str, object], *, palette: Palette = PLAIN, width: int | None = None) -> list[str]:
    """The policy of the host and of everybody on it."""
    mode = printable(text(answer, "mode"))
    paused = "Paused: nothing is spliced until splicer resume. What follows holds from then on."
    if text(answer, "default") == "off":
        first = f"Only what is switched on is spliced (--default off), by itself in mode {mode}."
    else:
        first = f"Everything local is spliced in mode {mode}, where nothing else is said."
    says = {"allow": "spliced too", "refuse": "left alone"}
    blocking, tcp_inq = (says.get(text(answer, name), "?") for name in ("blocking", "tcp_inq"))
    lines = [
        *([palette.paint(paused, "yellow")] if answer.get("paused") is True else []),
        palette.paint(first, "bold"),
        f"Connections with blocking readers are {blocking}.",
        f"Connections that ask for TCP_INQ are {tcp_inq}.",
    ]
    lines += _list_overrides(sections(answer, "overrides"), width, palette)
    lines += _list_rules(sections(answer, "rules"), width, palette)
    containers = sections(answer, "containers")
    if not containers:
        docker = printable(describe_docker(section(answer, "docker")))
        return [*lines, "", f"No containers are known. Docker: {docker}."]
    columns = (
        Column("CONTAINER", elastic=True),
        Column("SERVICE", elastic=True, least=8),
        Column("MODE"),
        Column("BECAUSE", elastic=True, least=14),
        Column("NOTE", elastic=True, least=16),
    )
    rows = [
        (
            text(told, "name"),
            text(told, "service"),
            _paint_mode(text(told, "mode")),
            text(told, "mode_source"),
            "; ".join(_note(told)),
        )
        for told in containers
    ]
    return [*lines, "", *table(columns, rows, width=width, palette=palette)]


def _paint_mode(mode: str) -> Cell:
    return Cell(mode, _MODE_STYLES.get(mode))


def _list_overrides(
    overrides: Sequence[Mapping[str, object]], width: int | None, palette: Palette
) -> list[str]:
    columns = (
        Column("ABOUT", elastic=True, least=20),
        Column("MODE"),
        Column("TO TAKE IT BACK", elastic=True),
    )
    rows = []
    for each in overrides:
        kind, value = text(each, "kind"), text(each, "value")
        option = "" if kind == CONTAINER else f"--{kind} "
        undo = f"splicer unset {option}{shlex.quote(printable(value))}"
        rows.append((f"{kind} {value}", _paint_mode(text(each, "mode")), undo))
    if not rows:
        return []
    heading = palette.paint("Overrides (splicer set), the newest first", "bold")
    return ["", heading, *table(columns, rows, width=width, palette=palette)]


def _list_rules(rules: Sequence[Mapping[str, object]], width: int | None, palette: Palette) -> list[str]:
    columns = (
        Column("RULE", "right"),
        Column("ABOUT", elastic=True, least=20),
        Column("SAYS", elastic=True, least=16),
        Column("CONTAINERS", "right"),
        Column("CONNECTIONS", "right"),
    )
    lines: list[str] = []
    for file, group in groupby(rules, key=lambda rule: text(rule, "file")):
        rows = [
            (
                str(number(rule, "number")),
                _select(rule),
                _say(rule),
                _count(rule),
                human_count(number(rule, "connections")),
            )
            for rule in group
        ]
        heading = palette.paint(f"Rules of {printable(file)}", "bold")
        lines += ["", heading, *table(columns, rows, width=width, palette=palette)]
    if any(map(_needs_footnote, rules)):
        lines.append(palette.paint("* as adaptive for whatever is in no container", "dim"))
    return lines


def _select(rule: Mapping[str, object]) -> str:
    selectors = section(rule, "selectors")
    parts = [f"{name} {text(selectors, name)}" for name in selectors]
    if ports := _read_ports(rule):
        parts.append(f"{'port' if len(ports) == 1 else 'ports'} {show_ports(ports)}")
    return ", ".join(parts)


def _say(rule: Mapping[str, object]) -> str:
    said = ", ".join(f"{key} {text(rule, key)}" for key in SAYS if text(rule, key))
    if _needs_footnote(rule):
        said = said.replace("eager", "eager*", 1)
    return said


def _needs_footnote(rule: Mapping[str, object]) -> bool:
    # When the SYN comes its namespace tells whose it is, and that is known of containers only.
    places = {"cgroup", "cidr"} & section(rule, "selectors").keys()
    return text(rule, "mode") == "eager" and bool(places)


def _count(rule: Mapping[str, object]) -> str:
    return str(number(rule, "matches")) if section(rule, "selectors") else "any"


def _read_ports(rule: Mapping[str, object]) -> list[int]:
    ports = rule.get("ports")
    return [port for port in ports if isinstance(port, int)] if isinstance(ports, list) else []


def _note(told: Mapping[str, object]) -> list[str]:
    """Beginnings of what render_container says in full."""
    notes = [f"bad {text(problem, 'label')}" for problem in sections(told, "problems")]
    notes += [note.partition(":")[0].rstrip(".") for note in texts(told, "notes")]
    return notes + [f"{ports}: {says}" for ports, says, _ in _group_ports(told)]


def _group_ports(told: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Ports that differ from the rest, what holds there, and why; those with the same answer together."""
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in sections(told, "ports"):
        says, why = text(entry, "mode"), [text(entry, "source")]
        for name in ("blocking", "tcp_inq"):
            if text(entry, name) and text(entry, name) != text(told, name):
                says += f", {name} {text(entry, name)}"
                why.append(text(entry, f"{name}_source"))
        groups.setdefault((says, ", ".join(dict.fromkeys(why))), []).append(number(entry, "port"))
    return [(show_ports(ports), says, why) for (says, why), ports in groups.items()]


def render_container(
    told: Mapping[str, object], *, palette: Palette = PLAIN, width: int | None = None
) -> list[str]:
    """Everything about one container."""
    name, mode = printable(text(told, "name")), text(told, "mode")
    said = palette.paint(printable(mode), _MODE_STYLES.get(mode))
    groups = _group_ports(told)
    but = f", but for {plural(sum(1 for _ in sections(told, 'ports')), 'port')}" if groups else ""
    lines = [f"{palette.paint(name, 'bold')}: {said}{but} ({printable(text(told, 'mode_source'))})."]
    lines += ["", *two_columns(_describe(told), palette=palette)]
    if groups:
        columns = (Column("PORTS", elastic=True), Column("MODE"), Column("BECAUSE", elastic=True))
        lines += ["", *table(columns, groups, width=width, palette=palette)]
    rows = [
        (
            text(part, "source"),
            Cell(text(part, "says"), None if part.get("used") is True else "dim"),
            Cell("yes", "green") if part.get("used") is True else "no",
        )
        for part in sections(told, "parts")
    ]
    columns = (Column("SOURCE", elastic=True), Column("SAYS", elastic=True, least=44), Column("DECIDES"))
    lines += ["", palette.paint("What is said about it, what counts most first", "bold")]
    lines += table(columns, rows, width=width, palette=palette)
    remarks = [
        (
            "Bad label",
            f'{text(problem, "label")} is "{text(problem, "value")}", accepted: {text(problem, "accepted")}'
            + (f"; did you mean {meant}?" if (meant := text(problem, "meant")) else ""),
        )
        for problem in sections(told, "problems")
    ]
    remarks += [("Note", note) for note in texts(told, "notes")]
    for name, remark in remarks:
        first, *rest = textwrap.wrap(f"{name}: {printable(remark)}", width or 10_000) or [""]
        lines += ["", palette.paint(name, "yellow") + first.removeprefix(name), *rest]
    return [*lines, "", *_advise(told, palette, width)]


def _describe(told: Mapping[str, object]) -> list[tuple[str, str]]:
    project, service = text(told, "project"), text(told, "service")
    network = text(told, "network_mode")
    if addresses := texts(told, "addresses"):
        network += f" ({', '.join(addresses)})"
    rows = [
        ("service", f"{service} of project {project}" if service and project else service or project),
        ("image", text(told, "image")),
        ("id", text(told, "id")[:12]),
        ("pid", str(number(told, "pid") or "")),
        ("cgroup", text(told, "cgroup")),
        ("network", network),
        ("published", ", ".join(texts(told, "published"))),
        ("mode", f"{text(told, 'mode')} ({text(told, 'mode_source')})"),
        ("blocking", f"{text(told, 'blocking')} ({text(told, 'blocking_source')})"),
        ("tcp_inq", f"{text(told, 'tcp_inq')} ({text(told, 'tcp_inq_source')})"),
    ]
    return [row for row in rows if row[1]]


def _advise(told: Mapping[str, object], palette: Palette, width: int | None) -> list[str]:
    name = printable(text(told, "name"))
    quoted = shlex.quote(name)
    sources = {text(part, "source") for part in sections(told, "parts")}
    other = "off" if text(told, "mode") != "off" else "adaptive"
    steps = [("until unset", f"splicer set {quoted} {other}")]
    if "override" in sources:
        steps.insert(0, ("as before", f"splicer unset {quoted}"))
    # Each of them by itself switches the container off, whatever the other labels and the tables say.
    bad = [problem for problem in sections(told, "problems") if text(problem, "label") in LABELS]
    if bad:
        mended = ", ".join(f"{text(each, 'label')} ({text(each, 'accepted')})" for each in bad)
        which = "label" if len(bad) == 1 else "all of these labels"
        steps.append(("for good", f"mend {which} where the container is made: {printable(mended)}"))
    else:
        steps.append(("for good", f"label {MODE}={other} where the container is made"))
        if "labels" not in sources:  # which come before tables
            steps.append(("or", f'[[policy]] with container = "{name}" and mode = "{other}"; then SIGHUP'))
    column = max(len(name) for name, _ in steps) + 4
    lines = [palette.paint("To change it", "bold")]
    for name, words in steps:
        first, *rest = textwrap.wrap(words, (width or 10_000) - column, break_long_words=False) or [""]
        lines.append(f"  {palette.paint(name.ljust(column - 4), 'dim')}  {first}")
        lines += [" " * column + each for each in rest]
    return lines
