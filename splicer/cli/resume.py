# SPDX-License-Identifier: Apache-2.0
"""`splicer resume`: the end of `splicer pause`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from . import options
from .context import Context
from .query import show

DESCRIPTION = """\
End splicer pause: overrides, labels and the configuration count again, for
living connections too. Those that stay busy are spliced again."""

EPILOG = """\
examples:
  splicer resume && splicer status

exit codes:
  0 resumed, or not paused; 1 failure, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer resume`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    return show(arguments, context, "resume", render)


def render(answer: Mapping[str, object]) -> list[str]:
    """What that changed."""
    if answer.get("changed") is True:
        return ["Resumed: what is busy is spliced again, as splicer policy says."]
    return ["Nothing to resume: splicing is not paused."]
