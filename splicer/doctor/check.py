# SPDX-License-Identifier: Apache-2.0
"""What a check is, what comes of it, and what comes of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from splicer.doctor.surroundings import Surroundings
from splicer.errors import FAILURE, OK, UNSUPPORTED, SplicerError
from splicer.text import plural

AS_ROOT = "sudo splicer doctor"
_ANSWERED = {"kernel": "", "splicer": ", answered", "nobody": ", not answered", "": ""}


class State(StrEnum):
    """How it stands with what a check is about. A warning is something that is worse than it could be."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Outcome:
    """`text` says in one line what was found, `mend` what to do about it: best of all a command. `more` are
    things that were found, one by one."""

    state: State
    text: str
    mend: str = ""
    more: tuple[str, ...] = ()


def ok(text: str) -> Outcome:
    return Outcome(State.OK, text)


def warn(text: str, mend: str | None = None) -> Outcome:
    return Outcome(State.WARN, text, mend or "")


def fail(text: str, mend: str | None = None) -> Outcome:
    return Outcome(State.FAIL, text, mend or "")


def unknown(text: str, mend: str | None = None) -> Outcome:
    return Outcome(State.UNKNOWN, text, mend or "")


@dataclass(frozen=True)
class Check:
    """`function` looks. A SplicerError that it raises is what `splicer run` would end with, word for word.

    `is_needed`: without it splicer cannot run, and whether it can is not known where this is not. One that is
    not needed never fails. `privileged`: only who may load BPF programs can find out.
    """

    name: str
    function: Callable[[Surroundings], Outcome]
    is_needed: bool = True
    privileged: bool = False

    def look(self, surroundings: Surroundings) -> Outcome:
        """Raises nothing: the others are to be looked at as well."""
        if self.privileged and surroundings.why_not_tried:
            return unknown(f"not tried: {surroundings.why_not_tried}", AS_ROOT)
        try:
            return self.function(surroundings)
        except SplicerError as error:
            return (fail if self.is_needed else warn)(error.message, error.hint)
        except OSError as error:
            return unknown(f"could not be found out: {error.strerror or error}")
        except Exception as error:  # a library that lacks a function, for one
            return unknown(f"this is a bug in splicer ({type(error).__name__}: {error})", "report it")


@dataclass(frozen=True)
class Result:
    """A check and its outcome."""

    name: str
    is_needed: bool
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "needed": self.is_needed, **asdict(self.outcome)}


def examine(checks: Iterable[Check], surroundings: Surroundings) -> Iterator[Result]:
    """Look at one after the other."""
    for check in checks:
        yield Result(check.name, check.is_needed, check.look(surroundings))


@dataclass(frozen=True)
class Verdict:
    """Can this host run splicer? `can_run` is None where that is not known. `kernel_class` and `fionread` are
    as in class Status of model.py, and empty where they are not known."""

    can_run: bool | None
    words: str
    exit_code: int
    kernel_class: str = ""
    fionread: str = ""


def judge(results: Iterable[Result], surroundings: Surroundings) -> Verdict:
    """What all results come to."""
    results = list(results)
    kernel_class, fionread = surroundings.find_class(), surroundings.find_who_answers()

    def name(state: State, most: int) -> str:
        found = [each.name for each in results if each.is_needed and each.outcome.state is state]
        return ", ".join(found[:most]) + (" and others" if len(found) > most else "")

    if failed := name(State.FAIL, 2):
        words = f"This host cannot run splicer: {failed}"
        return Verdict(False, words, UNSUPPORTED, kernel_class, fionread)
    if missed := name(State.UNKNOWN, 1):
        words = f"Whether this host can run splicer is not known: {missed}"
        if surroundings.why_not_tried and surroundings.uid != 0:
            words = f"Whether this host can run splicer only root can tell: {AS_ROOT}"
        return Verdict(None, words, FAILURE, kernel_class, fionread)
    words = f"This host can run splicer: FIONREAD class {kernel_class}{_ANSWERED[fionread]}"
    if warnings := sum(each.outcome.state is State.WARN for each in results):
        words += f" ({plural(warnings, 'warning')})"
    return Verdict(True, words, OK, kernel_class, fionread)
