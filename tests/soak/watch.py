# SPDX-License-Identifier: Apache-2.0
"""What the daemon says and needs while the soak goes on, over all its lives."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.daemon import ControlError
from support.host import Host

from splicer.kernel import libbpf
from splicer.kernel.layout import find_young

FLOWS_EVERY = 2.0  # seconds
SUMMED = (
    *("paired", "spliced", "drained", "rescued"),
    *("redirected_bytes", "redirected_messages", "passed_messages"),
)
MAPS = ("seeds", "pairs", "spliced")
SETTLED_SECONDS = 8.0  # after its start a daemon's memory is taken for what it needs


@dataclass
class Life:
    """One process of the daemon. Samples: (time, KiB resident, open files)."""

    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def settled(self) -> list[tuple[float, int, int]]:
        """Without its start."""
        return [each for each in self.samples if each[0] - self.samples[0][0] >= SETTLED_SECONDS]


@dataclass(frozen=True)
class Rescue:
    """A flow that was rescued: when (CLOCK_MONOTONIC seconds) that was seen, its row, and the row before."""

    time: float
    flow: dict[str, Any]
    before: dict[str, Any] | None


class Watch:
    """Samples the daemon. Totals of a generation of programs are added up when it ends."""

    def __init__(self, host: Host, on_rescue: Callable[[dict[str, Any]], None]) -> None:
        self._host = host
        self._on_rescue = on_rescue
        self._past: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # why flows were seen to go back
        self.rescues: list[Rescue] = []
        self.lives: list[Life] = []
        self.silent = 0
        self.most_spliced = 0
        self.kernel_class = ""
        self.shares: list[float] = []
        self._flows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._flows_at = 0.0

    @property
    def totals(self) -> Counter[str]:
        return self._past + self._now

    def sample(self) -> None:
        """Ask the daemon, if there is one."""
        if not self._host.has_run or not self._host.daemon.alive:
            return
        daemon = self._host.daemon
        try:
            status = daemon.status()
            rescued = status["totals"]["rescued"] > self._now["rescued"]
            if rescued or time.monotonic() - self._flows_at >= FLOWS_EVERY:
                self._take_flows(daemon.flows())
                self._flows_at = time.monotonic()
        except (OSError, ControlError, ValueError):
            self.silent += 1
            return
        now = Counter({name: int(status["totals"][name]) for name in SUMMED})
        for name, n in status["totals"]["refused"].items():
            now[f"refused {name}"] = int(n)
        if any(now[name] < n for name, n in self._now.items()):
            self.end_generation()
        self._now = now
        # As applications see it.
        self.kernel_class = "C" if status["fionread"] == "splicer" else status["kernel_class"]
        connections = status["connections"]
        self.most_spliced = max(self.most_spliced, connections["spliced"])
        known = sum(connections.values())
        if known:
            self.shares.append(connections["spliced"] / known)
        if not self.lives or self.lives[-1].pid != daemon.pid:
            self.lives.append(Life(daemon.pid))
        if read_command(daemon.pid) == read_command(os.getpid()):
            return  # it is about to begin: so far it is a copy of this
        self.lives[-1].samples.append((time.monotonic(), read_resident(daemon.pid), count_files(daemon.pid)))

    def count_spliced(self) -> int:
        """Connections that are spliced now; 0 without a daemon."""
        if not self._host.has_run or not self._host.daemon.alive:
            return 0
        try:
            return int(self._host.daemon.status()["connections"]["spliced"])
        except (OSError, ControlError, ValueError):
            return 0

    def end_generation(self) -> None:
        """The programs and their counters go, or are gone."""
        self._past += self._now
        self._now = Counter()
        self._flows = {}

    def find_flow(self, ends: dict[str, Any]) -> dict[str, Any] | None:
        """The row of a connection, by the addresses that a worker reported."""
        local, remote = (_bare(str(ends.get(name, ""))) for name in ("local", "remote"))
        if ends.get("side") == "server":
            local, remote = remote, local
        try:
            flows = self._host.daemon.flows() if self._host.has_run and self._host.daemon.alive else []
        except (OSError, ControlError, ValueError):
            flows = []
        # What has been closed meanwhile was perhaps seen a moment ago.
        for flow in (*flows, *self._flows.values()):
            if (_bare(flow["local"]), _bare(flow["remote"])) == (local, remote):
                return flow
        return None

    def _take_flows(self, flows: list[dict[str, Any]]) -> None:
        fresh = {}
        for flow in flows:
            key = (flow["local"], flow["remote"], flow["netns"])
            fresh[key] = flow
            before = self._flows.get(key)
            if before is not None and before["age_seconds"] > flow["age_seconds"]:
                before = None  # another connection with the same addresses
            was = before["state"] if before else "paired"
            changed = before is None or before["reason"] != flow["reason"]
            going = flow["state"] == "draining" or (flow["state"] == "paired" and was != "paired")
            if going and (was == "spliced" or changed):
                self.reasons[flow["reason"]] += 1
            if flow["reason"] == "rescue" and (before is None or before["reason"] != "rescue"):
                self.rescues.append(
                    Rescue(time.monotonic(), _short(flow), _short(before) if before else None)
                )
                self._on_rescue(flow)
        self._flows = fresh

    def count_entries(self) -> dict[str, int]:
        """Entries of the maps that hold connections."""
        found = {name: count_keys(self._host.pin_dir, name) for name in MAPS}
        return {**found, "young": count_young(self._host.pin_dir)}


def _find_pins(pin_dir: Path, name: str) -> list[Path]:
    return [pin for pin in pin_dir.rglob(name) if not pin.is_dir()]


def count_young(pin_dir: Path) -> int:
    """Places of young connections that are not free."""
    pins = _find_pins(pin_dir, "young")
    if len(pins) != 1:
        return -1
    places = libbpf.Map.open(str(pins[0]))
    try:
        return len(find_young(seed for _, seed in places.items()))
    finally:
        places.close()


def count_keys(pin_dir: Path, name: str) -> int:
    pins = _find_pins(pin_dir, name)
    if len(pins) != 1:
        return -1
    done = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", str(pins[0])], capture_output=True, text=True, check=False
    )
    try:
        return len(json.loads(done.stdout))
    except ValueError:
        # The SOCKHASH's values cannot be read from user space; its keys are listed anyway.
        return done.stdout.count('"key"')


def read_command(pid: int) -> bytes:
    """As it was called; empty of one that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def read_resident(pid: int) -> int:
    """KiB."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def count_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _bare(endpoint: str) -> tuple[str, str]:
    address, _, port = endpoint.rpartition(":")
    return address.strip("[]").removeprefix("::ffff:"), port


def _short(flow: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flow.items() if key not in ("client", "server")}
