# SPDX-License-Identifier: Apache-2.0
"""The daemon: answers the programs' events with sweeps, watches for stuck ends, drains when told to stop."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from splicer.containers.watcher import Watcher
from splicer.daemon.attribution import Attribution
from splicer.daemon.control import Server
from splicer.daemon.patrol import Patrol
from splicer.daemon.requests import RequestHandlers
from splicer.errors import SplicerError
from splicer.host import cgroups, notify
from splicer.host.cgroups import Cgroup
from splicer.host.process import Processes, sees_host_pids
from splicer.host.scopes import Scopes
from splicer.kernel import generation, libbpf, probes
from splicer.kernel.layout import STATE_PAIRED, EventType, Pair, read_event
from splicer.kernel.sweep import Sweeper
from splicer.logs import Logger
from splicer.model import REASON_NAMES, SCHEMA, STATES
from splicer.policy import config
from splicer.policy.config import Settings
from splicer.policy.reconciler import PolicyReconciler

# Sweeps for adoption may use about this share of one CPU, a little more while many pairs find no quiet
# moment; draining is more urgent.
_ADOPT_SHARE = 0.05
_ADOPT_PAUSE_S = 0.005
_ADOPT_PAUSE_MAX_S = 0.15
_ADOPT_BEGINNINGS = 5
_ADOPT_TURNS = 20
_DRAIN_PAUSE_S = 0.001
_DRAIN_PAUSE_MAX_S = 0.25
_TEND_PERIOD_S = 1.0
# How long the start waits for the list of containers, so that no policy comes too late for its container.
_INVENTORY_TIMEOUT_S = 5.0
_PENDING = REASON_NAMES.index("pending")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Daemon:
    """Owns one generation for the lifetime of `splicer run`."""

    def __init__(
        self, settings: Settings, cgroup: Cgroup, log: Logger, *, reread: Callable[[], Settings] | None = None
    ) -> None:
        """`reread` gives the settings anew when SIGHUP asks for that; raises SplicerError."""
        self._settings = settings
        self._cgroup = cgroup
        self._log = log
        self._reread = reread or (lambda: settings)
        self._generation: generation.Generation
        self._sweeper: Sweeper
        self._patrol: Patrol
        self._reconciler: PolicyReconciler
        self._requests: RequestHandlers
        self._heartbeat = time.monotonic()
        self._watchdog = notify.wants_watchdog(os.environ)
        # Namespace cookie to processes likely to be in it, with something to do there.
        self._to_adopt: dict[int, set[int]] = {}
        self._to_drain: dict[int, set[int]] = {}
        self._adopt_at = 0.0
        self._drain_at = 0.0
        self._drain_pause = _DRAIN_PAUSE_S
        self._tend_at = 0.0
        self._signals = 0
        self._untold: collections.deque[int] = collections.deque()
        self._held = 0
        # Set by other threads and by signals, each with a byte in the pipe that wakes the loop.
        self._drain_requested = False
        self._watch_requested = False
        self._reload_requested = False
        self._inventory_changed = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- life ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Attach, serve until a signal, drain, detach. Returns the exit code."""
        kernel = probes.require_class()
        previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        previous_fd = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            settings = self._settings
            plan = generation.Plan(
                settings.pin_dir, settings.max_connections, settings.stop_timeout, settings.debug
            )
            self._generation = generation.establish(plan, self._cgroup, self._log)
            self._sweeper = self._generation.sweeper()
            self._patrol = Patrol(self._sweeper)
            try:
                self._work_until_stopped(kernel.name)
            finally:
                self._sweeper.close()
                self._generation.remove()
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._log.info("stopped")
        return 0

    def _work_until_stopped(self, kernel_class: str) -> None:
        self._look_around()
        v2_root = cgroups.find_unified(cgroups.read_mounts()) or self._cgroup.path
        scopes = Scopes(v2_root)
        watcher = Watcher(self._settings.docker, scopes, self._on_inventory, self._log)
        maps = self._generation.maps
        self._reconciler = PolicyReconciler(
            self._settings, self._sweeper.settings, maps, v2_root, watcher.read_inventory, self._log
        )
        attribution = Attribution(lambda: watcher.read_inventory() or {}, scopes, Processes())
        self._requests = RequestHandlers(
            self._cgroup,
            kernel_class,
            maps,
            self._sweeper,
            self._reconciler,
            watcher,
            attribution,
            lambda: self._heartbeat,
        )
        handlers = {
            "status": self._requests.status,
            "flows": self._requests.flows,
            "policy": self._requests.policy,
            "set": self._set,
            "unset": self._unset,
            "drain": self._answer_drain,
        }
        with watcher:
            watcher.wait_first(_INVENTORY_TIMEOUT_S)
            self._reconciler.start_splicing()
            with Server(self._settings.run_dir, handlers, self._log), self._ready():
                self._log.info(
                    "ready", cgroup=self._cgroup.path, mode=self._settings.mode, kernel_class=kernel_class
                )
                notify.tell(os.environ, "READY=1")
                self._serve()
                notify.tell(os.environ, "STOPPING=1")
                self._stop()

    def _look_around(self) -> None:
        """Say what a container that this runs in lacks: it would splice next to nothing, and look healthy."""
        if self._cgroup.requested == cgroups.CONVENTIONAL_ROOT and not self._cgroup.is_root:
            self._log.warning(
                "cgroup_is_not_the_hosts_root",
                cgroup=self._cgroup.path,
                hint="mount the host's /sys/fs/cgroup into this container",
            )
        if not sees_host_pids():
            self._log.warning(
                "pids_are_not_the_hosts",
                hint="network namespaces and processes outside are not found; docker run --pid=host",
            )

    def _on_signal(self, number: int, _frame: object) -> None:
        # Between any two steps of this very thread, which may hold the lock of the log: say nothing here.
        self._untold.append(number)
        if number == signal.SIGHUP:
            self._reload_requested = True
        else:
            self._signals += 1

    def _tell_signals(self) -> None:
        while self._untold:
            self._log.info("signal", name=signal.Signals(self._untold.popleft()).name)

    @contextlib.contextmanager
    def _ready(self) -> Any:
        path = self._settings.ready_file
        if path:
            draft = f"{path}.{os.getpid()}"
            try:
                # Not through a link that somebody put there; a directory may be everybody's.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(draft)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with open(os.open(draft, flags, 0o644), "w") as file:
                    file.write(f"{os.getpid()}\n")
                os.replace(draft, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(draft)
                raise SplicerError(
                    f"cannot write the ready file ({path}: {error.strerror})",
                    hint="nothing was left attached; give another --ready-file",
                ) from error
        try:
            yield
        finally:
            if path:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _stop(self) -> None:
        """Drain for up to stop_timeout seconds; a second signal ends the waiting."""
        self._tell_signals()
        self._sweeper.settings.write(registering=False)
        left = self._sweeper.drain(self._settings.stop_timeout, lambda: self._signals > 1)
        self._tell_signals()
        self._log.info("drained", unread_connections=left)

    # -- policy --------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        # Full: it wakes anyway. Closed: it has ended.
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def _on_inventory(self) -> None:
        """Called by the watcher's thread."""
        self._inventory_changed = True
        self._wake()

    def _apply_policy(self) -> None:
        if self._reconciler.apply():
            self._patrol.ask_for_all()

    def _set(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._after_change(self._requests.set(request))

    def _unset(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._after_change(self._requests.unset(request))

    def _after_change(self, answer: dict[str, Any]) -> dict[str, Any]:
        # The policy is in the kernel; have living connections looked at now.
        self._watch_requested = True
        self._wake()
        return answer

    def _reload(self) -> None:
        """Read the configuration again. A mistake in it leaves everything as it was."""
        notify.tell_reloading(os.environ)
        try:
            fresh = self._reread()
        except SplicerError as error:
            self._log.error("reload_failed", error=error.message, hint=error.hint)
        else:
            outcome = config.reload(self._settings, fresh)
            if outcome.needs_restart:
                self._log.warning("restart_needed", settings=list(outcome.needs_restart))
            self._settings = outcome.settings
            self._reconciler.use_settings(self._settings)
            self._apply_policy()
            self._log.info("reloaded", changed=list(outcome.applied), policies=len(self._settings.policies))
        notify.tell(os.environ, "READY=1")

    # -- events --------------------------------------------------------------------------------------------

    def _receive(self, record: bytes) -> None:
        event = read_event(record)
        if event.type == EventType.WATCH:
            if event.name:
                self._patrol.ask(event.name)
            else:
                self._patrol.ask_for_readers(event.tgid[0])
            return
        target = self._to_adopt if event.type == EventType.ADOPT else self._to_drain
        for cookie in event.netns:
            target.setdefault(cookie, set()).update(pid for pid in event.tgid if pid)
        if event.type == EventType.DRAIN:
            self._hurry_to_drain()

    def _hurry_to_drain(self) -> None:
        self._drain_pause = _DRAIN_PAUSE_S
        self._drain_at = min(self._drain_at, time.monotonic() + _DRAIN_PAUSE_S)

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
            for pair in self._sweeper.list_pairs():
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
        deadlines = [self._tend_at, self._patrol.deadline]
        if self._to_adopt:
            deadlines.append(self._adopt_at)
        if self._to_drain:
            deadlines.append(self._drain_at)
        return max(0.0, min(deadlines) - time.monotonic())

    def _work(self) -> None:
        now = self._heartbeat = time.monotonic()
        self._tell_signals()
        if self._reload_requested:
            self._reload_requested = False
            self._reload()
        if self._inventory_changed:
            self._inventory_changed = False
            self._apply_policy()
        if self._watch_requested:
            self._watch_requested = False
            self._patrol.ask_for_all()
        if self._drain_requested:
            self._drain_requested = False
            self._drain_all()
        if self._to_drain and now >= self._drain_at:
            self._sweep_to_drain()
        if self._to_adopt and now >= self._adopt_at:
            self._sweep_to_adopt()
        if now >= self._tend_at:
            self._tend()
        if time.monotonic() >= self._patrol.deadline:
            self._watch()

    def _sweep_to_drain(self) -> None:
        counts = self._sweeper.sweep(self._to_drain)
        if not counts.to_drain and not counts.held:
            self._to_drain.clear()
            return
        # Somebody has yet to read, or is in the middle of a send.
        self._drain_at = time.monotonic() + self._drain_pause
        self._drain_pause = min(self._drain_pause * 2, _DRAIN_PAUSE_MAX_S)

    def _sweep_to_adopt(self) -> None:
        started = time.monotonic()
        # The ends of a pair go in one after the other. None is left alone while we pause: after some turns
        # nothing new is begun, and what is begun is finished or given up (MAX_HALF in bpf/adopt.c).
        for turn in range(_ADOPT_TURNS):
            if turn == _ADOPT_BEGINNINGS:
                self._sweeper.settings.write(finishing=True)
            counts = self._sweeper.sweep(self._to_adopt)
            if not counts.to_adopt and not counts.held:
                self._to_adopt.clear()
            if turn and not counts.half:
                break
        if turn >= _ADOPT_BEGINNINGS:
            self._sweeper.settings.write(finishing=False)
        ended = time.monotonic()
        pause = min(_ADOPT_PAUSE_MAX_S, (ended - started) / _ADOPT_SHARE)
        self._adopt_at = ended + max(_ADOPT_PAUSE_S, pause)

    def _tend(self) -> None:
        """What has to be done once a second, whatever happens."""
        self._tend_at = time.monotonic() + _TEND_PERIOD_S
        if self._watchdog:
            notify.tell(os.environ, "WATCHDOG=1")
        if self._reconciler.failure or self._reconciler.has_moved():
            self._apply_policy()
        if self._sweeper.held != self._held:
            self._held = self._sweeper.held
            self._log.warning("sweeps_held_up", namespaces=self._held)

    def _watch(self) -> None:
        report = self._patrol.work()
        if report.rescued:
            self._log.warning("rescued", ends=report.rescued)
        for cookie in report.orphaned:
            self._to_drain.setdefault(cookie, set())
            self._hurry_to_drain()

    def _drain_all(self) -> None:
        """An operator's wish: everything back to plain TCP, once. Nobody waits here: the watch must go on."""
        self._log.info("draining", connections=self._sweeper.begin_draining("request"))

    def _answer_drain(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._drain_requested = True
        self._wake()
        return {"schema": SCHEMA, "draining": True}
