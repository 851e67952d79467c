# SPDX-License-Identifier: Apache-2.0
"""The test's side: plays a probe plain, spliced and in transition, and keeps what plain TCP did."""

from __future__ import annotations

import difflib
import itertools
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from support.host import EAGER, Host
from support.lab import Lab
from support.players import Peer

from conformance.probes import Probe
from conformance.scene import Cut

ACTOR = Path(__file__).with_name("actor.py")
LAGS = (0.0, 0.012)  # seconds from the cut to the next call: in the middle of draining, and after it
DRAIN_LAGS = (
    0.0,
    0.0012,
    0.003,
)  # the same for the operator's command, which the daemon takes up in its own time
DRAG = 0.006  # seconds; the longest pause before each call while a storm goes on
JOB_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Run:
    """What one playing of a probe left."""

    lines: tuple[str, ...]
    cut: Cut
    ended: str
    moments: int = 0
    state: str | None = None
    redirected: int | None = None


@dataclass
class Tally:
    """What transitions there were, to show that the storm was one."""

    spliced: int = 0
    drained: int = 0
    runs: int = 0


class Stage:
    """Plays probes in processes of its own, outside the attached cgroup (plain) or inside it."""

    def __init__(self, host: Host, lab: Lab) -> None:
        self.host = host
        namespace = lab.namespace("a")
        self._outside = Peer(namespace, None, ACTOR)
        self._inside = Peer(namespace, host.cgroup, ACTOR)
        self._plain: dict[str, Run] = {}
        self._chance = random.Random(1)
        self.tally = Tally()

    def stop(self) -> None:
        self._outside.stop()
        self._inside.stop()

    def plain(self, probe: Probe) -> Run:
        """Plain TCP, played once: the transcript that all others are compared with."""
        if probe.name not in self._plain:
            self._plain[probe.name] = self.play_plain(probe)
        return self._plain[probe.name]

    def play_plain(self, probe: Probe) -> Run:
        """Plain TCP once more."""
        [run] = self._play(self._outside, probe, [Cut()], spliced=False)
        return run

    def spliced(self, probe: Probe) -> list[Run]:
        return self._play(self._inside, probe, [Cut()], spliced=True)

    def eager(self, probe: Probe) -> list[Run]:
        """Spliced from the first byte."""
        return self._play(self._inside, probe, [Cut()], spliced=True, port=EAGER)

    def cut(self, probe: Probe) -> list[Run]:
        """Spliced, and taken back to plain TCP at one moment after another."""
        moments = self.plain(probe).moments
        step = max(1.0, moments / probe.cuts)
        chosen = sorted({int(number * step) for number in range(min(moments, probe.cuts))})
        # Every moment in the middle of draining, every other one after it as well.
        cuts = [Cut(at=at, lag=LAGS[0]) for at in chosen] + [Cut(at=at, lag=LAGS[1]) for at in chosen[::2]]
        return self._play(self._inside, probe, cuts, spliced=True) if cuts else []

    def drain(self, probe: Probe) -> list[Run]:
        """Spliced, and drained by the operator at some moments."""
        moments = self.plain(probe).moments
        chance = random.Random(probe.name)
        chosen = sorted(chance.sample(range(moments), min(moments, probe.drains)))
        lags = itertools.cycle(chance.sample(DRAIN_LAGS, len(DRAIN_LAGS)))
        cuts = [Cut(at=at, lag=lag, how="drain") for at, lag in zip(chosen, lags, strict=False)]
        return self._play(self._inside, probe, cuts, spliced=True) if cuts else []

    def storm(self, probe: Probe) -> list[Run]:
        """Spliced, with `drain` after `drain` and adopted again in between, each call at a random time."""
        if not probe.storms:
            return []
        ready = self.host.directory / "stormy"
        cuts = [Cut(drag=DRAG, seed=number) for number in range(probe.storms)]
        before = self.host.daemon.totals()
        self._begin(self._inside, probe, cuts, spliced=True, ready=str(ready))
        while self._inside.is_waiting(0.002):
            if ready.exists():
                time.sleep(self._chance.uniform(0.0, 0.03))
                self.host.daemon.drain()
                self._await_adoption(self._chance.uniform(0.03, 0.2))
        runs = self._finish(self._inside, probe, cuts)
        after = self.host.daemon.totals()
        self.tally.spliced += after["spliced"] - before["spliced"]
        self.tally.drained += after["drained"] - before["drained"]
        self.tally.runs += len(runs)
        return runs

    def _await_adoption(self, patience: float) -> None:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            if self.host.daemon.status()["connections"]["spliced"]:
                time.sleep(self._chance.uniform(0.0, 0.01))
                return
            if not self._inside.is_waiting(0.004):
                return

    def _begin(
        self,
        peer: Peer,
        probe: Probe,
        cuts: list[Cut],
        *,
        spliced: bool,
        ready: str | None = None,
        port: int = 0,
    ) -> None:
        control = str(self.host.run_dir / "control.sock") if spliced else None
        peer.begin(
            "play",
            probe=probe.name,
            cuts=[asdict(cut) for cut in cuts],
            control=control,
            ready=ready,
            port=port,
            timeout=JOB_TIMEOUT,
        )

    @staticmethod
    def _finish(peer: Peer, probe: Probe, cuts: list[Cut]) -> list[Run]:
        __tracebackhide__ = True
        answer = peer.finish()
        runs = []
        for raw, cut in zip(answer["runs"], cuts, strict=True):
            if raw["ended"] is None and not raw["lines"] and answer["failure"]:
                break
            ended = raw["ended"] or f"hung ({answer['failure']})"
            runs.append(
                Run(
                    tuple(raw["lines"]),
                    cut,
                    ended,
                    raw.get("moments", 0),
                    raw.get("state"),
                    raw.get("redirected"),
                )
            )
        hung = any(run.ended.startswith("hung") for run in runs)
        assert hung or not answer["failure"], f"{probe.name} could not be played: {answer['failure']}"
        return runs

    def _play(self, peer: Peer, probe: Probe, cuts: list[Cut], *, spliced: bool, port: int = 0) -> list[Run]:
        __tracebackhide__ = True
        self._begin(peer, probe, cuts, spliced=spliced, port=port)
        return self._finish(peer, probe, cuts)


def compare(plain: Run, other: Run) -> str:
    """Nothing if the two are the same, else what differs, as unified diff."""
    ended = [plain.ended], [other.ended]
    if plain.lines == other.lines and ended[0] == ended[1]:
        return ""
    lines = difflib.unified_diff(
        [*plain.lines, f"ended: {plain.ended}"],
        [*other.lines, f"ended: {other.ended}"],
        "plain TCP",
        _describe(other.cut),
        lineterm="",
        n=3,
    )
    return "\n".join(lines)


def _describe(cut: Cut) -> str:
    if cut.drag:
        return f"drained again and again (seed {cut.seed})"
    if cut.at < 0:
        return "spliced"
    if cut.how == "drain":
        return f"drained before call {cut.at}, {cut.lag * 1000:.1f} ms earlier"
    return f"taken back before call {cut.at}, {cut.lag * 1000:.0f} ms earlier"


def raise_harness_errors(runs: list[Run]) -> None:
    """A traceback is a mistake in the probe, on whatever it ran."""
    for run in runs:
        assert "Traceback" not in run.ended, f"{_describe(run.cut)}:\n" + "\n".join([*run.lines, run.ended])
