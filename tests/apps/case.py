# SPDX-License-Identifier: Apache-2.0
"""What a case is: which programs it takes, how it is run, and what splicer ought to do with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apps.stage import Stage

# nginx, haproxy and others are in sbin, which is not in every user's PATH.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failed(Exception):
    """A program did not do what it does over plain TCP."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a run. `facts` must be the same plain and spliced, `measures` are for information."""

    summary: str
    facts: dict[str, Any]
    measures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Stage], Outcome]
    # Names of commands, found in SEARCH_PATH.
    programs: tuple[str, ...] = ()
    # True: messages must have been redirected. None: may be, what the case does decides it by chance.
    redirects: bool | None = True
    # If any: at least one connection must have been left plain for one of these (splicer flows --help).
    reasons: frozenset[str] = frozenset()
    # Further options of `splicer run`.
    settings: tuple[str, ...] = ()
    # Names what is missing besides programs.
    find_missing: Callable[[], list[str]] = list
    # Given the facts of two runs that differ: the case that repeats only what differs, or None.
    narrow: Callable[[dict[str, Any], dict[str, Any]], Case | None] = lambda _plain, _spliced: None
    # Why splicing is as it is here, for people.
    remark: str = ""
    # The row of KNOWN_ISSUES.md if the outcome may differ; what differs is shown and counts as agreement.
    known: str = ""

    def name_missing(self) -> list[str]:
        """What this machine lacks for the case."""
        missing = [name for name in self.programs if find_program(name) is None]
        return missing + self.find_missing()

    def belongs_to(self, group: str) -> bool:
        """java-channel and java-stream belong to `java`."""
        return self.name.startswith(f"{group}-")


def find_program(name: str) -> str | None:
    """The path of a command, or None."""
    return shutil.which(name, path=SEARCH_PATH)
