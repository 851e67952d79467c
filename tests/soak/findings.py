# SPDX-License-Identifier: Apache-2.0
"""What a run is to be, and what came of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from soak.tally import Tally
from soak.watch import Watch


@dataclass(frozen=True)
class Options:
    """What a run is to be. `patterns` and `reads`: empty for all. `kinds`, of chaos: empty for the usual."""

    seed: int
    seconds: float
    connections: int = 300
    hosts: int = 4
    patterns: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    verbose: bool = False


@dataclass
class Findings:
    """What came of it. Times are CLOCK_MONOTONIC seconds."""

    options: Options
    tally: Tally = field(default_factory=Tally)
    complaints: list[dict[str, Any]] = field(default_factory=list)
    stalls: list[dict[str, Any]] = field(default_factory=list)  # the long ones
    killed: dict[str, float] = field(default_factory=dict)  # worker to time
    # When workers were stopped: longer than planned where splicer takes its time to start meanwhile.
    halts: list[tuple[str, float, float]] = field(default_factory=list)
    patience: float = 12.0  # seconds without a byte moved until a connection counts as stuck
    chaos: Counter[str] = field(default_factory=Counter)
    events: list[tuple[float, str]] = field(default_factory=list)  # chaos, and starts and stops of the daemon
    not_done: dict[str, str] = field(default_factory=dict)  # kind of chaos: why
    daemon_deaths: list[str] = field(default_factory=list)
    # From a SIGKILL, or from a stop that left connections with unread bytes, to the next start.
    no_daemon: list[tuple[float, float]] = field(default_factory=list)
    stops: int = 0  # orderly ones
    stops_while_stopped: int = 0  # of these: with workers that were stopped or throttled
    unread: int = 0  # connections that readers had left unread when a stop gave up waiting
    described: list[dict[str, Any]] = field(default_factory=list)  # ends of flows that were rescued
    rescued_in_pauses: int = 0  # right after the machine had stood still
    dead_workers: list[str] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)  # of maps, at the end
    still_open: int = 0
    refused: int = 0
    watch: Watch | None = None
    cpu: str = ""
    memory: str = ""
    memory_refused: int = 0  # allocations, by the bounds on memory
    out_of_memory: int = 0  # workers killed for it
    seconds: float = 0.0
    interrupted: bool = False
    left_behind: str = ""
