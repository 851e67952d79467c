# SPDX-License-Identifier: Apache-2.0
"""`splicer resume`: the end of `splicer pause`."""

from __future__ import annotations

import argparse

from splicer.errors import OK

from . import options
from .context import Context
from .query import ask

SUMMARY = "end splicer pause"

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
    options.add_json(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    answer = ask(settings.run_dir, "resume")
    if arguments.json:
        context.write_json(answer)
    elif answer.get("changed") is True:
        context.write(["Resumed: what is busy is spliced again, as splicer policy says."])
    else:
        context.write(["Nothing to resume: splicing is not paused."])
    return OK
