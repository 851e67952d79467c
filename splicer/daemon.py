# SPDX-License-Identifier: Apache-2.0
"""The daemon: answers the programs' events with sweeps, watches for stuck ends, drains when told to stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import time
from typing import Any

from splicer import __version__, generation, libbpf, probes
from splicer.cgroups import Cgroup
from splicer.config import ServiceRule, Settings
from splicer.control import Server
from splicer.layout import (
    COUNT_REFUSED,
    COUNTERS,
    MODES,
    POLICY,
    STATE_PAIRED,
    EventType,
    KernelSettings,
    Pair,
    read_event,
)
from splicer.logs import Logger
from splicer.model import REASON_NAMES, SCHEMA, STATES, Connections, Flow, Status, Totals
from splicer.sweep import Sweeper

# Bounds of the verdict; why they are what they are: ARCHITECTURE.md, "Backpressure" and "Streams".
QUEUE_MESSAGES = 1024
QUEUE_BYTES = 2 << 20
STREAM_MESSAGES = 64
STREAM_SIZE = 16 << 10

# Sweeps for adoption may use about this share of one CPU, a little more while many pairs find no quiet
# moment; draining is more urgent.
_ADOPT_SHARE = 0.05
_ADOPT_PAUSE_S = 0.005
_ADOPT_PAUSE_MAX_S = 0.15
_ADOPT_TURNS = 8
_DRAIN_PAUSE_S = 0.001
_DRAIN_PAUSE_MAX_S = 0.25
_WATCH_SOON_S = 0.02
_WATCH_PERIOD_S = 1.0
_PENDING = REASON_NAMES.index("pending")


class Daemon:
    """Owns one generation for the lifetime of `splicer run`."""

    def __init__(self, settings: Settings, cgroup: Cgroup, log: Logger) -> None:
        self._settings = settings
        self._cgroup = cgroup
        self._log = log
        self._started = time.monotonic()
        self._kernel_class = ""
        self._generation: generation.Generation
        self._sweeper: Sweeper
        # Namespace cookie to processes likely to be in it, with something to do there.
        self._to_adopt: dict[int, set[int]] = {}
        self._to_drain: dict[int, set[int]] = {}
        self._adopt_at = 0.0
        self._drain_at = 0.0
        self._drain_pause = _DRAIN_PAUSE_S
        self._watch_at = 0.0
        self._signals = 0
        self._drain_requested = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- life ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Attach, serve until a signal, drain, detach. Returns the exit code."""
        kernel = probes.require_class()
        self._kernel_class = kernel.name
        previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        previous_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            self._generation = generation.establish(self._settings, self._cgroup, self._log)
            self._sweeper = self._generation.sweeper()
            try:
                self._write_policy()
                handlers = {
                    "status": self._answer_status,
                    "flows": self._answer_flows,
                    "drain": self._answer_drain,
                }
                with Server(self._settings.run_dir, handlers, self._log), self._ready():
                    self._log.info(
                        "ready", cgroup=self._cgroup.path, mode=self._settings.mode, kernel_class=kernel.name
                    )
                    self._serve()
                    self._stop()
            finally:
                self._generation.remove()
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._log.info("stopped")
        return 0

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signals += 1
        self._log.info("signal", name=signal.Signals(number).name)

    @contextlib.contextmanager
    def _ready(self) -> Any:
        path = self._settings.ready_file
        if path:
            draft = f"{path}.{os.getpid()}"
            with open(draft, "w") as file:
                file.write(f"{os.getpid()}\n")
            os.replace(draft, path)
        try:
            yield
        finally:
            if path:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _stop(self) -> None:
        """Drain for up to stop_timeout seconds; a second signal ends the waiting."""
        deadline = time.monotonic() + self._settings.stop_timeout
        self._sweeper.change_settings(registering=False)
        left = self._sweeper.drain("stop", 0)
        while left and self._signals < 2 and time.monotonic() < deadline:
            left = self._sweeper.drain("stop", 0.1)
        self._log.info("drained", unread_connections=left)

    # -- policy --------------------------------------------------------------------------------------------

    def _resolve_rule(self, rule: ServiceRule) -> tuple[int, bool]:
        mode = rule.mode or self._settings.mode
        blocking = rule.blocking or self._settings.blocking
        return MODES[mode], blocking == "allow"

    def _write_policy(self) -> None:
        maps = self._generation.maps
        rules = {struct.pack("=I", rule.port): self._resolve_rule(rule) for rule in self._settings.services}
        for key in list(maps["policies"].keys()):
            if key not in rules:
                maps["policies"].delete(key)
        for key, (mode, blocking) in rules.items():
            maps["policies"].set(key, POLICY.pack(mode, blocking))
        modes = {MODES[self._settings.mode], *(mode for mode, _ in rules.values())}
        maps["settings"].set(
            struct.pack("=I", 0),
            KernelSettings(
                mode=MODES[self._settings.mode],
                allow_blocking=self._settings.blocking == "allow",
                splicing=True,
                stopping=0,
                hot_reads=self._settings.hot_reads,
                has_rules=bool(rules),
                has_eager=MODES["eager"] in modes,
                queue_messages=QUEUE_MESSAGES,
                queue_bytes=QUEUE_BYTES,
                stream_messages=STREAM_MESSAGES,
                stream_size=STREAM_SIZE,
                registering=True,
            ).pack(),
        )

    # -- events --------------------------------------------------------------------------------------------

    def _receive(self, record: bytes) -> None:
        event = read_event(record)
        now = time.monotonic()
        if event.type == EventType.WATCH:
            self._watch_at = min(self._watch_at, now + _WATCH_SOON_S)
            return
        target = self._to_adopt if event.type == EventType.ADOPT else self._to_drain
        for cookie in event.netns:
            target.setdefault(cookie, set()).update(pid for pid in event.tgid if pid)
        if event.type == EventType.DRAIN:
            self._drain_pause = _DRAIN_PAUSE_S
            self._drain_at = min(self._drain_at, now + _DRAIN_PAUSE_S)

    def _remember(self, pair: Pair) -> None:
        """Queue what a pair waits for; for a start with pairs there already and for lost events."""
        if pair.state == STATE_PAIRED:
            if not (pair.announced and pair.reason == _PENDING):
                return
            target = self._to_adopt
        else:
            target = self._to_drain
        for end in (pair.client, pair.server):
            target.setdefault(end.netns, set()).add(end.tgid)

    def _serve(self) -> None:
        if self._generation.taken_over:
            for pair in self._sweeper.pairs():
                if STATES.get(pair.state) != "spliced":
                    self._remember(pair)
        ring = libbpf.RingBuffer(self._generation.maps["events"].fd, self._receive)
        try:
            with select.epoll() as poll:
                poll.register(ring.epoll_fd, select.EPOLLIN)
                poll.register(self._wake_read, select.EPOLLIN)
                while not self._signals:
                    poll.poll(self._next_timeout())
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                    ring.consume()
                    self._work()
        finally:
            ring.close()

    def _next_timeout(self) -> float:
        deadlines = [self._watch_at]
        if self._to_adopt:
            deadlines.append(self._adopt_at)
        if self._to_drain:
            deadlines.append(self._drain_at)
        return max(0.0, min(deadlines) - time.monotonic())

    def _work(self) -> None:
        now = time.monotonic()
        if self._drain_requested:
            self._drain_requested = False
            self._drain_all()
        if self._to_drain and now >= self._drain_at:
            self._sweep_to_drain()
        if self._to_adopt and now >= self._adopt_at:
            self._sweep_to_adopt()
        if now >= self._watch_at:
            self._watch()

    def _sweep_to_drain(self) -> None:
        counts = self._sweeper.adopt(self._to_drain)
        if not counts.to_drain:
            self._to_drain.clear()
            return
        # Somebody has yet to read, or is in the middle of a send.
        self._drain_at = time.monotonic() + self._drain_pause
        self._drain_pause = min(self._drain_pause * 2, _DRAIN_PAUSE_MAX_S)

    def _sweep_to_adopt(self) -> None:
        started = time.monotonic()
        # The ends of a pair go in one after the other; do not leave one alone for long.
        for turn in range(_ADOPT_TURNS):
            counts = self._sweeper.adopt(self._to_adopt)
            if not counts.to_adopt:
                self._to_adopt.clear()
            if turn and not counts.half:
                break
        ended = time.monotonic()
        pause = min(_ADOPT_PAUSE_MAX_S, (ended - started) / _ADOPT_SHARE)
        self._adopt_at = ended + max(_ADOPT_PAUSE_S, pause)

    def _watch(self) -> None:
        counts = self._sweeper.watch()
        soon = counts.unread or counts.stuck
        self._watch_at = time.monotonic() + (_WATCH_SOON_S if soon else _WATCH_PERIOD_S)
        if counts.stuck:
            self._log.warning("rescued", ends=counts.stuck)

    def _drain_all(self) -> None:
        """An operator's wish: everything back to plain TCP, then as before."""
        left = self._sweeper.drain("request", self._settings.stop_timeout)
        self._sweeper.change_settings(splicing=True, stopping=0)
        self._log.info("drained", unread_connections=left)

    # -- answers -------------------------------------------------------------------------------------------

    def _count(self, index: int) -> int:
        raw = self._generation.maps["counters"].get(struct.pack("=I", index)) or b""
        return sum(struct.unpack(f"={len(raw) // 8}Q", raw))

    def _answer_status(self, _request: dict[str, Any]) -> dict[str, Any]:
        counted = {name: self._count(index) for index, name in enumerate(COUNTERS)}
        refused = {
            name: n
            for index, name in enumerate(REASON_NAMES)
            if name and (n := self._count(COUNT_REFUSED + index))
        }
        states = dict.fromkeys(STATES.values(), 0)
        for pair in self._sweeper.connections():
            if pair.state in STATES:
                states[STATES[pair.state]] += 1
        status = Status(
            pid=os.getpid(),
            version=__version__,
            mode=self._settings.mode,
            cgroup=self._cgroup.path,
            connections=Connections(**states),
            totals=Totals(
                paired=counted["paired"],
                spliced=counted["spliced"],
                drained=counted["drained"],
                redirected_bytes=counted["redirected_bytes"],
                redirected_messages=counted["redirected_messages"],
                passed_messages=counted["passed_messages"],
                rescued=counted["rescued"],
                refused=refused,
            ),
            kernel_class=self._kernel_class,
            uptime_seconds=round(time.monotonic() - self._started, 3),
        )
        return status.to_json()

    def _answer_flows(self, _request: dict[str, Any]) -> dict[str, Any]:
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        flows = []
        for pair in self._sweeper.connections():
            if pair.state not in STATES:
                continue  # in the making
            sent = (pair.client_sends, pair.server_sends)
            flow = Flow(
                local=pair.client.local,
                remote=pair.client.remote,
                peer=pair.server.local,
                netns=pair.client.netns,
                peer_netns=pair.server.netns,
                state=STATES[pair.state],
                reason=REASON_NAMES[pair.reason] if pair.reason < len(REASON_NAMES) else "",
                redirected_bytes=sum(d.redirected_bytes for d in sent),
                redirected_messages=sum(d.redirected_messages for d in sent),
                passed_messages=sum(d.passed_messages for d in sent),
                age_seconds=round((now - pair.born_ns) / 1e9, 3),
            )
            flows.append(flow.to_json())
        return {"schema": SCHEMA, "flows": flows}

    def _answer_drain(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._drain_requested = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")
        return {"schema": SCHEMA, "draining": True}
