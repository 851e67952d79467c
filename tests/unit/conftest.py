# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests: the command line without a process, a run directory, a log to read."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from splicer.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What an invocation of the command line left behind."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Call `splicer ARGUMENTS` in this process, with an empty environment unless one is given."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str, environ: Mapping[str, str] | None = None) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        code = main(arguments, environ=environ or {}, stdout=out, stderr=err)
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def run_dir() -> Iterator[str]:
    """A run directory with a path short enough for a unix socket."""
    directory = tempfile.mkdtemp(prefix="splicer-")
    yield directory
    shutil.rmtree(directory)


class Log:
    """A logger that keeps its events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, object]]] = []

    def names(self) -> list[str]:
        return [event for _, event, _ in self.events]

    def _note(self, level: str, event: str, /, **keys: object) -> None:
        self.events.append((level, event, keys))

    debug = partialmethod(_note, "debug")
    info = partialmethod(_note, "info")
    warning = partialmethod(_note, "warning")
    error = partialmethod(_note, "error")
    exception = partialmethod(_note, "exception")


@pytest.fixture
def log() -> Log:
    return Log()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


@pytest.fixture
def proc(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory that stands in for /proc/self."""

    def make(effective: int, uid_map: str = "         0          0 4294967295\n") -> Path:
        directory = tmp_path / "proc"
        directory.mkdir()
        (directory / "status").write_text(f"Name:\tx\nCapPrm:\t{effective:016x}\nCapEff:\t{effective:016x}\n")
        (directory / "uid_map").write_text(uid_map)
        return directory

    return make
