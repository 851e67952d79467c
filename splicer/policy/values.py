# SPDX-License-Identifier: Apache-2.0
"""Kinds of values in settings and rules: what is accepted, and how a mistake is named."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from splicer.errors import USAGE, SplicerError


@dataclass(frozen=True)
class ValueType:
    """A type of value: what is accepted, in words; how TOML's value is checked; how text is read."""

    accepted: str
    check: Callable[[object], bool]
    # Raises ValueError for text that cannot be read. The outcome still goes through `check`.
    read: Callable[[str], object] = field(default=lambda text: text)


def choice(values: Sequence[str]) -> ValueType:
    """One of several words."""
    return ValueType(
        ", ".join(values[:-1]) + " or " + values[-1], lambda value: isinstance(value, str) and value in values
    )


def integer(low: int, high: int) -> ValueType:
    """A whole number between two others, which are accepted too."""
    # bool is an int to Python and not to anybody else.
    return ValueType(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        int,
    )


def seconds(low: float, high: float) -> ValueType:
    """A duration in seconds, with or without a fraction."""
    return ValueType(
        f"seconds, from {low:g} to {high:g}",
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and low <= value <= high
        ),
        float,
    )


def is_text(value: object) -> bool:
    """True for text that is not empty and that any file system call or file could carry."""
    # The rest is better refused here, where its source can be named.
    return isinstance(value, str) and bool(value) and value.isprintable()


def _read_switch(text: str) -> bool:
    try:
        return {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


PATH = ValueType("a path", is_text)
SWITCH = ValueType("true or false", lambda value: isinstance(value, bool), _read_switch)


def check_value(kind: ValueType, value: object, source: str, given: object) -> object:
    """`value` if it is of this kind. Raises SplicerError that names `source` and shows `given` if not."""
    if not kind.check(value):
        raise refuse(source, given, kind.accepted)
    return value


def refuse(source: str, given: object, accepted: str) -> SplicerError:
    """The complaint about a bad value."""
    return SplicerError(
        f"bad value for {source}: {show(given)}", hint=f"accepted: {accepted}", exit_code=USAGE
    )


def show(value: object) -> str:
    """A value as the file or the command line has it, or nearly so."""
    return json.dumps(value, default=str)


def refuse_key(key: str, place: str, known: Collection[str]) -> SplicerError:
    """The complaint about a key that nobody knows, with the one that may have been meant."""
    near = difflib.get_close_matches(key, known, n=1)
    meant = f'did you mean "{near[0]}"? ' if near else ""
    return SplicerError(
        f'unknown key "{key}" in {place}', hint=f"{meant}accepted keys: {', '.join(known)}", exit_code=USAGE
    )


def render_value(value: object) -> str:
    """A value as TOML."""
    # JSON's strings, numbers and booleans are TOML's, as long as nothing but the printable is in the strings.
    return json.dumps(value, ensure_ascii=False)
