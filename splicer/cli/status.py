# SPDX-License-Identifier: Apache-2.0
"""`splicer status`: is it running, and does it help?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from splicer.config import Settings
from splicer.errors import NOT_RUNNING, OK, SplicerError
from splicer.model import REASONS, SCHEMA
from splicer.text import (
    PLAIN,
    Column,
    Palette,
    human_age,
    human_bytes,
    human_count,
    pairs,
    plural,
    table,
    terminal_width,
)

from . import options
from .context import Context
from .query import ask, number, seconds, section, text

SUMMARY = "say whether splicer is running and what it has done"

DESCRIPTION = """\
Say whether splicer is running and what it has done. The first line is the
answer in words. Totals count from when the programs were loaded and survive a
restart of the daemon."""

EPILOG = """\
totals:
  paired      connections found to have both ends on this host
  spliced     times a connection was spliced
  drained     times a spliced connection went back to plain TCP
  redirected  what went from socket to socket, past TCP and the network devices
  passed      messages of such connections that went through TCP
  rescued     connections taken back because bytes waited unread
  refused     connections left plain, by reason; see splicer flows --help

examples:
  splicer status
  splicer status --json | jq .connections.spliced

exit codes:
  0 running, 1 failure, 2 usage, 3 not running; --json then prints
  {"schema":1,"running":false}"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer status`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_json(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's status."""
    settings = options.resolve_settings(arguments, context, only=("run_dir", "pin_dir")).settings
    try:
        status = ask(settings.run_dir, "status")
    except SplicerError as error:
        if error.exit_code != NOT_RUNNING:
            raise
        if arguments.json:
            context.write_json({"schema": SCHEMA, "running": False})
            return NOT_RUNNING
        raise _with_leftovers(error, settings) from error
    if arguments.json:
        context.write_json(status)
    else:
        context.write(render(status, palette=context.palette, width=terminal_width(context.stdout)))
    return OK


def _with_leftovers(error: SplicerError, settings: Settings) -> SplicerError:
    """Programs stay loaded when a daemon crashes: whoever asks for the status wants to know."""
    try:
        left = bool(os.listdir(settings.pin_dir))
    except OSError:
        left = False
    if not left or "not running" not in error.message:
        return error
    return SplicerError(
        f"{error.message}, but programs of an earlier run are still loaded ({settings.pin_dir})",
        hint="take them over with: splicer run; take them out with: splicer unload",
        exit_code=error.exit_code,
    )


def render(status: Mapping[str, object], *, palette: Palette = PLAIN, width: int | None = None) -> list[str]:
    """The status for people."""
    totals = section(status, "totals")
    about = [
        ("mode", text(status, "mode")),
        ("cgroup", text(status, "cgroup")),
        ("pid", str(number(status, "pid"))),
        ("version", text(status, "version")),
    ]
    if kernel_class := text(status, "kernel_class"):
        about.append(("kernel", f"class {kernel_class}"))
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
    lines = [verdict(status, palette), "", *pairs(about, palette=palette)]
    lines += ["", palette.paint("Totals", "bold"), *pairs(done, palette=palette)]
    refused = section(totals, "refused")
    counts = {name: number(refused, name) for name in refused if number(refused, name)}
    if counts:
        columns = (Column("REFUSED"), Column("COUNT", "right"), Column("BECAUSE", elastic=True, least=30))
        rows = [
            (
                name,
                human_count(count),
                REASONS.get(name, "(a reason this version of the command does not know)"),
            )
            for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
        lines += ["", *table(columns, rows, width=width, palette=palette)]
    return lines


def verdict(status: Mapping[str, object], palette: Palette = PLAIN) -> str:
    """One line: does splicer do anything for this host?"""
    connections = section(status, "connections")
    paired, spliced, draining = (number(connections, state) for state in ("paired", "spliced", "draining"))
    mode = text(status, "mode")
    if spliced:
        others = [f"{human_count(paired)} local but not spliced"] if paired else []
        others += [f"{human_count(draining)} going back to TCP"] if draining else []
        tail = f" ({', '.join(others)})" if others else ""
        return palette.paint("Running", "green") + f": {plural(spliced, 'connection')} spliced{tail}."
    if paired or draining:
        local = plural(paired + draining, "local connection")
        return palette.paint("Running", "green") + f": {local}, none spliced now; splicer flows says why."
    if mode == "off":
        return palette.paint("Running", "yellow") + ": nothing is spliced, for the mode is off."
    return palette.paint("Running", "green") + ": no local connections right now."
