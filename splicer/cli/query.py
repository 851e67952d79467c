# SPDX-License-Identifier: Apache-2.0
"""What the commands that ask the daemon share: the question, and reading the answer with care.

The daemon may be of another version than the command: an unknown schema is refused, a missing key is nothing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from splicer.daemon import control, instance
from splicer.errors import NOT_RUNNING, OK, SplicerError
from splicer.model import SCHEMA

from .context import Context
from .options import resolve_settings, spell_run_dir


def ask(
    run_dir: str,
    command: str,
    fields: Mapping[str, object] | None = None,
    *,
    timeout: float = 10.0,
    patience: float | None = None,
) -> dict[str, object]:
    """The daemon's answer, within `timeout` seconds, that begins within `patience` seconds, the same if it is
    not given.

    Raises SplicerError, with exit code 3 when no daemon is running in `run_dir`.
    """
    with _who_holds(run_dir, command):
        return _require_schema(control.request(run_dir, command, fields, timeout=timeout, patience=patience))


def show(
    arguments: argparse.Namespace,
    context: Context,
    command: str,
    render: Callable[[Mapping[str, object]], Sequence[str]],
    fields: Mapping[str, object] | None = None,
    *,
    patience: float | None = None,
) -> int:
    """Print the daemon's answer: as it is with --json, else the lines that `render` makes of it. The exit
    code. Raises SplicerError as `ask` does."""
    settings = resolve_settings(arguments, context, only=("run_dir",)).settings
    answer = ask(settings.run_dir, command, fields, patience=patience)
    if arguments.json:
        context.write_json(answer)
    else:
        context.write(render(answer))
    return OK


def ask_rows(
    run_dir: str,
    command: str,
    name: str,
    fields: Mapping[str, object] | None = None,
    *,
    timeout: float = 10.0,
    patience: float | None = None,
    idle: Callable[[], None] | None = None,
) -> tuple[dict[str, object], Iterator[Mapping[str, object]]]:
    """The daemon's answer without its rows, and those, which it calls `name`, as they come: there may be more
    than one wants to have in memory. `patience`, in seconds, is for the beginning, the same as `timeout` if
    it is not given, and `timeout` for each further part. `idle` is called whenever there is nothing new.

    Raises SplicerError as `ask` does, also as one goes through the rows.
    """
    with _who_holds(run_dir, command):
        answer, rows = control.request_rows(
            run_dir, command, name, fields, timeout=timeout, patience=patience, idle=idle
        )
    return _require_schema(answer), rows


@contextlib.contextmanager
def _who_holds(run_dir: str, command: str) -> Iterator[None]:
    try:
        yield
    except SplicerError as error:
        if error.exit_code == NOT_RUNNING and (holder := instance.find_holder(run_dir)) is not None:
            raise SplicerError(
                f"not serving: starting, stopping or unloading ({holder.describe()})",
                hint=f"try again in a moment: splicer {command}{spell_run_dir(run_dir)}",
                exit_code=NOT_RUNNING,
            ) from error
        raise


def _require_schema(answer: dict[str, object]) -> dict[str, object]:
    if answer.get("schema") != SCHEMA:
        raise SplicerError(
            f"the daemon speaks another schema ({answer.get('schema')} and not {SCHEMA})",
            hint="restart the daemon, so that it and the command have the same version",
        )
    return answer


def number(table: Mapping[str, object], key: str) -> int:
    """A count out of an answer; 0 when it is missing."""
    value = table.get(key)
    return int(value) if isinstance(value, int | float) else 0


def seconds(table: Mapping[str, object], key: str) -> float:
    """A duration in seconds out of an answer; 0 when it is missing."""
    value = table.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def text(table: Mapping[str, object], key: str) -> str:
    """A string out of an answer; empty when it is missing."""
    value = table.get(key)
    return value if isinstance(value, str) else ""


def section(table: Mapping[str, object], key: str) -> dict[str, object]:
    """An object out of an answer; empty when it is missing."""
    value = table.get(key)
    return value if isinstance(value, dict) else {}


def sections(table: Mapping[str, object], key: str) -> list[dict[str, object]]:
    """A list of objects out of an answer; what is none is left out."""
    value = table.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def texts(table: Mapping[str, object], key: str) -> list[str]:
    """A list of strings out of an answer; what is none is left out."""
    value = table.get(key)
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
