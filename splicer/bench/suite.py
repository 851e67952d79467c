# SPDX-License-Identifier: Apache-2.0
"""What a suite gets, and what it hands back.

A suite is a module of this room with a function `run(workshop: Workshop) -> Findings`, and a row of SUITES in
suites.py. Lines of its tables go through `workshop.write` as they are known; nothing is printed elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from splicer.bench.progress import Progress
from splicer.bench.results import Row
from splicer.bench.splicing import Splicer, find_splicer, refuse_company
from splicer.bench.testbed import Testbed


@dataclass(frozen=True)
class Options:
    """What the user asked for. None: the suite's own default. `seconds` are those of a leg, `pairs` the
    number of spliced legs, `splicer` the path of another splicer's command."""

    pairs: int = 5
    seconds: float | None = None
    connections: int | None = None
    threads: int = 1
    workers: int = 1
    only: tuple[str, ...] = ()
    mode: str | None = None
    programs: bool = False
    baseline: bool = False
    check: bool = False
    splicer: str | None = None
    driver: str = "mysqlclient"
    python: str = "/usr/bin/python3"


@dataclass(frozen=True)
class Comparison:
    """Something that was measured plain and spliced: its metrics, the one that the verdict is about first.
    `redirected`: messages that went past TCP in the spliced legs; None where nobody counted."""

    name: str
    title: str
    rows: Sequence[Row]
    redirected: int | None = None


@dataclass
class Findings:
    """`document` is the suite's part of the JSON, under `key`. `comparisons` are what verdict and pictures
    are made of. `failures` make the exit code 1. `notes` are said after the verdict."""

    key: str
    document: Any
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load: dict[str, Any] = field(default_factory=dict)


class Workshop:
    """Where a suite works."""

    def __init__(self, options: Options, progress: Progress, write: Callable[[str], None]) -> None:
        """`write` takes text for people, of one line or several."""
        self.options = options
        self.progress = progress
        self._write = write

    def write(self, text: str) -> None:
        """Show something, in the place of the progress bar."""
        self.progress.clear()
        self._write(text)

    @contextlib.contextmanager
    def splicing(self, arguments: Sequence[str] = (), *, timed: bool = False) -> Iterator[Splicer]:
        """Namespaces, a cgroup, and a daemon to be started on them; all of it is gone afterwards. `arguments`
        are for `splicer run`; `timed`: the kernel times the programs. Raises SplicerError."""
        with Testbed() as bed:
            command = find_splicer(self.options.splicer)
            refuse_company(command)
            mode = ["--mode", self.options.mode] if self.options.mode else []
            yield Splicer(bed, command, [*mode, *arguments], timed)
