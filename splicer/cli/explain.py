# SPDX-License-Identifier: Apache-2.0
"""`splicer explain`: why is this connection spliced, or not, and what would change it?"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping

from splicer.errors import USAGE, SplicerError
from splicer.text import PLAIN, Palette, human_age, legend, plural, printable, terminal_width

from . import options
from .context import Context
from .owners import describe_owner
from .query import number, section, sections, show, text, texts

DESCRIPTION = """\
Say all about one connection, named by its two addresses as splicer flows or ss
shows them, in either order; or about those of a container or of a process, one
of each kind. Each check that is made before a connection is spliced is listed
with what was seen, then what happens next, and what would change it. What
splicer does not follow is looked for on the whole host."""

_WIDTH = 79
_MARKS = {True: ("ok", "green"), False: ("FAIL", "red"), None: ("?", "yellow")}


def _make_epilog() -> str:
    checks = {
        "exists": "somebody on this host has a socket with these addresses",
        "splicing": "splicer is not paused, and neither starting nor stopping",
        "local": "both ends are on this host; the sequence numbers of both tell, so NAT does not matter",
        "cgroup": "both sockets were made in the cgroup that splicer is attached to",
        "followed": "it is known: it began under splicer, or was found when splicer was loaded",
        "pause": "no time has to pass before the next attempt",
        "others": "have the name of the reason that they fail with; see splicer flows --help",
    }
    return f"""\
checks, in their order; ok, FAIL, or ? where it cannot be known:
{legend(checks)}

examples:
  splicer explain 10.0.0.1:40000 10.0.0.2:80
  splicer explain demo-web-1               # a container, or a compose service
  splicer explain $(pidof -s redis-server)
  splicer explain 4711 --json | jq '.connections[] | {{remote, reason, next}}'

exit codes:
  0 explained, also when nobody knows it; 1 failure, or no such container or
  process; 2 usage, 3 not running"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer explain`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    parser.add_argument(
        "subject",
        nargs="+",
        metavar="SUBJECT",
        help="two addresses with ports; or a container (name, compose service, id); or a pid",
    )
    options.add_asking(parser, patient=True)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Print what the daemon finds out."""
    given = arguments.subject
    if len(given) > 2 or (len(given) == 1 and ":" in given[0]):
        raise SplicerError(
            f"{'too many' if len(given) > 2 else 'only one'} of two addresses ({printable(' '.join(given))})",
            hint="such as: splicer explain 10.0.0.1:40000 10.0.0.2:80",
            exit_code=USAGE,
        )
    if len(given) == 2:
        for each in given:
            _check_endpoint(each)
    fields = {"subject": given[0]} if len(given) == 1 else {"local": given[0], "remote": given[1]}
    width = terminal_width(context.stdout) or _WIDTH
    return show(
        arguments,
        context,
        "explain",
        lambda answer: render(answer, palette=context.palette, width=width),
        fields,
        patience=options.read_timeout(arguments),
    )


def _check_endpoint(given: str) -> None:
    from splicer.host.sockets import read_endpoint

    try:
        read_endpoint(given)
    except ValueError:
        raise SplicerError(
            f"not an address with a port ({printable(given)})",
            hint="such as 10.0.0.1:40000 or [::1]:40000; list them with: splicer flows",
            exit_code=USAGE,
        ) from None


def render(answer: Mapping[str, object], *, palette: Palette = PLAIN, width: int = _WIDTH) -> list[str]:
    """All connections of the answer for people."""
    found = sections(answer, "connections")
    lines: list[str] = []
    for place, told in enumerate(found):
        lines += [*([""] if place else []), *_render_one(told, palette, width)]
    if left := number(answer, "left_out"):
        lines += ["", f"And {plural(left, 'connection')} of other kinds: splicer flows --summary"]
    return lines or [f"No TCP connections: {printable(text(answer, 'asked'))}."]


def _render_one(told: Mapping[str, object], palette: Palette, width: int) -> list[str]:
    remote, peer = text(told, "remote"), text(told, "peer")
    heading = f"{text(told, 'local')} -> {remote}" + (f" (there {peer})" if peer not in ("", remote) else "")
    owners = [describe_owner(section(told, end)) for end in ("client", "server")]
    lines = [palette.paint(printable(heading), "bold")]
    if any(owners):
        lines += _wrap(f"{owners[0] or '?'} to {owners[1] or '?'}", "  ", width)
    if (count := number(told, "count")) > 1:
        lines += _wrap(f"and {plural(count - 1, 'more', 'more')} of the same kind", "  ", width)
    lines += ["", *_wrap(text(told, "verdict"), "", width), "", *_list_checks(told, palette, width)]
    rows = [("next", _say_next(told)), *(("change", each) for each in texts(told, "change"))]
    tried = told.get("tried_seconds")
    if isinstance(tried, int | float):
        rows.insert(0, ("tried", f"last {human_age(tried)} ago"))
    lines.append("")
    for name, words in rows:
        wrapped = _wrap(words, " " * 8, width)
        lines += [palette.paint(name.ljust(8), "dim") + wrapped[0][8:], *wrapped[1:]]
    return lines


def _say_next(told: Mapping[str, object]) -> str:
    words, seconds = text(told, "next"), told.get("next_seconds")
    return (
        f"{words}; not before {human_age(seconds)} from now"
        if isinstance(seconds, int | float) and seconds
        else words
    )


def _list_checks(told: Mapping[str, object], palette: Palette, width: int) -> list[str]:
    checks = sections(told, "checks")
    column = max((len(text(each, "check")) for each in checks), default=0)
    lines = []
    for each in checks:
        passed = each.get("passed")
        mark, style = _MARKS[passed if isinstance(passed, bool) else None]
        indent = " " * (6 + column + 2)
        first, *rest = _wrap(text(each, "saw"), indent, width)
        name = printable(text(each, "check")).ljust(column)
        lines += [palette.paint(mark.ljust(4), style) + f"  {name}  " + first[len(indent) :], *rest]
    return lines


def _wrap(words: str, indent: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(
        printable(words),
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return wrapped or [indent]
