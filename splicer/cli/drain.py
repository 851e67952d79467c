# SPDX-License-Identifier: Apache-2.0
"""`splicer drain`: everything back to plain TCP, once."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from splicer.text import plural

from . import options
from .context import Context
from .query import number, show

DESCRIPTION = """\
Take every spliced connection back to plain TCP, once, without losing a byte,
and say how many there are. The daemon goes on, and splices what stays busy
again after a while. To keep it so: splicer pause, or splicer set for some."""

EPILOG = """\
examples:
  splicer drain && splicer flows

exit codes:
  0 begun, 1 failure, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer drain`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon."""
    return show(arguments, context, "drain", render)


def render(answer: Mapping[str, object]) -> list[str]:
    """How many go back."""
    if count := number(answer, "connections"):
        goes = "goes" if count == 1 else "go"
        return [f"Draining: {plural(count, 'spliced connection')} {goes} back to plain TCP now."]
    return ["Nothing to drain: no connection is spliced."]
