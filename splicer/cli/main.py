# SPDX-License-Identifier: Apache-2.0
"""The `splicer` command: puts the commands together, runs one, and turns errors into lines and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO, cast

from splicer import __version__
from splicer.errors import FAILURE, INTERRUPTED, NOT_RUNNING, OK, USAGE, SplicerError
from splicer.policy.config import variable_of
from splicer.text import ColourChoice, Palette, printable, wants_colour

from . import invocation, leftovers, options
from .context import Context

# In the order of the help. Each is a module of its own here, which is loaded when its turn comes: the daemon
# would keep all of them in memory else, and every command would be slower.
COMMANDS = {
    "run": "splice local connections until told to stop",
    "status": "say whether splicer is running and what it has done",
    "flows": "list local connections, and why each is spliced or not",
    "explain": "say why a connection is spliced or not, and what would change it",
    "events": "show what happened lately, and follow it",
    "top": "show live how much goes between whom",
    "policy": "show which containers are spliced, how, and who says so",
    "advise": "say what would have more of the traffic redirected",
    "set": "give a container, process, port ... another mode, at once",
    "unset": "take back what splicer set did",
    "drain": "take every connection back to plain TCP, once",
    "pause": "splice nothing until splicer resume",
    "resume": "end splicer pause",
    "unload": "remove what a dead daemon left behind",
    "tap": "show redirected bytes, which tcpdump does not see",
    "bench": "measure what splicing changes: a suite, or your own service",
    "doctor": "say whether this host can run splicer, and what stands in its way",
    "bundle": "put what a bug report needs into one file",
    "version": "print versions",
    "completion": "print a completion script for a shell",
}

DESCRIPTION = """\
Makes TCP between the containers and processes of one host faster, without
changing them."""

EPILOG = """\
examples:
  splicer doctor                        can this host run it?
  splicer run --cgroup /sys/fs/cgroup   start splicing; Ctrl-C takes it all back
  splicer status                        is it running, and does it help?
  splicer flows                         what is spliced, and why the rest is not
  splicer explain 10.0.0.1:40000 10.0.0.2:80    all about one connection
  splicer top                           how much goes between whom, live
  splicer events --follow               what happens, as it happens
  splicer advise                        what would have more of it spliced
  splicer policy                        which containers are, and who says so
  splicer set demo-web-1 off            leave a container alone for now
  splicer pause                         leave everything alone for now
  splicer bench --url http://web:8080/  a service before and after
  splicer run --help                    modes, labels, configuration file

exit codes:
  0 ok, 1 failure, 2 usage, 3 daemon not running, 4 host not supported,
  130 interrupted"""


class _Command(Protocol):
    """A module of a command."""

    def add(self, parser: options.Parser) -> None: ...

    def execute(self, arguments: argparse.Namespace, context: Context) -> int: ...


def _load(name: str) -> _Command:
    return cast(_Command, importlib.import_module(f"splicer.cli.{name}"))


class _CommandParser(options.Parser):
    """Describes its command as soon as it is that one's turn."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.command = ""

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        self.fill()
        return super().parse_known_args(*arguments, **keywords)

    def fill(self) -> None:
        """Nothing if that is done."""
        if self.command:
            name, self.command = self.command, ""
            _load(name).add(self)
            options.add_common(self)


def make_parser() -> options.Parser:
    """The parser of the whole command line, for whoever describes it."""
    parser, commands = _outline()
    for command in commands:
        command.fill()
    return parser


def _outline() -> tuple[options.Parser, list[_CommandParser]]:
    """The parser, in which each command describes itself when it is parsed."""
    parser = options.Parser(prog="splicer", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "--version", action="version", version=f"splicer {__version__}", help="print the version and exit"
    )
    options.add_common(parser)
    # For completion, which describes all of it.
    parser.set_defaults(make_parser=make_parser)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_CommandParser
    )
    children = []
    for name, summary in COMMANDS.items():
        child = commands.add_parser(name, help=summary)
        child.command = name
        children.append(child)
    return parser, children


def main(
    argv: Sequence[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Run one command and return its exit code. What is not given is taken from the process."""
    _open_closed_streams()
    argv = sys.argv[1:] if argv is None else argv
    environ = os.environ if environ is None else environ
    out = sys.stdout if stdout is None else stdout
    err = sys.stderr if stderr is None else stderr
    # Known before the command line is, so that a mistake in it is shown as asked for.
    debug = _wants_debug(argv, environ)
    palette = Palette(wants_colour("auto", err, environ))
    arguments: argparse.Namespace | None = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            arguments = _outline()[0].parse_args(argv)
        choice = cast(ColourChoice, getattr(arguments, "color", "auto"))
        palette = Palette(wants_colour(choice, err, environ))
        if arguments.command is None:
            raise SplicerError("which command?", hint="splicer --help", exit_code=USAGE)
        context = Context(out, err, environ, Palette(wants_colour(choice, out, environ)), palette)
        code: int = _load(arguments.command).execute(arguments, context)
        out.flush()
        return code
    except SystemExit as leave:  # --help and --version
        return leave.code if isinstance(leave.code, int) else OK
    except BrokenPipeError:
        # Whoever reads our output has seen enough, as in `splicer flows | head`. Python would complain once
        # more when it flushes the stream at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except SplicerError as error:
        # What this host or the command line lacks was expected, and needs no traceback.
        if debug and error.exit_code == FAILURE:
            traceback.print_exc(file=err)
        _report(_complete(error, arguments, argv, environ), err, palette)
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc(file=err)
        hint = "this is a bug in splicer; report it with what this shows: splicer --debug ..."
        _report(SplicerError(f"internal error ({type(error).__name__}: {error})", hint=hint), err, palette)
        return FAILURE


def _complete(
    error: SplicerError, arguments: argparse.Namespace | None, argv: Sequence[str], environ: Mapping[str, str]
) -> SplicerError:
    """The error with what only the command line knows: the arguments to repeat, and what a daemon left."""
    if arguments is None:
        return error
    if error.exit_code == NOT_RUNNING:
        with contextlib.suppress(SplicerError):  # a mistake in the configuration is not what it was about
            pin_dir = options.read_settings(arguments, environ, only=("pin_dir",)).settings.pin_dir
            return leftovers.mention(error, pin_dir)
    elif error.hint:
        hint = invocation.repeat_as_root(error.hint, arguments.command or "", argv)
        return SplicerError(error.message, hint=hint, exit_code=error.exit_code)
    return error


def _open_closed_streams() -> None:
    """Whoever starts us with `2>&-` must not have the next file that is opened take the place of stderr."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _wants_debug(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    return "--debug" in argv or environ.get(variable_of("debug"), "").strip().lower() in (
        "1",
        "true",
        "yes",
        "on",
    )


def _report(error: SplicerError, stream: TextIO, palette: Palette) -> None:
    for line in error.lines():
        name, colon, rest = printable(line).partition(":")
        stream.write(palette.paint(name + colon, "red" if name == "splicer" else "cyan") + rest + "\n")
    stream.flush()
