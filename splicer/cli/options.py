# SPDX-License-Identifier: Apache-2.0
"""The parser class and the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from splicer.errors import USAGE, SplicerError
from splicer.policy.config import (
    CONFIG_VARIABLE,
    VALUE_TYPES,
    Resolved,
    find_unknown_variables,
    option_of,
    resolve,
)
from splicer.policy.values import ValueType, check_value, integer, seconds

from .context import Context

COLOUR_CHOICES = ("auto", "always", "never")
# Who asks has an answer, or an error, within two seconds, also of a daemon that was stopped: a health check
# waits no longer. With 10 000 connections the daemon takes a tenth of it.
QUICK_S = 1.5


class Parser(argparse.ArgumentParser):
    """Reports mistakes as SplicerError, and can put off making the end of its help until it is asked for."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        keywords.setdefault("allow_abbrev", False)
        super().__init__(*arguments, **keywords)
        self.make_epilog: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = self.make_epilog()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise SplicerError(message, hint=f"{self.prog} --help", exit_code=USAGE)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that may stand before and after the command; absent ones set nothing in either place."""
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--color",
        choices=COLOUR_CHOICES,
        default=argparse.SUPPRESS,
        help="colour in the output; auto, the default, means on a terminal unless NO_COLOR is set",
    )
    group.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show tracebacks, debug events and the verifier's whole log",
    )


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help='one JSON object with "schema": 1')


def add_asking(parser: argparse.ArgumentParser, *, patient: bool = False) -> None:
    """What a command has that prints an answer of the daemon. `patient`: one may say how long to wait."""
    add_json(parser)
    if patient:
        add_timeout(parser)
    add_run_dir(parser)
    add_config(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"read settings from a TOML file ({CONFIG_VARIABLE}); see splicer run --help",
    )


def add_run_dir(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--run-dir", metavar="DIR", help="run directory of the daemon (default: /run/splicer)"
    )


def add_pin_dir(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--pin-dir", metavar="DIR", help="where programs and maps are pinned (default: /sys/fs/bpf/splicer)"
    )


def add_stop_timeout(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--stop-timeout",
        metavar="SECONDS",
        help="how long spliced connections may take to go back to plain TCP (default: 5)",
    )


def resolve_settings(
    arguments: argparse.Namespace, context: Context, *, only: Collection[str] | None = None
) -> Resolved:
    """Settings from the parsed command line, the environment and the configuration file. Says on stderr which
    variables nobody knows."""
    for unknown in find_unknown_variables(context.environ):
        context.stderr.write(context.error_palette.paint("splicer:", "yellow") + f" {unknown.describe()}\n")
    return read_settings(arguments, context.environ, only=only)


def read_settings(
    arguments: argparse.Namespace, environ: Mapping[str, str], *, only: Collection[str] | None = None
) -> Resolved:
    """The same, without a word."""
    options = {name: getattr(arguments, name, None) for name in VALUE_TYPES}
    return resolve(options, environ, config_file=getattr(arguments, "config", None), only=only)


def add_timeout(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        help="how long to wait for the daemon's answer (default: 1.5)",
    )


def read_timeout(arguments: argparse.Namespace) -> float:
    """Seconds that the daemon may take to answer."""
    if arguments.timeout is None:
        return QUICK_S
    return float(str(read_value(seconds(0.1, 3600), arguments.timeout, "--timeout")))


def read_value(kind: ValueType, given: str, option: str) -> object:
    """What was given with an option that is no setting. Raises SplicerError with exit code 2."""
    try:
        value = kind.read(given)
    except ValueError:
        value = None
    return check_value(kind, value, option, given)


def read_whole(given: str | None, option: str, least: int, most: int) -> int | None:
    """A whole number of an option that is no setting, None if it was not given. Raises SplicerError with exit
    code 2."""
    return None if given is None else int(str(read_value(integer(least, most), given, option)))


def spell_run_dir(run_dir: str) -> str:
    """The option to put behind a command in a hint: empty for the default directory."""
    return "" if run_dir == "/run/splicer" else f" {option_of('run_dir')} {run_dir}"
