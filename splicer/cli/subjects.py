# SPDX-License-Identifier: Apache-2.0
"""What `splicer set` and `splicer unset` can be about: a container, or one of these options."""

from __future__ import annotations

import argparse
import shlex

from splicer.errors import USAGE, SplicerError
from splicer.policy.overrides import ADDRESS, CGROUP, CONTAINER, PORT, PROCESS, read_subject
from splicer.text import printable

from . import options

_OPTIONS = {
    CGROUP: ("PATH", "processes in this cgroup v2 directory or below it, such as system.slice/redis.service"),
    PROCESS: ("NAME", "processes of this name, a name or a pattern such as 'php-fpm*'"),
    PORT: ("PORT", "connections to this port of the server; also a range, or several with commas"),
    ADDRESS: ("ADDRESS", "ends with this address, or in this network, such as 10.8.0.0/16"),
}


def add(parser: options.Parser) -> None:
    """The container, and what can stand in its place."""
    parser.add_argument(
        "container", nargs="?", metavar="CONTAINER", help="name, compose service, or id of a container"
    )
    for kind, (metavar, text) in _OPTIONS.items():
        parser.add_argument(f"--{kind}", metavar=metavar, help=f"not a container: {text}")


def read(arguments: argparse.Namespace, example: str) -> dict[str, str]:
    """Kind and text of the one subject, as a field of the request. Raises SplicerError with exit code 2;
    `example` is a command line that shows how, without `splicer`."""
    given = {kind: text for kind in (CONTAINER, *_OPTIONS) if (text := getattr(arguments, kind)) is not None}
    if len(given) != 1:
        named = [kind if kind == CONTAINER else f"--{kind}" for kind in given]
        what = f"one subject at a time, and not {' and '.join(named)}" if given else "which container?"
        others = ", ".join(f"--{kind}" for kind in _OPTIONS)
        raise SplicerError(
            what, hint=f"such as: splicer {example}; in place of a container: {others}", exit_code=USAGE
        )
    [(kind, text)] = given.items()
    if kind != CONTAINER:
        text = read_subject(kind, text).value
    return {kind: text}


def spell(fields: dict[str, str]) -> str:
    """The subject as it stands on a command line."""
    [(kind, text)] = fields.items()
    quoted = shlex.quote(printable(text))
    return quoted if kind == CONTAINER else f"--{kind} {quoted}"
