# SPDX-License-Identifier: Apache-2.0
"""`splicer set`: another mode for a container, cgroup, process, port or address, until it is unset."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from splicer.errors import USAGE, SplicerError
from splicer.policy.config import CONTAINER_MODES
from splicer.text import printable

from . import options, subjects
from .context import Context
from .query import show, text, texts

DESCRIPTION = """\
Give a container another mode, whatever its labels and the configuration say; or
a cgroup, a process, a port or an address. It acts at once, on living
connections too: off takes them back to plain TCP without losing a byte, so that
tcpdump sees them again; adaptive and eager splice them again. It is kept by
name, also while the container is restarted or the daemon is, until splicer
unset or the next boot. splicer policy lists what is set. What was set last
counts first."""

EPILOG = """\
modes:
  adaptive  splice connections that are busy and whose reading style is safe
  eager     splice from the first byte; for services you vouch for; by cgroup,
            process and address it acts as adaptive, but for containers
  off       plain TCP

A connection is off if either end is off. A process is the one that reads; one
that has just been started is known within a second.

examples:
  splicer set demo-web-1 off       # and splicer unset demo-web-1 when done
  splicer set web adaptive         # all containers of the compose service
  splicer set --cgroup system.slice/redis.service off
  splicer set --process 'php-fpm*' off
  splicer set --port 5432 off
  splicer set --address 10.8.0.0/16 off

exit codes:
  0 set, or set already; 1 failure or no such container, 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer set`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    subjects.add(parser)
    # Not with argparse's choices: a container without a mode would be called a bad one.
    parser.add_argument("set_mode", metavar="MODE", help=", ".join(CONTAINER_MODES))
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Tell the daemon, and say what that changed."""
    mode = arguments.set_mode
    if mode not in CONTAINER_MODES:
        raise SplicerError(
            f"unknown mode ({printable(mode)})",
            hint=f"accepted: {', '.join(CONTAINER_MODES)}; such as: splicer set web off",
            exit_code=USAGE,
        )
    subject = subjects.read(arguments, f"set web {mode}")
    return show(arguments, context, "set", lambda answer: render(answer, mode), {**subject, "mode": mode})


def render(answer: Mapping[str, object], mode: str) -> list[str]:
    """What that changed. `mode` was asked for."""
    mode = printable(text(answer, "mode") or mode)
    lines = [f"{printable(name)}: {mode} from now on" for name in texts(answer, "changed")]
    lines += [f"{printable(name)}: {mode} already" for name in texts(answer, "unchanged")]
    if note := text(answer, "note"):
        lines.append(f"Note: {printable(note)}.")
    return lines or ["Nothing to set."]
