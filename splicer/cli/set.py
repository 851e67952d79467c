# SPDX-License-Identifier: Apache-2.0
"""`splicer set`: another mode for a container, at once and until it is unset."""

from __future__ import annotations

import argparse

from splicer.errors import OK
from splicer.policy.config import CONTAINER_MODES
from splicer.text import printable

from . import options
from .context import Context
from .query import ask, text, texts

SUMMARY = "give a container another mode, at once"

DESCRIPTION = """\
Give a container another mode, whatever its labels and the configuration say.
It acts at once, on living connections too: off takes them back to plain TCP
without losing a byte, so that tcpdump sees them again; adaptive and eager
splice them again. It is kept by the container's name, also while the container
is restarted or the daemon is, until splicer unset or the next boot."""

EPILOG = """\
modes:
  adaptive  splice connections that are busy and whose reading style is safe
  eager     splice from the first byte; for services you vouch for
  off       plain TCP

A connection is off if either end is off.

examples:
  splicer set demo-web-1 off       # and splicer unset demo-web-1 when done
  splicer set web adaptive         # all containers of the compose service

exit codes:
  0 set, or set already; 1 failure or no such container, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer set`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("container", metavar="CONTAINER", help="name, compose service, or id")
    parser.add_argument("mode", metavar="MODE", choices=CONTAINER_MODES, help=", ".join(CONTAINER_MODES))
    options.add_json(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    answer = ask(settings.run_dir, "set", {"container": arguments.container, "mode": arguments.mode})
    if arguments.json:
        context.write_json(answer)
        return OK
    mode = printable(text(answer, "mode") or arguments.mode)
    lines = [f"{printable(name)}: {mode} from now on" for name in texts(answer, "changed")]
    lines += [f"{printable(name)}: {mode} already" for name in texts(answer, "unchanged")]
    context.write(lines or ["Nothing to set."])
    return OK
