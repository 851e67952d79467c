# SPDX-License-Identifier: Apache-2.0
"""`splicer pause`: nothing is spliced until `splicer resume`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from splicer.text import plural

from . import options
from .context import Context
from .query import number, show

DESCRIPTION = """\
Take every spliced connection back to plain TCP without losing a byte, and
splice no other, whatever labels, rules and overrides say, until splicer resume
or the next boot. A restart of the daemon, or an upgrade, does not end it.
splicer status says so in its first line. Health checks stay green."""

EPILOG = """\
examples:
  splicer pause && tcpdump -i any port 8080
  splicer resume

exit codes:
  0 paused, or paused already; 1 failure, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer pause`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    return show(arguments, context, "pause", render)


def render(answer: Mapping[str, object]) -> list[str]:
    """What that changed."""
    count = number(answer, "connections")
    tail = f"; {plural(count, 'spliced connection')} on the way back to plain TCP" if count else ""
    state = "Paused" if answer.get("changed") is True else "Paused already"
    return [f"{state}: nothing is spliced until splicer resume{tail}."]
