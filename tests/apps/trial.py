# SPDX-License-Identifier: Apache-2.0
"""A case tried twice: over plain TCP, and with splicer attached to its cgroup; and what to think of it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.cgroup import Cgroup
from support.daemon import Daemon
from support.host import Host

from apps.case import Case, Failed, Outcome
from apps.stage import Network, Stage

SAME, DIFFERENT, NOT_SPLICED = "same", "DIFFERENT", "NOT SPLICED"
KNOWN = "known difference"
BROKEN, SPLICER_FAILED, NOT_INSTALLED = "BROKEN", "SPLICER FAILED", "not installed"
REPEATS = 3
# On a machine with no time to spare a short run may end before anything is adopted.
ATTEMPTS = 2
SAMPLING_PAUSE = 0.25  # seconds


@dataclass(frozen=True)
class Splicing:
    """What splicer did during a run."""

    redirected_messages: int
    redirected_bytes: int
    paired: int
    spliced: int
    rescued: int
    refused: dict[str, int]
    # Client's and server's process, state and reason of the connections that were met alive.
    met: tuple[tuple[str, str, str, str], ...]

    @property
    def reasons(self) -> set[str]:
        """Why connections stayed plain, as far as it was counted or seen."""
        return set(self.refused) | {reason for *_, reason in self.met if reason}


@dataclass(frozen=True)
class Run:
    outcome: Outcome | None
    error: str
    seconds: float
    splicing: Splicing | None = None

    @property
    def summary(self) -> str:
        return self.outcome.summary if self.outcome else f"failed: {self.error}"


@dataclass(frozen=True)
class Trial:
    case: Case
    verdict: str
    plain: Run | None = None
    spliced: Run | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def agrees(self) -> bool:
        return self.verdict in (SAME, KNOWN)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.case.name,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "settings": list(self.case.settings),
            "plain": asdict(self.plain) if self.plain else None,
            "spliced": asdict(self.spliced) if self.spliced else None,
        }


class Tryout:
    """Tries cases. `directory` is where their files go, `settings` are for every `splicer run`."""

    def __init__(self, network: Network, directory: Path, seconds: float, settings: tuple[str, ...]) -> None:
        self._network = network
        self._directory = directory
        self._shared = directory / "shared"
        self._shared.mkdir()
        self._shared.chmod(0o755)
        self._seconds = seconds
        self._settings = settings

    def try_case(self, case: Case) -> Trial:
        """Run a case plain and spliced and compare."""
        missing = case.name_missing()
        if missing:
            return Trial(case, NOT_INSTALLED, notes=(f"missing: {', '.join(missing)}",))
        plain = self._run_plain(case)
        if plain.outcome is None:
            return Trial(case, BROKEN, plain, notes=("it fails without splicer, too",))
        try:
            return self._compare(case, plain, plain.outcome.facts)
        except (AssertionError, OSError, RuntimeError) as complaint:
            # It did not start, ended by itself, or left something behind.
            return Trial(case, SPLICER_FAILED, plain, notes=(str(complaint),))

    def _compare(self, case: Case, plain: Run, facts: dict[str, Any]) -> Trial:
        notes: list[str] = []
        for _ in range(ATTEMPTS):
            spliced = self._run_spliced(case)
            notes += _describe(plain, spliced)
            verdict = _judge(case, plain, spliced, notes)
            if verdict != NOT_SPLICED:
                break
        if verdict == DIFFERENT and spliced.outcome is not None:
            narrowed = case.narrow(facts, spliced.outcome.facts)
            if narrowed is not None and self._agree_when_repeated(narrowed, notes):
                verdict = _judge_splicing(case, spliced, notes)
        if verdict == DIFFERENT and case.known:
            verdict = KNOWN
            notes.append(f"in KNOWN_ISSUES.md: {case.known}")
        return Trial(case, verdict, plain, spliced, tuple(notes))

    def _agree_when_repeated(self, case: Case, notes: list[str]) -> bool:
        """Try again what differed; tests that measure time fail now and then, splicer or not."""
        runs = [(self._run_plain(case), self._run_spliced(case)) for _ in range(REPEATS)]
        agree = all(_find_differences(plain, spliced) == [] for plain, spliced in runs)
        failed = [
            sum(run.outcome is None or bool(run.outcome.facts["failed"]) for run in each)
            for each in zip(*runs, strict=True)
        ]
        notes.append(f"repeated {REPEATS} times: failed {failed[0]} times plain, {failed[1]} times spliced")
        return agree or failed[0] > 0

    def _run_plain(self, case: Case) -> Run:
        with _removed(Cgroup()) as cgroup:
            return self._run(case, cgroup)

    def _run_spliced(self, case: Case) -> Run:
        with Host(*self._settings, *case.settings, services="") as host:
            sampler = _Sampler(host.daemon)
            run = self._run(case, host.cgroup)
            met = sampler.finish()
            totals = host.daemon.totals()
        return Run(
            run.outcome,
            run.error,
            run.seconds,
            Splicing(
                **{name: totals[name] for name in Splicing.__dataclass_fields__ if name in totals}, met=met
            ),
        )

    def _run(self, case: Case, cgroup: Cgroup) -> Run:
        directory = self._directory / "run"
        directory.mkdir()
        stage = Stage(self._network, cgroup, directory, self._shared, self._seconds)
        outcome, error = None, ""
        start = time.monotonic()
        try:
            outcome = case.run(stage)
            stage.check_alive()
        except Failed as failure:
            outcome, error = None, str(failure)
        except (ValueError, KeyError, IndexError) as surprise:
            # What a program wrote is not what it writes when all is well.
            outcome, error = None, f"unreadable output: {surprise!r}"
        finally:
            seconds = time.monotonic() - start
            stage.close()
            shutil.rmtree(directory)
        return Run(outcome, error, round(seconds, 2))


class _Sampler(threading.Thread):
    """Looks at the living connections, to see why they are not spliced."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._ended = threading.Event()
        self._met: set[tuple[str, str, str, str]] = set()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(SAMPLING_PAUSE):
            with contextlib.suppress(OSError, ValueError):
                for flow in self._daemon.flows():
                    ends = flow["client"]["process"], flow["server"]["process"]
                    self._met.add((*ends, flow["state"], flow["reason"]))

    def finish(self) -> tuple[tuple[str, str, str, str], ...]:
        self._ended.set()
        self.join()
        return tuple(sorted(self._met))


@contextlib.contextmanager
def _removed(cgroup: Cgroup) -> Iterator[Cgroup]:
    try:
        yield cgroup
    finally:
        cgroup.remove()


def _find_differences(plain: Run, spliced: Run) -> list[str]:
    if plain.outcome is None or spliced.outcome is None:
        return [] if plain.outcome is spliced.outcome else [f"failed: {plain.error or spliced.error}"]
    one, other = plain.outcome.facts, spliced.outcome.facts
    return [
        f"{name}: {_shorten(one.get(name))} plain, {_shorten(other.get(name))} spliced"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def _describe(plain: Run, spliced: Run) -> Iterator[str]:
    yield from _find_differences(plain, spliced)
    assert spliced.splicing is not None
    if spliced.splicing.rescued:
        yield f"rescued {spliced.splicing.rescued}"


def _judge(case: Case, plain: Run, spliced: Run, notes: list[str]) -> str:
    if _find_differences(plain, spliced):
        return DIFFERENT
    return _judge_splicing(case, spliced, notes)


def _judge_splicing(case: Case, spliced: Run, notes: list[str]) -> str:
    """Splicing must have happened where it should, and where it should not there must be a reason."""
    splicing = spliced.splicing
    assert splicing is not None
    if not splicing.paired:
        notes.append("splicer saw no connection")
        return NOT_SPLICED
    if case.redirects and not splicing.redirected_messages:
        notes.append(f"nothing was redirected; reasons: {', '.join(sorted(splicing.reasons)) or 'none'}")
        return NOT_SPLICED
    if case.redirects is False and splicing.redirected_messages:
        notes.append("messages were redirected that should not have been")
        return DIFFERENT
    if case.reasons:
        found = case.reasons & splicing.reasons
        if not found:
            expected, seen = (", ".join(sorted(each)) or "none" for each in (case.reasons, splicing.reasons))
            notes.append(f"expected a reason such as {expected}; found: {seen}")
            return NOT_SPLICED
        counted = [f"{name} {splicing.refused[name]}" if name in splicing.refused else name for name in found]
        notes.append(f"left plain: {', '.join(sorted(counted))}")
    return SAME


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) < 160 else f"{text[:157]}..."
