# SPDX-License-Identifier: Apache-2.0
"""`splicer unset`: labels and configuration count again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from splicer.text import printable

from . import options, subjects
from .context import Context
from .query import show, texts

DESCRIPTION = """\
Take back what splicer set did: labels and the configuration count again, at
once and for living connections too. splicer policy lists what is set."""

EPILOG = """\
examples:
  splicer unset demo-web-1
  splicer unset web                # all containers of the compose service
  splicer unset --port 5432
  splicer unset --cgroup system.slice/redis.service

exit codes:
  0 unset, or nothing was set; 1 failure or no such container, 2 usage,
  3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer unset`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    subjects.add(parser)
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    subject = subjects.read(arguments, "unset web")
    return show(arguments, context, "unset", render, subject)


def render(answer: Mapping[str, object]) -> list[str]:
    """What that changed."""
    lines = [f"{printable(name)}: labels and configuration count again" for name in texts(answer, "changed")]
    lines += [f"{printable(name)}: nothing was set" for name in texts(answer, "unchanged")]
    return lines or ["Nothing to unset."]
