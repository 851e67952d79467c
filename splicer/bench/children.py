# SPDX-License-Identifier: Apache-2.0
"""Programs of the user's that are run for a leg, and leave nothing behind however the leg ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from splicer.bench.testbed import make_entry, signals_blocked, signals_ignored
from splicer.errors import SplicerError

# How often whoever waits is told so, and how long a program may take to end when it is asked to.
GLANCE, PATIENCE = 1.0, 5.0
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def run_child(command: Sequence[str], tick: Callable[[], None]) -> str:
    """What it prints. `tick` is called once a second, and whatever that raises ends the program.

    Raises SplicerError if it cannot be run or fails.
    """
    with _make_buffer("stdout") as out, _make_buffer("stderr") as err:
        with contextlib.ExitStack() as ending:
            with signals_blocked():
                child = _start(command, out, err)
                ending.callback(end_group, child)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GLANCE)
                    break
                tick()
        said, complaint = (_read(file) for file in (out, err))
    if child.returncode != 0:
        last = (complaint or said).splitlines()[-1:] or ["it printed nothing"]
        raise SplicerError(f"{Path(command[0]).name} failed with {child.returncode} ({last[0]})")
    return said


def _start(command: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            # Ctrl-C is for us, who then end it with all that it has started.
            start_new_session=True,
            preexec_fn=make_entry(None, None, signal.SIGKILL),
        )
    except OSError as error:
        raise SplicerError(f"cannot run {command[0]} ({error.strerror})") from error


def _make_buffer(name: str) -> IO[bytes]:
    """A file that is in no directory: in a read-only container none can be written to."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a program that leads a group, and those that are left of the group."""
    with signals_ignored():
        if child.poll() is None:
            _signal(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
        _signal(child.pid, signal.SIGKILL)
        child.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def find_number(text: str, command: str) -> float:
    """The last one in the last line. Raises SplicerError if there is none, or none that has ratios."""
    lines = text.splitlines()
    found = _NUMBER.findall(lines[-1].replace(",", "")) if lines else []
    if not found:
        raise SplicerError(
            f"the last line that the command prints has no number ({lines[-1][:60] if lines else 'nothing'})",
            hint=f"have it end with one: {command} | tail -1",
        )
    if (number := float(found[-1])) <= 0:
        raise SplicerError(f"a ratio needs numbers above 0 ({found[-1]})", hint="print another measure")
    return number
