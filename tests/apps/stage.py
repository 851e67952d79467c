# SPDX-License-Identifier: Apache-2.0
"""Where the programs of a case run: as nobody, in network namespaces and a cgroup of their own."""

from __future__ import annotations

import hashlib
import os
import pwd
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from support.cgroup import Cgroup
from support.lab import Lab

from apps.case import SEARCH_PATH, Failed, find_program

STOP_TIMEOUT = 8.0  # seconds
PROGRAMS = Path(__file__).with_name("programs")
# Moves itself into the cgroup ($1) first, so that no socket is made outside.
ENTER = 'echo 0 >"$1" && shift && exec "$@"'


class Network:
    """The hosts `a` and `b` of support/lab.py, and `alone`, which has nothing but a loopback."""

    def __init__(self) -> None:
        self._lab = Lab()
        self._alone = f"{self._lab.prefix}-alone"
        try:
            subprocess.run(["ip", "netns", "add", self._alone], check=True)
            subprocess.run(["ip", "-n", self._alone, "link", "set", "lo", "up"], check=True)
        except BaseException:
            self.remove()
            raise

    def namespace(self, host: str) -> str:
        return self._alone if host == "alone" else self._lab.namespace(host)

    @staticmethod
    def address(host: str) -> str:
        return Lab.address("lo" if host == "alone" else host)

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self._alone], check=False, stderr=subprocess.DEVNULL)
        self._lab.remove()


@dataclass(frozen=True)
class Running:
    """A program that was started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    stop_signal: int

    def tail(self, lines: int = 12) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Stage:
    """One run of a case. `close` ends its programs; the directory belongs to the caller."""

    def __init__(
        self, network: Network, cgroup: Cgroup, directory: Path, shared: Path, seconds: float
    ) -> None:
        """`shared` outlives the run, for what is dear to make; `seconds` is how long load may last."""
        self.cgroup = cgroup
        self.directory = directory
        self.shared = shared
        self.seconds = seconds
        self._network = network
        self._running: list[Running] = []
        self._user = pwd.getpwnam("nobody")
        self.own(directory)

    @staticmethod
    def address(host: str) -> str:
        return Network.address(host)

    def own(self, path: Path) -> Path:
        """Give a file or directory to the user the programs run as."""
        os.chown(path, self._user.pw_uid, self._user.pw_gid)
        return path

    def place(self, name: str) -> Path:
        """A new directory for a program."""
        return self.own_directory(self.directory / name)

    def own_directory(self, path: Path) -> Path:
        """A new directory for a program, somewhere else than in the run's own."""
        path.mkdir()
        return self.own(path)

    def write(self, name: str, text: str) -> Path:
        """A file for a program."""
        path = self.directory / name
        path.write_text(text)
        return self.own(path)

    # -- programs ------------------------------------------------------------------------------------------

    def start(
        self,
        *command: str | Path,
        host: str = "a",
        environment: Mapping[str, str] | None = None,
        stop_signal: int = signal.SIGTERM,
    ) -> Running:
        """Start a program in the background. Raises Failed if it is not installed."""
        name = f"{len(self._running):02d}-{Path(command[0]).name}"
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            process = self._spawn(command, host, environment, output, subprocess.DEVNULL)
        self._running.append(Running(name, process, log, stop_signal))
        return self._running[-1]

    def call(
        self,
        *command: str | Path,
        host: str = "b",
        timeout: float = 60.0,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        codes: tuple[int, ...] = (0,),
    ) -> str:
        """Run a program to its end; what it wrote to stdout.

        Raises Failed if it takes longer than `timeout` seconds or does not end with one of `codes`.
        """
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
            given.write(stdin)
            given.seek(0)
            process = self._spawn(command, host, environment, subprocess.PIPE, given, errors)
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                raise Failed(
                    f"{_name(command)} did not end within {timeout:g} s: {_shorten(output)}"
                ) from None
            errors.seek(0)
            if process.returncode not in codes:
                said = _shorten(errors.read()) or _shorten(output)
                raise Failed(f"{_name(command)} ended with {process.returncode}: {said}")
        return output.decode(errors="replace")

    def digest(self, *command: str | Path, host: str = "b", timeout: float = 60.0) -> tuple[int, str]:
        """Run a program to its end; how many bytes it wrote to stdout, and their SHA-256. Raises Failed."""
        sink = self.directory / f"digest-{time.monotonic_ns()}"
        with sink.open("wb") as output, tempfile.TemporaryFile() as errors:
            process = self._spawn(command, host, None, output, subprocess.DEVNULL, errors)
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                got = sink.stat().st_size
                raise Failed(f"{_name(command)} stalled: {got} bytes within {timeout:g} s") from None
            errors.seek(0)
            if code:
                raise Failed(f"{_name(command)} ended with {code}: {_shorten(errors.read())}")
        size, checksum = sink.stat().st_size, hash_file(sink)
        sink.unlink()
        return size, checksum

    def wait_listening(self, running: Running, port: int, host: str = "a", timeout: float = 15.0) -> None:
        """Return when a port of a host is listened on; no connection is made. Raises Failed."""
        deadline = time.monotonic() + timeout
        while not self._is_listening(host, port):
            if running.process.poll() is not None:
                raise Failed(f"{running.name} ended with {running.process.returncode}: {running.tail()}")
            if time.monotonic() > deadline:
                raise Failed(f"{running.name} does not listen on port {port}: {running.tail()}")
            time.sleep(0.02)

    def check_alive(self) -> None:
        """Raises Failed if a program in the background has ended."""
        for each in self._running:
            if each.process.poll() is not None:
                raise Failed(f"{each.name} ended with {each.process.returncode}: {each.tail()}")

    def stop(self, running: Running) -> None:
        """End a program and wait for it."""
        if running.process.poll() is None:
            running.process.send_signal(running.stop_signal)
        try:
            running.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
        if running in self._running:
            self._running.remove(running)

    def close(self) -> None:
        """End what was started, the last first, and then whatever that has started."""
        while self._running:
            self.stop(self._running[-1])
        for pid in self.cgroup.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    # ------------------------------------------------------------------------------------------------------

    def _spawn(
        self,
        command: tuple[str | Path, ...],
        host: str,
        environment: Mapping[str, str] | None,
        stdout: int | IO[bytes],
        stdin: int | IO[bytes],
        stderr: int | IO[bytes] = subprocess.STDOUT,
    ) -> subprocess.Popen[bytes]:
        program = find_program(str(command[0]))
        if program is None:
            raise Failed(f"{command[0]} is not installed")
        enter = ["sh", "-c", ENTER, "sh", str(self.cgroup.path / "cgroup.procs")]
        enter += ["nsenter", f"--net=/run/netns/{self._network.namespace(host)}"]
        enter += ["setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups"]
        return subprocess.Popen(
            [*enter, program, *map(str, command[1:])],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=self.directory,
            env={
                "PATH": SEARCH_PATH,
                "HOME": str(self.directory),
                "TMPDIR": str(self.directory),
                "LANG": "C.UTF-8",
                **(environment or {}),
            },
        )

    def _is_listening(self, host: str, port: int) -> bool:
        done = subprocess.run(
            ["ip", "netns", "exec", self._network.namespace(host), "cat", "/proc/net/tcp", "/proc/net/tcp6"],
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        return any(
            len(row) > 3 and row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port for row in rows
        )


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(command: tuple[str | Path, ...]) -> str:
    return Path(command[0]).name


def _shorten(text: bytes) -> str:
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-4:])[-400:]
