# SPDX-License-Identifier: Apache-2.0
"""`splicer version`: of splicer, and of what it stands on."""

from __future__ import annotations

import argparse
import platform

from splicer import __version__
from splicer.errors import OK
from splicer.model import SCHEMA

from . import options
from .context import Context

DESCRIPTION = """\
Print the version of this command, of Python and of the kernel. The daemon's
is in splicer status."""

EPILOG = """\
examples:
  splicer version
  splicer version --json | jq -r .version"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer version`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_json(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print versions."""
    python, kernel, machine = platform.python_version(), platform.release(), platform.machine()
    if arguments.json:
        context.write_json(
            {"schema": SCHEMA, "version": __version__, "python": python, "kernel": kernel, "machine": machine}
        )
    else:
        context.write([f"splicer {__version__} (Python {python}, Linux {kernel}, {machine})"])
    return OK
