# SPDX-License-Identifier: Apache-2.0
"""`splicer advise`: what would have more of the traffic redirected."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping

from splicer.model import REASONS
from splicer.text import PLAIN, Palette, human_bytes, printable, terminal_width

from . import options
from .context import Context
from .coverage import describe_share, headline, list_notes, name_parties
from .query import number, seconds, sections, show, text

DESCRIPTION = """\
Say what would have more of the local traffic redirected: for each reason that
keeps at least 1 % of the bytes plain what to change, what one puts up with
then, and the lines to paste. Nothing is changed."""

EPILOG = """\
lines to paste:
  /etc/splicer.toml   the configuration file, whichever it is; then SIGHUP, or
                      a restart for what splicer run reads only at its start
  docker-compose.yml  labels; they count when the container is made anew

  Of tables of the configuration file the first that is about an end counts, so
  put a new one before those that say something else of it.

examples:
  splicer advise
  splicer advise --json | jq -r '.advice[].toml'

exit codes:
  0 done, also if there is nothing to advise, 1 failure, 2 usage, 3 not running"""

_WIDTH = 79


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer advise`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_asking(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print the daemon's advice."""
    width = min(terminal_width(context.stdout) or _WIDTH, _WIDTH)
    return show(
        arguments, context, "advise", lambda answer: render(answer, palette=context.palette, width=width)
    )


def render(answer: Mapping[str, object], *, palette: Palette = PLAIN, width: int = _WIDTH) -> list[str]:
    """The advice for people."""
    coverage = answer.get("coverage")
    coverage = coverage if isinstance(coverage, dict) else {}
    lines = [headline(coverage, palette), *list_notes(coverage)]
    advice = sections(answer, "advice")
    if not advice:
        return [*lines, "", _say_why_nothing(coverage)]
    for each in advice:
        lines += ["", *_render_one(each, palette, width)]
    return lines


def _say_why_nothing(coverage: Mapping[str, object]) -> str:
    if not number(coverage, "redirected_bytes") + number(coverage, "plain_bytes"):
        return "Nothing to advise: nothing was sent yet."
    if not number(coverage, "plain_bytes"):
        return "Nothing to advise: all of it is redirected."
    return "Nothing to advise: no setting would change much."


def _render_one(each: Mapping[str, object], palette: Palette, width: int) -> list[str]:
    share, size = describe_share(seconds(each, "share")), human_bytes(number(each, "plain_bytes"))
    reason = text(each, "reason")
    title = f"{share} ({size})  {printable(name_parties(each))}: {reason}"
    lines = [palette.paint(line, "bold") for line in textwrap.wrap(title, width, subsequent_indent="  ")]
    for words in (text(each, "what") or REASONS.get(reason, ""), _name("Risk", text(each, "risk"))):
        lines += textwrap.wrap(printable(words), width, initial_indent="  ", subsequent_indent="  ")
    if command := text(each, "command"):
        lines += [f"  Who says so: {printable(command)}"]
    for place, key in (("/etc/splicer.toml", "toml"), ("docker-compose.yml", "compose")):
        if snippet := text(each, key):
            lines += ["", palette.paint(f"  # {place}", "dim")]
            lines += [f"  {printable(line)}" for line in snippet.splitlines()]
    return lines


def _name(title: str, words: str) -> str:
    return f"{title}: {words}." if words else ""
