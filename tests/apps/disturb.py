# SPDX-License-Identifier: Apache-2.0
"""What `blocking = "allow"` means for a program: it is disturbed while it waits for bytes on a spliced
connection, and what becomes of it is compared with plain TCP.

A gate (programs/gate.py) stands before the program, or behind it, and holds back what it waits for.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.cgroup import Cgroup
from support.daemon import Daemon
from support.host import Host

from apps.case import Failed, find_program
from apps.sleeper import (
    Sleeper,
    Socket,
    attach,
    find_socket,
    freeze,
    interrupt,
    stop_and_continue,
    wait_for,
)
from apps.stage import PROGRAMS, Network, Running, Stage

GATE_PORT, SERVER_PORT = 7000, 7001
PYTHON = ("/usr/bin/python3", "-P", "-s")
# Questions that are answered before anything is tried; as many messages are redirected.
WARM = 30
WARM_TIMEOUT, ANSWER_TIMEOUT, AGAIN_TIMEOUT = 20.0, 5.0, 15.0  # seconds
# What wakes it without ending anything, and how the table calls it.
WAKINGS = {"signal": "a signal", "stop": "SIGSTOP", "freezer": "freezer", "debugger": "debugger"}
DISTURBANCES = (*WAKINGS, "reset")
SAME, ANSWERED = "as plain", "answered"
NO_SIGNAL = "catches none"


@dataclass(frozen=True)
class Subject:
    """A program to disturb. `start` starts all that is needed, and what asks it questions without end, and
    returns the latter; it waits for the gate by `Scene.open_gate`."""

    name: str
    title: str
    start: Callable[[Scene], Running]
    programs: tuple[str, ...]
    # The signal that it catches, and what for; 0: none.
    signal: int = signal.SIGUSR1
    # How much of a message comes before the rest is held back, in bytes.
    left: int = 4
    find_missing: Callable[[], list[str]] = list

    def name_missing(self) -> list[str]:
        """What this machine lacks for it."""
        missing = [name for name in ("strace", *self.programs) if find_program(name) is None]
        return missing + self.find_missing()


@dataclass(frozen=True)
class Effect:
    """What a disturbance did."""

    asleep: str
    result: str
    again: str

    @property
    def words(self) -> str:
        return self.result if self.again == "same connection" else f"{self.result}; {self.again}"


@dataclass
class Report:
    subject: Subject
    plain: dict[str, Effect] = field(default_factory=dict)
    spliced: dict[str, Effect] = field(default_factory=dict)
    # Why it could not be tried, by disturbance.
    failed: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if all was tried, but for what there is nothing to try."""
        return not self.missing and set(self.failed.values()) <= {NO_SIGNAL}

    @property
    def summary(self) -> str:
        """In a line."""
        if self.missing:
            return f"not installed: {', '.join(self.missing)}"
        return "; ".join(f"{name}: {why}" for name, why in self.failed.items()) or "tried"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.subject.name,
            "missing": list(self.missing),
            "failed": self.failed,
            "plain": {name: asdict(effect) for name, effect in self.plain.items()},
            "spliced": {name: asdict(effect) for name, effect in self.spliced.items()},
        }


class Gate:
    """The gate's controls."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, command: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(ANSWER_TIMEOUT)
            sock.connect(str(self._path))
            sock.sendall(f"{command}\n".encode())
            return dict(json.loads(sock.makefile().readline()))


class Scene:
    """A subject on a stage."""

    def __init__(self, stage: Stage, subject: Subject, daemon: Daemon | None) -> None:
        self.stage = stage
        self.address = stage.address("a")
        self._subject = subject
        self._daemon = daemon
        self._side = ""
        self._gate = Gate(stage.directory / "gate")
        self._frozen = stage.cgroup.child("frozen")
        self._asker = subject.start(self)

    # -- for subjects ---------------------------------------------------------------------------------------

    def open_gate(self, to_port: int, side: str) -> None:
        """Start the gate before the program (`side` is "server") or behind it ("client")."""
        self._side = side
        to = (self.address, str(to_port), side, self.stage.directory / "gate")
        running = self.stage.start(*PYTHON, PROGRAMS / "gate.py", self.address, str(GATE_PORT), *to)
        self.stage.wait_listening(running, GATE_PORT)

    def start_asker(self, kind: str, port: int) -> Running:
        return self.stage.start(*PYTHON, "-u", PROGRAMS / "ask.py", kind, self.address, str(port))

    def start_server(self, port: int, *command: str | Path, stop_signal: int = signal.SIGTERM) -> None:
        running = self.stage.start(*command, stop_signal=stop_signal)
        self.stage.wait_listening(running, port)

    # -- the trial ------------------------------------------------------------------------------------------

    def disturb(self, name: str, link: str) -> Effect:
        """Disturb it while it waits for bytes of a connection. Raises Failed if that cannot be tried."""
        accepted = self._gate.ask("state")["accepted"]
        self._gate.ask(f"hold {self._subject.left}")
        try:
            wait_for("bytes are held back", lambda: self._gate.ask("state")["held"])
            sleeper = self._wait_asleep(link)
            asked = len(self._answers())
            self._wake(name, sleeper)
            self._settle(link)
        finally:
            self._gate.ask("release")
        result = self._wait_answer(asked)
        if result != "ok":
            with contextlib.suppress(Failed):
                self._wait_ok(asked + 1)
        again = self._tell_how_it_goes_on(accepted)
        return Effect(sleeper.call, ANSWERED if result == "ok" else result, again)

    def _tell_how_it_goes_on(self, accepted: int) -> str:
        before = len(self._answers())
        try:
            self._wait_ok(before)
        except Failed:
            return "no answers any more"
        return "same connection" if self._gate.ask("state")["accepted"] == accepted else "connects again"

    def _wake(self, name: str, sleeper: Sleeper) -> None:
        if name == "signal":
            if not self._subject.signal:
                raise Failed(NO_SIGNAL)
            interrupt(sleeper, self._subject.signal)
        elif name == "stop":
            stop_and_continue(sleeper)
        elif name == "freezer":
            freeze(sleeper, self._frozen)
        elif name == "debugger":
            attach(sleeper)
        else:
            self._gate.ask("reset")

    def warm_up(self) -> str:
        """Let it ask until its connection is spliced, if it is to be; the name of the connection.

        Raises Failed.
        """
        asked = len(self._answers())
        wait_for("questions are answered", lambda: self._answers()[asked:].count("ok") >= WARM, WARM_TIMEOUT)
        if self._daemon is None:
            return self._wait_one_link()
        deadline = time.monotonic() + WARM_TIMEOUT
        while True:
            links = set(self._gate.ask("state")["names"])
            flows = [flow for flow in self._daemon.flows() if flow["local"] in links]
            for flow in flows:
                if flow["state"] == "spliced" and flow["redirected_messages"] > WARM:
                    return str(flow["local"])
            if time.monotonic() > deadline:
                reasons = {flow["reason"] or flow["state"] for flow in flows}
                raise Failed(f"not spliced: {', '.join(sorted(reasons)) or 'no connection'}")
            time.sleep(0.05)

    def _wait_one_link(self) -> str:
        names: list[str] = wait_for("there is a connection", lambda: self._gate.ask("state")["names"])
        return names[-1]

    def _find_socket(self, link: str) -> Socket | None:
        if self._side == "client":
            return find_socket(self.stage.cgroup, link)
        port = int(link.rpartition(":")[2])
        return find_socket(self.stage.cgroup, f"{self.address}:{SERVER_PORT}", port)

    def _wait_asleep(self, link: str) -> Sleeper:
        """The thread that waits for what is held back, when it was seen so twice."""

        def look() -> Sleeper | None:
            found = self._find_socket(link)
            first = found.find_sleeper() if found else None
            time.sleep(0.02)
            second = found.find_sleeper() if found else None
            return first if first == second else None

        sleeper: Sleeper = wait_for("it sleeps", look)
        return sleeper

    def _settle(self, link: str) -> None:
        """It sleeps again, or has let go of the connection, or has ended."""

        def is_settled() -> bool:
            with contextlib.suppress(OSError):
                found = self._find_socket(link)
                return found is None or found.find_sleeper() is not None
            return False

        time.sleep(0.05)  # whoever was woken may not have run yet; more only makes the table surer
        wait_for("it has seen what happened", is_settled)

    def _answers(self) -> list[str]:
        lines = self._asker.log.read_text(errors="replace").splitlines()
        return [line[2:] for line in lines if line.startswith("= ")]

    def _wait_answer(self, asked: int) -> str:
        try:
            wait_for("an answer", lambda: len(self._answers()) > asked, ANSWER_TIMEOUT)
        except Failed:
            # It waits for ever, unless the connection is taken away.
            self._gate.ask("reset")
            return "no answer"
        return self._answers()[asked]

    def _wait_ok(self, asked: int) -> None:
        wait_for("answers again", lambda: "ok" in self._answers()[asked:], AGAIN_TIMEOUT)


# -- all of them ---------------------------------------------------------------------------------------------


def try_subject(
    subject: Subject, network: Network, directory: Path, shared: Path, settings: tuple[str, ...]
) -> Report:
    """Disturb a program over plain TCP, and spliced."""
    report = Report(subject, missing=tuple(subject.name_missing()))
    if report.missing:
        return report
    cgroup = Cgroup()
    try:
        _try(report, report.plain, Stage(network, cgroup, _make(directory), shared, 0.0), None)
    finally:
        cgroup.remove()
    shutil.rmtree(directory)
    with Host("--blocking=allow", *settings, services="") as host:
        stage = Stage(network, host.cgroup, _make(directory), shared, 0.0)
        _try(report, report.spliced, stage, host.daemon)
    shutil.rmtree(directory)
    return report


def _make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _try(report: Report, effects: dict[str, Effect], stage: Stage, daemon: Daemon | None) -> None:
    try:
        scene = Scene(stage, report.subject, daemon)
        for name in DISTURBANCES:
            link = scene.warm_up()
            try:
                effects[name] = scene.disturb(name, link)
            except (Failed, OSError) as complaint:  # it may have ended meanwhile
                report.failed.setdefault(name, str(complaint))
    except Failed as complaint:
        # There is nothing to disturb.
        missed = (name for name in DISTURBANCES if name not in effects)
        report.failed |= dict.fromkeys(missed, str(complaint))
    finally:
        stage.close()


def tabulate(reports: Sequence[Report]) -> str:
    """A table in Markdown: what was otherwise than over plain TCP."""
    heading = ("program", "asleep in", ", ".join(WAKINGS.values()), "RST")
    rows = [heading, tuple("---" for _ in heading), *(_row(each) for each in reports)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _row(report: Report) -> tuple[str, ...]:
    if report.missing:
        return (report.subject.title, "not tried", f"not installed: {', '.join(report.missing)}", "")
    calls = sorted({f"`{effect.asleep}`" for effect in report.spliced.values()})
    return (report.subject.title, ", ".join(calls) or "?", _gather(report), _tell(report, "reset"))


def _gather(report: Report) -> str:
    """What has one outcome is named once."""
    groups: dict[str, list[str]] = {}
    for name, title in WAKINGS.items():
        groups.setdefault(_tell(report, name), []).append(title)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(titles)}: {told}" for told, titles in groups.items())


def _tell(report: Report, name: str) -> str:
    if name in report.failed:
        return report.failed[name]
    plain, spliced = report.plain[name], report.spliced[name]
    if plain.words == spliced.words:
        # That a RST breaks something off is no news.
        return SAME if plain.words == ANSWERED or name == "reset" else f"{SAME} ({plain.words})"
    return spliced.words if plain.words == ANSWERED else f"{spliced.words} (plain: {plain.words})"
