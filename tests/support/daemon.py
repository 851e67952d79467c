# SPDX-License-Identifier: Apache-2.0
"""The daemon under test, started as its users start it and asked through its control socket."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.pauses import SLOWNESS, Stopwatch

# A directory that outlives this run, for those who start many.
CACHE_VARIABLE = "SPLICER_TEST_CACHE"
REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0 * SLOWNESS  # seconds
STOP_TIMEOUT = 15.0 * SLOWNESS  # seconds


def command_line(*arguments: str) -> list[str]:
    """How to call splicer from this source tree."""
    return [sys.executable, "-m", "splicer", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a call: ours without SPLICER_* variables, with the source tree importable, and with
    what this run has compiled."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPLICER_")}
    kept["SPLICER_CACHE_DIR"] = find_cache()
    inherited = kept.get("PYTHONPATH")
    kept["PYTHONPATH"] = f"{REPOSITORY}:{inherited}" if inherited else str(REPOSITORY)
    return kept | changes


@functools.cache
def find_cache() -> str:
    """Where splicer keeps what it compiles in this test run, so that each program is compiled once and not at
    each start. It goes when the run ends; support/leftovers.py finds that of one that was killed."""
    if kept := os.environ.get(CACHE_VARIABLE):
        return kept
    directory = tempfile.mkdtemp(prefix=f"splicer-test-{os.getpid()}-cache-")
    owner = os.getpid()  # a fork has the same exit handlers

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(remove)
    return directory


@dataclass(frozen=True)
class Outcome:
    """How a finished command ended."""

    code: int
    stdout: str
    stderr: str


def call(*arguments: str, prefix: tuple[str, ...] = (), timeout: float = 20.0, **changes: str) -> Outcome:
    """Run a splicer command to its end. `prefix` goes before it, `changes` into its environment."""
    done = subprocess.run(
        [*prefix, *command_line(*arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout * SLOWNESS,
        cwd="/",
        env=environment(**changes),
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class ControlError(Exception):
    """The daemon answered that a command failed."""


def ask(run_dir: Path, name: str, timeout: float = 10.0, **fields: Any) -> Any:
    """One command over the control socket of `run_dir`. Raises ControlError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout * SLOWNESS)
        sock.connect(str(run_dir / "control.sock"))
        sock.sendall(json.dumps({"command": name, **fields}).encode() + b"\n")
        answer = json.loads(sock.makefile("rb").readline())
    if not answer["ok"]:
        raise ControlError(answer)
    return answer["result"]


class Daemon:
    """A `splicer run` process."""

    def __init__(
        self, cgroup: Path, run_dir: Path, pin_dir: Path, *arguments: str, prefix: tuple[str, ...] = ()
    ) -> None:
        self.run_dir = run_dir
        self.pin_dir = pin_dir
        self.ready_file = run_dir.with_name(f"{run_dir.name}.ready")
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self.arguments = [
            "run",
            f"--cgroup={cgroup}",
            f"--run-dir={run_dir}",
            f"--pin-dir={pin_dir}",
            f"--ready-file={self.ready_file}",
            # Whatever containers this machine runs are not these tests' business.
            "--docker=off",
            *arguments,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command_line(*self.arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment(),
            )
        self.pid = self.process.pid
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tail(self, lines: int = 60) -> str:
        """The last lines of what it wrote; nothing if its directory is gone already."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def command(self, name: str, timeout: float = 10.0, **fields: Any) -> Any:
        """Ask over the control socket. Raises ControlError, OSError."""
        return ask(self.run_dir, name, timeout, **fields)

    def status(self) -> dict[str, Any]:
        return dict(self.command("status"))

    def flows(self, **fields: Any) -> list[dict[str, Any]]:
        return list(self.command("flows", **fields)["flows"])

    def drain(self) -> None:
        """Take every pair out of the SOCKHASH and let it be adopted again at once."""
        self.command("drain")

    def totals(self) -> dict[str, Any]:
        return dict(self.status()["totals"])

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        return self.process.wait(timeout)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        if self.alive:
            self.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """End it without asking."""
        if self.alive:
            self.process.kill()
        self.process.wait()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if not self.alive:
                raise RuntimeError(f"splicer run ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"splicer run was not ready after {START_TIMEOUT} s:\n{self.tail()}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            return self.ready_file.read_text().strip() == str(self.pid)
        except FileNotFoundError:
            return False


def wait_until(what: str, condition: Any, timeout: float = 5.0, pause: float = 0.02) -> Any:
    """The first true value of `condition()`. Raises AssertionError naming `what` after `timeout` seconds, not
    counting pauses of the machine."""
    with Stopwatch() as watch:
        while True:
            value = condition()
            if value:
                return value
            assert watch.seconds < timeout, f"not within {timeout} s: {what}"
            time.sleep(pause)
