# SPDX-License-Identifier: Apache-2.0
"""`splicer bench`: before and after, measured."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from splicer.bench.suites import DEFAULT, SUITES
from splicer.errors import FAILURE, OK, USAGE, SplicerError
from splicer.text import legend, printable

from . import options
from .context import Context

if TYPE_CHECKING:
    from splicer.bench.report import Report
    from splicer.bench.suite import Findings, Options, Workshop


DESCRIPTION = """\
Measure plain and spliced TCP by turns, with the noise of plain against plain
beside it, and say in words what came of it.

A suite runs a splicer of its own in network namespaces of its own, and touches
nothing else on the host. With --url or --cmd it is your own service, as it is:
the daemon that runs here is paused for each plain leg, for all of the host or
for one --container, and goes on as before when the run is over, interrupted or
killed. wrk makes the load for --url."""

_WIDTH = 80
# As they were called when the benchmark was an example.
_FORMER_FLAGS: Mapping[str, str] = {"refused": "plain", "adoption": "adopt"}


def _make_epilog() -> str:
    suites = legend({name: suite.summary for name, suite in SUITES.items()})
    return f"""\
suites:
{suites}

examples:
  sudo splicer bench --url http://127.0.0.1:8080/   your own service
  sudo splicer bench --url http://10.0.0.5/ --html result.html
  sudo splicer bench --cmd 'my-load --print-rate'   anything with a number
  sudo splicer bench                                nginx and wrk, 6 minutes
  sudo splicer bench plain --check                  does it cost nothing?
  sudo splicer bench --only keep-alive -n 10        one workload, 10 pairs
  sudo splicer bench --list

exit codes:
  0 measured, whatever came of it; 1 failure: errors in the load, a leg that
  should be spliced was not, or --check failed; 2 usage; 3 not running, with
  --url and --cmd; 130 interrupted"""


def add(parser: options.Parser) -> None:
    """Describe the command line of `splicer bench`."""
    parser.description = DESCRIPTION
    parser.make_epilog = _make_epilog
    what = parser.add_mutually_exclusive_group()
    add = what.add_argument
    add("suite", nargs="?", metavar="SUITE", choices=[*SUITES, None], help=f"see below (default: {DEFAULT})")
    add("--url", metavar="URL", help="a service that is there already, asked by wrk")
    add("--cmd", metavar="COMMAND", help="a command whose last line of output ends with a number")
    add("--list", action="store_true", help="list the workloads of the suites and stop")
    for flag in ("--refused", "--matrix", "--streams", "--relays", "--lives", "--adoption", "--connecting"):
        what.add_argument(flag, dest="former", action="store_const", const=flag, help=argparse.SUPPRESS)
    for flag in ("--census", "--watch", "--stack"):
        what.add_argument(flag, dest="former", action="store_const", const=flag, help=argparse.SUPPRESS)
    _add_load(parser)
    _add_output(parser)
    options.add_run_dir(parser)
    options.add_config(parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("load").add_argument
    add("-n", "--pairs", "--alternations", type=_count, default=5, metavar="N", help="spliced legs (5)")
    add("-t", "--seconds", type=_positive, metavar="T", help="length of a leg (3; 2 in a table)")
    add("--connections", type=_count, metavar="N", help="of wrk (16), or of the suite")
    add("--threads", type=_count, default=1, metavar="N", help="of wrk (1)")
    add("--workers", type=_count, default=1, metavar="N", help="of nginx (1)")
    add("--container", action="append", metavar="NAME", help="pause splicing for this one; may be repeated")
    add("--less-is-better", action="store_true", help="what --cmd prints is a time, or a cost")
    add("--only", action="append", metavar="NAME", help="these workloads; shell patterns, may be repeated")
    add("--baseline", action="store_true", help="the spliced legs plain as well: what the noise is")
    add("--mode", choices=("adaptive", "eager"), help="of the suite's splicer")
    add("--splicer", metavar="PATH", help="another splicer for the suites: the command of its tree")
    add("--programs", action="store_true", help="time the BPF programs as well (some 40 ns a call)")
    add("--driver", choices=("mysqlclient", "pymysql"), default="mysqlclient", help="for stack (mysqlclient)")
    add(
        "--python", metavar="PATH", default="/usr/bin/python3", help="for stack, with the clients that it has"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--check", action="store_true", help="fail where a ratio is worse than the workload's bound")
    add("--json", action="store_true", help="the result as JSON")
    add("--html", metavar="FILE", help="write a page with table and picture (needs matplotlib)")
    add("--png", metavar="FILE", help="write the picture: every pair, and the noise (needs matplotlib)")


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < 86_400:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _count(text: str) -> int:
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def execute(arguments: argparse.Namespace, context: Context) -> int:
    """Measure, print, and write what was asked for."""
    _check_usage(arguments)
    suite = arguments.suite or _read_former(arguments.former)
    if arguments.list:
        from splicer.bench import chains

        context.write(chains.list_lines(None, arguments.only or ()))
        return OK
    from splicer.bench import plots, report
    from splicer.bench.progress import Progress
    from splicer.bench.suite import Workshop
    from splicer.bench.testbed import interrupt_on_signals

    paths = {name: report.check_path(path) for name in ("html", "png") if (path := getattr(arguments, name))}
    if paths:
        plots.require()
    progress = Progress(context.stderr)
    shown = (lambda text: None) if arguments.json else (lambda text: _show(context, text))
    workshop = Workshop(_read_options(arguments), progress, shown)
    interrupt_on_signals()
    try:
        findings = _measure(arguments, context, workshop, suite)
    except KeyboardInterrupt as signal:
        progress.clear()
        context.stderr.write(f"splicer: interrupted{f' ({signal})' if str(signal) else ''}: cleaned up\n")
        raise
    finally:
        progress.clear()
    made = report.make_report(suite or DEFAULT, _spell(arguments, suite), workshop.options, findings)
    if paths:
        figure = plots.draw(findings.comparisons, made.command)
        if "png" in paths:
            plots.save_png(figure, paths["png"])
        if "html" in paths:
            paths["html"].write_text(made.to_html(plots.make_svg(figure)))
    _print(made, arguments, context)
    for failure in findings.failures:
        context.stderr.write(printable(f"splicer: {failure}") + "\n")
    return FAILURE if findings.failures else OK


def _check_usage(arguments: argparse.Namespace) -> None:
    """What argparse does not know to be a mistake. Raises SplicerError (exit code 2)."""
    live = bool(arguments.url or arguments.cmd)

    def refuse(flag: str, why: str) -> None:
        raise SplicerError(f"{flag} {why}", hint="splicer bench --help", exit_code=USAGE)

    for flag in ("only", "mode", "splicer", "programs"):
        if live and getattr(arguments, flag):
            refuse(f"--{flag}", "is for the suites")
    if not live and arguments.container:
        refuse("--container", "is for --url and --cmd")
    if arguments.less_is_better and not arguments.cmd:
        refuse("--less-is-better", "is for --cmd")
    if arguments.programs and arguments.baseline:
        refuse("--programs", "is not for --baseline, which loads none")
    suite = SUITES.get(arguments.suite or _read_former(arguments.former) or DEFAULT)
    for flag in ("html", "png"):
        if suite is not None and not live and not suite.compares and getattr(arguments, flag):
            refuse(f"--{flag}", f"is not for {suite.name}, which compares nothing")
    if suite is not None and suite.module:
        if arguments.only and not suite.selects:
            refuse("--only", f"is not for {suite.name}, which has no workloads")
        if arguments.baseline:
            refuse("--baseline", f"is not for {suite.name}, which is measured by itself")


def _read_former(flag: str | None) -> str | None:
    if flag is None:
        return None
    name = flag.removeprefix("--")
    return _FORMER_FLAGS.get(name, name)


def _read_options(arguments: argparse.Namespace) -> Options:
    from splicer.bench.suite import Options

    names = ("pairs", "seconds", "connections", "threads", "workers", "mode", "programs", "baseline", "check")
    given = {name: getattr(arguments, name) for name in (*names, "splicer", "driver", "python")}
    return Options(only=tuple(arguments.only or ()), **given)


def _measure(
    arguments: argparse.Namespace, context: Context, workshop: Workshop, suite: str | None
) -> Findings:
    if not (arguments.url or arguments.cmd):
        return SUITES[suite or DEFAULT].run(workshop)
    from splicer.bench import live

    settings = options.resolve_settings(arguments, context, only=("run_dir",)).settings
    containers = tuple(arguments.container or ())
    if arguments.url:
        return live.measure_url(workshop, settings.run_dir, arguments.url, containers)
    better = not arguments.less_is_better
    return live.measure_command(workshop, settings.run_dir, arguments.cmd, containers, better)


def _spell(arguments: argparse.Namespace, suite: str | None) -> str:
    """The command line, without where its results go."""
    words = ["splicer", "bench", *([suite] if suite else [])]
    for name in ("url", "cmd", "pairs", "seconds", "connections", "mode"):
        value = getattr(arguments, name)
        if value is not None and not (name == "pairs" and value == 5):
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    for name in ("only", "container"):
        words += [word for value in getattr(arguments, name) or () for word in (f"--{name}", value)]
    words += [f"--{name}" for name in ("baseline", "programs", "check") if getattr(arguments, name)]
    return shlex.join(words)


def _show(context: Context, text: str) -> None:
    context.write(text.split("\n"))
    context.stdout.flush()


def _print(made: Report, arguments: argparse.Namespace, context: Context) -> None:
    if arguments.json:
        context.write_json(made.to_json())
        return
    lines: list[str] = []
    for each in made.summary:
        lines += textwrap.wrap(printable(each), _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    context.write(["", *lines] if lines else [])
