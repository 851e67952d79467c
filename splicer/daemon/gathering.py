# SPDX-License-Identifier: Apache-2.0
"""Reads what the metrics say, when somebody comes for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splicer import __version__
from splicer.daemon.attribution import Attribution
from splicer.daemon.mailbox import Mailbox, Task
from splicer.errors import SplicerError
from splicer.kernel.costs import read_costs
from splicer.kernel.layout import (
    COUNT_REFUSED,
    COUNT_WENT_BACK,
    COUNTERS,
    TRAFFIC,
    TRAFFIC_KEY,
)
from splicer.kernel.libbpf import Map
from splicer.kernel.sweep import Sweeper
from splicer.kernel.tally import Tally
from splicer.kernel.tenants import read_room
from splicer.kernel.volume import VolumeReader
from splicer.logs import Logger
from splicer.metrics import store
from splicer.metrics.catalogue import Reading, Samples
from splicer.metrics.histogram import Timings
from splicer.metrics.ledger import Ledger
from splicer.metrics.services import Services
from splicer.model import REASON_NAMES, STATES
from splicer.policy.reconciler import PolicyReconciler

# Share of one CPU for looks at all connections: with very many of them, who comes often is told what was
# seen a moment ago.
LOOK_SHARE = 0.01
_BYTES, _MESSAGES, _PLAIN = "redirected_bytes", "redirected_messages", "plain_bytes"
_STATS_SWITCH = "/proc/sys/kernel/bpf_stats_enabled"


class Gatherer:
    """Of one generation of programs. One thread at a time."""

    def __init__(
        self,
        kernel_class: str,
        fionread: str,
        maps: Mapping[str, Map],
        sweeper: Sweeper,
        volumes: VolumeReader,
        attribution: Attribution,
        reconciler: PolicyReconciler,
        describe_docker: Callable[[], Mapping[str, Any]],
        mailbox: Mailbox,
        timings: Timings,
        find_trouble: Callable[[], str],
        run_dir: str,
        pin_dir: str,
        log: Logger,
    ) -> None:
        self._kernel_class = kernel_class
        self._fionread = fionread
        self._maps = maps
        self._sweeper = sweeper
        self._volumes = volumes
        self._reconciler = reconciler
        self._describe_docker = describe_docker
        self._mailbox = mailbox
        self._timings = timings
        self._find_trouble = find_trouble
        self._run_dir = run_dir
        self._pin_dir = pin_dir
        self._log = log
        self._services = Services(attribution.find_cgroup_owner)
        self._ledgers = {name: Ledger(self._services) for name in (_BYTES, _MESSAGES, _PLAIN)}
        # Nobody writes to a pin, so that is when the programs were loaded; and it tells them from others.
        pin = os.stat(os.path.join(pin_dir, "maps", "counters"))
        self._loaded = pin.st_mtime
        self._programs = f"{pin.st_mtime_ns}"
        self._cannot_store = False
        self._look_at = 0.0
        self._looked: dict[str, Samples] = {}
        store.load(run_dir, self._programs, self._ledgers, self._services)

    def read(self) -> Reading:
        """Everything that is known now. Raises KernelError."""
        found: dict[str, Samples] = {
            "splicer_healthy": [((), 0 if self._find_trouble() else 1)],
            "splicer_paused": [((), 0 if self._reconciler.paused_seconds is None else 1)],
            "splicer_start_time_seconds": [((), self._loaded)],
            "splicer_held_namespaces": [((), self._sweeper.held)],
            "splicer_policy_lag_seconds": [((), self._read_lag())],
            "splicer_bad_labels": [((), len(self._reconciler.list_problems()))],
            "splicer_loop_turn_seconds": [((), self._timings.turns.read())],
            "splicer_sweep_seconds": [((), self._timings.sweeps.read())],
            "splicer_watch_seconds": [((), self._timings.rounds.read())],
        }
        walking = self._sweeper.settings.read().walking
        labels = (__version__, self._kernel_class, self._fionread, "walk" if walking else "name")
        found["splicer_build_info"] = [(labels, 1)]
        self._look()
        found.update(self._looked)
        self._read_counters(found)
        self._read_tables(found)
        self._read_docker(found)
        self._read_costs(found)
        return found

    def _read_lag(self) -> float:
        return max(self._mailbox.read_lag(Task.APPLY_POLICY), self._reconciler.failing_seconds)

    # -- all connections -----------------------------------------------------------------------------------

    def _look(self) -> None:
        if time.monotonic() < self._look_at:
            return
        begun = time.thread_time()
        total = {name: self._sweeper.read_counter(COUNTERS.index(name)) for name in (_BYTES, _MESSAGES)}
        # Closed connections first: one that closes meanwhile is missed this time, and none counts twice.
        closed = {TRAFFIC_KEY.unpack(key): TRAFFIC.unpack(raw) for key, raw in self._maps["traffic"].items()}
        living = self._sweeper.tally()
        self._ledgers[_BYTES].update(
            {key: fields[1] for key, fields in closed.items()},
            {ends: amount.redirected_bytes for ends, amount in living.amounts.items()},
            total[_BYTES],
        )
        self._ledgers[_MESSAGES].update(
            {key: fields[2] for key, fields in closed.items()},
            {ends: amount.redirected_messages for ends, amount in living.amounts.items()},
            total[_MESSAGES],
        )
        rows = self._volumes.read_rows()
        self._ledgers[_PLAIN].update(rows.closed, rows.passing, rows.total)
        self._store()
        self._looked = {
            "splicer_connections": _count_states(living),
            "splicer_closed_plain_bytes_total": [
                ((name or "spliced",), size) for name, size in zip(REASON_NAMES, rows.reasons, strict=True)
            ],
        }
        for name, ledger in self._ledgers.items():
            self._looked[f"splicer_{name}_total"] = list(ledger.sums.items())
        self._look_at = time.monotonic() + (time.thread_time() - begun) / LOOK_SHARE

    def _store(self) -> None:
        """Before anybody is told: what was told does not go back when the next daemon takes over."""
        try:
            store.save(self._run_dir, self._programs, self._ledgers)
        except OSError as error:
            if not self._cannot_store:
                self._log.warning("metrics_not_stored", run_dir=self._run_dir, error=error.strerror)
            self._cannot_store = True
        else:
            self._cannot_store = False

    # -- the rest ------------------------------------------------------------------------------------------

    def _read_counters(self, found: dict[str, Samples]) -> None:
        for metric, counter in (
            ("splicer_passed_messages_total", "passed_messages"),
            ("splicer_paired_connections_total", "paired"),
            ("splicer_closed_connections_total", "closed"),
            ("splicer_adoptions_total", "spliced"),
            ("splicer_rescues_total", "rescued"),
            ("splicer_lost_events_total", "events_lost"),
        ):
            found[metric] = [((), self._sweeper.read_counter(COUNTERS.index(counter)))]
        # Each reason is there from the beginning: nobody sees the rise of what was not there before.
        for metric, base in (
            ("splicer_drains_total", COUNT_WENT_BACK),
            ("splicer_refusals_total", COUNT_REFUSED),
        ):
            found[metric] = [
                ((name,), self._sweeper.read_counter(base + number))
                for number, name in enumerate(REASON_NAMES)
                if name
            ]

    def _read_tables(self, found: dict[str, Samples]) -> None:
        room = read_room(self._maps)
        entries: dict[str, tuple[int, int]] = {"connections": (room.used, room.most)}
        for name in ("rules", "traffic", "volumes"):
            entries[name] = (_count_entries(self._maps[name]), self._maps[name].max_entries)
        networks = self._maps["networks"]
        entries["networks"] = (sum(1 for _ in networks.walk_keys()), networks.max_entries)
        found["splicer_table_entries"] = [((name,), used) for name, (used, _) in entries.items()]
        found["splicer_table_capacity"] = [((name,), most) for name, (_, most) in entries.items()]
        found["splicer_room_exhausted"] = [((), int(room.is_full))]

    def _read_docker(self, found: dict[str, Samples]) -> None:
        docker = self._describe_docker()
        if docker["state"] != "off":
            found["splicer_docker_up"] = [((), int(docker["state"] == "connected"))]
            found["splicer_containers"] = [((), docker["containers"])]

    def _read_costs(self, found: dict[str, Samples]) -> None:
        """While the kernel counts, for the whole host; some time is there else, too, of nobody knows when."""
        try:
            if Path(_STATS_SWITCH).read_text().strip() != "1":
                return
            costs = read_costs(Path(self._pin_dir))
        except (OSError, SplicerError):
            return
        found["splicer_program_runs_total"] = [((name,), cost.calls) for name, cost in costs.items()]
        found["splicer_program_run_seconds_total"] = [
            ((name,), cost.nanoseconds / 1e9) for name, cost in costs.items()
        ]


def _count_states(living: Tally) -> Samples:
    states = dict.fromkeys(STATES.values(), 0)
    for number, name in STATES.items():
        states[name] += living.states[number]
    return [((name,), count) for name, count in states.items()]


def _count_entries(entries: Map) -> int:
    walk, count = entries.walk(), 0
    while (step := walk.step(1024)) is not None:
        count += len(step[0]) // entries.key_size
    return count
