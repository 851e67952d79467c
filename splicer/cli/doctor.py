# SPDX-License-Identifier: Apache-2.0
"""`splicer doctor`: can this host run splicer, and what stands in its way?"""

from __future__ import annotations

import argparse
import platform
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from splicer import __version__
from splicer.model import SCHEMA
from splicer.text import PLAIN, Palette, elide, printable

from . import options
from .context import Context

if TYPE_CHECKING:
    from splicer.doctor.check import Result, Verdict
    from splicer.doctor.surroundings import Surroundings


DESCRIPTION = """\
Try everything that splicer needs of this host, as splicer run does at its
start, and say what it found: first the verdict, then one check after the
other, each ok, warn, fail or unknown, with what mends it. Changes nothing and
leaves nothing behind; a daemon may be running. Takes as long as a start, since
it compiles and loads the programs. With --live it splices a connection of its
own, in a network namespace and a cgroup of its own."""

EPILOG = """\
checks:
  cap_... to lockdown      privileges, and what is mounted
  daemon to docker         who else is here
  libbpf to memlock        software, and what the kernel tells of itself
  redirection to sleepers  what the data path relies on, tried on scratch things
  compiler to census       the programs, each loaded and let go of
  fionread, kernel_log     who answers FIONREAD right, by the kernel's class:
                           splicer status --help says what A, B and C are
  live_...                 with --live

examples:
  sudo splicer doctor
  sudo splicer doctor --live           # and does it work?
  sudo splicer doctor --json | jq -r '.checks[] | select(.state != "ok")'
  sudo splicer doctor --fionread off   # as splicer run would be with it

exit codes:
  0 this host can run splicer, with or without warnings; 1 it is not known, or
  --live failed; 2 usage or configuration; 4 this host is not supported"""

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "cyan"}
_WIDTH = 80
_STATE, _NAME = 7, 17
_MOST = 10


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer doctor`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    options.add_json(parser)
    parser.add_argument(
        "--live", action="store_true", help="splice a connection, count its bytes, time it; some seconds more"
    )
    parser.add_argument(
        "--cgroup", metavar="PATH", help="the cgroup that a daemon would have (default: /sys/fs/cgroup)"
    )
    parser.add_argument(
        "--fionread", metavar="WHO", help="what a daemon would be told: auto or off (default: auto)"
    )
    parser.add_argument(
        "--docker", metavar="WHERE", help="where the container engine is: auto, off or a URL (default: auto)"
    )
    options.add_run_dir(parser)
    options.add_pin_dir(parser)
    options.add_config(parser)


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Look at everything, and print what was found."""
    settings = options.resolve_settings(arguments, context).settings
    from splicer.doctor import check, checks, live
    from splicer.doctor.surroundings import Surroundings

    surroundings = Surroundings(settings, context.environ)
    results = list(check.examine(checks.list_checks(), surroundings))
    verdict = check.judge(results, surroundings)
    if arguments.live:
        results += live.examine(surroundings, verdict)
        verdict = live.judge(verdict, results)
    if arguments.json:
        context.write_json(describe(results, verdict, surroundings))
    else:
        context.write(render(results, verdict, context.palette))
    return verdict.exit_code


def describe(results: Sequence[Result], verdict: Verdict, surroundings: Surroundings) -> dict[str, object]:
    """All of it, for programs."""
    holder = surroundings.daemon
    return {
        "schema": SCHEMA,
        "verdict": verdict.words,
        "can_run": verdict.can_run,
        "kernel_class": verdict.kernel_class,
        "fionread": verdict.fionread,
        "version": __version__,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "daemon": None if holder is None else {"pid": holder.pid, "cgroup": holder.cgroup},
        "neighbours": [each.to_json() for each in surroundings.list_neighbours()],
        "checks": [each.to_json() for each in results],
    }


def render(results: Sequence[Result], verdict: Verdict, palette: Palette = PLAIN) -> list[str]:
    """For people: the verdict, then a line for each check, and below it what mends it."""
    style = {True: "green", False: "red", None: "cyan"}[verdict.can_run]
    head, _, tail = verdict.words.partition(":")
    lines = [palette.paint(head, style) + (f":{tail}." if tail else "."), ""]
    for each in results:
        lines += _render_result(each, palette)
    return lines


def _render_result(result: Result, palette: Palette) -> list[str]:
    """One line where all is well. What is not is said in full, however many it takes."""
    outcome = result.outcome
    indent = " " * (_STATE + _NAME + 2)
    text = printable(outcome.text)
    room = _WIDTH - len(indent)
    parts = [elide(text, room)] if outcome.state == "ok" else _wrap(text, room)
    state = palette.paint(outcome.state.ljust(_STATE), _STYLES[outcome.state])
    lines = [f"{state} {result.name:{_NAME}} {parts[0]}", *(indent + part for part in parts[1:])]
    more = [printable(each) for each in outcome.more]
    if len(more) > _MOST:
        more[_MOST:] = [f"and {len(more) - _MOST} more: splicer doctor --json"]
    lines += [indent + elide(each, room) for each in more]
    if outcome.mend:
        mend = _wrap(f"mend: {printable(outcome.mend)}", room)
        lines += [indent + palette.paint(part, "dim") for part in mend]
    return lines


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
