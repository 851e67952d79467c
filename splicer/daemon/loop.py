# SPDX-License-Identifier: Apache-2.0
"""The daemon: answers the programs' events with sweeps, watches for stuck ends, drains when told to stop."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable

from splicer.containers.watcher import Watcher
from splicer.daemon.adoption import SweepQueues
from splicer.daemon.attempts import Attempts
from splicer.daemon.attribution import Attribution
from splicer.daemon.census import EARLIER, OFF, UNAVAILABLE, CensusTaker
from splicer.daemon.control import Server
from splicer.daemon.coverage import CoverageReporter
from splicer.daemon.endpoint import Endpoint, Source
from splicer.daemon.enlistment import Enlistment
from splicer.daemon.events import EventHandler, EventNoter
from splicer.daemon.explain import Explainer
from splicer.daemon.gathering import Gatherer
from splicer.daemon.journal import Journal, NotingLog
from splicer.daemon.lease import LeaseKeeper
from splicer.daemon.mailbox import Mailbox, Task
from splicer.daemon.networks import NetworkWatcher
from splicer.daemon.patrol import Patrol
from splicer.daemon.rates import RateReporter
from splicer.daemon.ready import ready_file
from splicer.daemon.reloading import ReloadReport
from splicer.daemon.requests import RequestHandlers
from splicer.daemon.signals import Signals
from splicer.errors import SplicerError
from splicer.host import cgroups, notify, process
from splicer.host.cgroups import Cgroup
from splicer.host.namespaces import Directory
from splicer.host.process import Processes, read_own_age, read_peak, sees_host_pids
from splicer.host.scopes import Scopes
from splicer.kernel import answer, generation, libbpf, neighbours, probes, tap, trials
from splicer.kernel.btf import Btf
from splicer.kernel.enlist import Enlister
from splicer.kernel.layout import CensusState, EventType, read_event
from splicer.kernel.probes import KernelClass
from splicer.kernel.sweep import Sweeper
from splicer.logs import Logger
from splicer.metrics import store
from splicer.metrics.histogram import Timings
from splicer.metrics.page import Page
from splicer.policy import config
from splicer.policy.advice import Facts
from splicer.policy.config import Settings
from splicer.policy.reconciler import PolicyReconciler

_TEND_PERIOD_S = 1.0
_TRIM_PERIOD_S = 10.0
# How long the start waits for the list of containers, so that no policy comes too late for its container.
_INVENTORY_TIMEOUT_S = 5.0
# So many processes are named that have left something unread at the stop.
_READERS = 8


class Daemon:
    """Owns one generation for the lifetime of `splicer run`."""

    def __init__(
        self,
        settings: Settings,
        cgroup: Cgroup,
        log: Logger,
        *,
        reread: Callable[[], Settings] | None = None,
        require_compiler: Callable[[], None] = lambda: None,
    ) -> None:
        """`reread` gives the settings anew when SIGHUP asks for that; raises SplicerError. So does
        `require_compiler`, where nothing can be compiled."""
        self._settings = settings
        self._cgroup = cgroup
        self._journal = Journal()
        self._log: Logger = NotingLog(log, self._journal)
        self._reread = reread or (lambda: settings)
        self._require_compiler = require_compiler
        self._generation: generation.Generation
        self._sweeper: Sweeper
        self._queues: SweepQueues
        self._patrol: Patrol
        self._leases: LeaseKeeper
        self._enlister: Enlister | None = None
        self._enlistment: Enlistment
        self._events: EventNoter
        self._attribution: Attribution
        self._rates: RateReporter
        self._census: CensusTaker
        self._reconciler: PolicyReconciler
        self._heartbeat = time.monotonic()
        self._watchdog = notify.wants_watchdog(os.environ)
        self._tend_at = 0.0
        self._trim_at = 0.0
        self._held = 0
        self._reload_report = ReloadReport()
        self._attempts = Attempts()
        self._mailbox = Mailbox()
        self._networks = NetworkWatcher(lambda: self._mailbox.post(Task.DRAIN_STALLED), self._log)
        self._signals = Signals(self._mailbox.write_fd, self._log)
        self._timings = Timings()
        self._endpoint = Endpoint(settings.metrics, self._log)

    # -- life ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Attach, serve until a signal, drain, detach. Returns the exit code."""
        process.share_memory_among_threads()
        with self._endpoint:
            return self._run()

    def _run(self) -> int:
        settings = self._settings
        may_answer = settings.fionread == "auto"
        kernel = probes.require_class(may_answer=may_answer)
        self._require_properties()
        with contextlib.closing(self._mailbox), self._signals:
            plan = generation.LoadPlan(
                settings.pin_dir,
                settings.max_connections,
                settings.stop_timeout,
                settings.debug,
                answer=may_answer and kernel.name != "C",
                cache_dir=settings.cache_dir,
            )
            self._generation = generation.take_over_or_load(
                plan, self._cgroup, self._log, self._require_compiler
            )
            fionread = self._find_who_answers(kernel, plan)
            self._sweeper = self._generation.sweeper()
            self._sweeper.timing = self._timings.sweeps.timing
            self._queues = SweepQueues(self._sweeper)
            self._patrol = Patrol(self._sweeper)
            self._leases = LeaseKeeper(settings.lease, self._sweeper, Directory(), self._log)
            self._enlister = self._generation.enlister(self._log)
            self._events = EventNoter(self._journal, self._sweeper)
            self._enlistment = Enlistment(
                self._enlister,
                self._queues,
                self._patrol.ask,
                self._sweeper.find_pair,
                note=self._events.note_outcome,
            )
            self._sweeper.settings.write(walking=self._enlister is None, switched=self._find_switch_marks())
            self._census = self._prepare_census()
            try:
                self._work_until_stopped(kernel.name, fionread)
            finally:
                self._census.close()
                self._sweeper.close()
                if self._enlister is not None:
                    self._enlister.close()
                self._generation.remove()
                store.remove(settings.run_dir)
        self._log.info("stopped")
        return 0

    def _require_properties(self) -> None:
        """Whatever else the data path relies on. Raises SplicerError (exit code 4) if the kernel lacks it."""
        for wanted in trials.PROPERTIES:
            found = trials.require(wanted)
            if found.answer is None:
                self._log.warning("property_not_known", property=wanted.name, evidence=found.evidence)
            elif not found.answer:
                self._log.info("property_missing", property=wanted.name, evidence=found.evidence)

    def _find_who_answers(self, kernel: KernelClass, plan: generation.LoadPlan) -> str:
        """Who sees to FIONREAD's answer for spliced sockets: see class Status. What ours answer is tried
        before anything is spliced. Raises SplicerError (exit code 4) on class A where nobody answers; nothing
        is left behind then."""
        loaded = self._generation
        if kernel.name == "C":
            return "kernel"
        if loaded.is_answering:
            try:
                found = probes.find_class(loaded.maps["ends"]).name
            except libbpf.KernelError as error:
                found = str(error.strerror)
            why = answer.judge(found)
            if not why:
                self._log.info("fionread_answered", kernel_class=kernel.name, note=probes.LOG_WARNING)
                return "splicer"
            loaded.stop_answering(why)
        why = loaded.unanswered or probes.SWITCHED_OFF
        if kernel.name == "A":
            if loaded.taken_over:
                loaded.drain(plan.drain_timeout)
            loaded.remove()
            raise probes.refuse_class_a(why)
        self._log.info("fionread_not_answered", kernel_class=kernel.name, why=why)
        return "nobody"

    def _prepare_census(self) -> CensusTaker:
        settings = self._sweeper.settings
        if not self._settings.census:
            return CensusTaker(None, self._log, instead=OFF)
        if settings.read().census == CensusState.DONE:
            # Whatever has been connected since then was registered.
            return CensusTaker(None, self._log, instead=EARLIER)
        steps = self._generation.find_older(settings, self._cgroup)
        return CensusTaker(steps, self._log, instead=UNAVAILABLE)

    def _find_switch_marks(self) -> int:
        """How the programs know of a read that it slept; 0 if they cannot, and leave all blocking readers
        alone."""
        btf = Btf()
        try:
            return probes.find_switch_marks(btf)
        except OSError as error:
            self._log.warning("sleepers_not_told_apart", error=error.strerror)
            return 0
        finally:
            btf.close()

    def _work_until_stopped(self, kernel_class: str, fionread: str) -> None:
        self._say_what_a_container_lacks()
        v2_root = cgroups.find_v2_mount(cgroups.read_mounts()) or self._cgroup.path
        scopes = Scopes(v2_root)
        watcher = Watcher(
            self._settings.docker, scopes, lambda: self._mailbox.post(Task.APPLY_POLICY), self._log
        )
        maps = self._generation.maps
        self._reconciler = PolicyReconciler(
            self._settings, self._sweeper.settings, maps, v2_root, watcher.read_inventory, self._log
        )
        gauge = self._generation.gauge()
        attribution = self._attribution = Attribution(
            lambda: watcher.read_inventory() or {}, scopes, Processes()
        )
        explainer = Explainer(
            self._cgroup,
            maps,
            self._sweeper,
            gauge,
            self._reconciler,
            attribution,
            self._attempts,
            self._census.describe,
            v2_root,
        )
        # One for all: they share a map in which is added up.
        volumes = self._generation.volumes()
        coverage = CoverageReporter(volumes, attribution, self._census.describe, self._read_facts)
        rates = self._rates = RateReporter(
            self._sweeper, maps["traffic"], volumes, attribution, coverage.find_owner
        )
        requests = RequestHandlers(
            self._cgroup,
            kernel_class,
            fionread,
            maps,
            self._sweeper,
            gauge,
            self._reconciler,
            watcher,
            attribution,
            self._mailbox,
            lambda: self._heartbeat,
            self._census.describe,
            self._networks.describe,
            self._leases.describe,
            self._reload_report.describe,
            lambda: neighbours.find(self._cgroup, self._settings.pin_dir),
            coverage,
        )
        events = EventHandler(self._journal, attribution, self._sweeper.find_raw_pair)
        handlers = requests.by_command() | {
            "explain": explainer.answer,
            "events": events.answer,
            "top": rates.answer,
        }
        with contextlib.ExitStack() as opened, watcher, self._networks:
            watcher.wait_first(_INVENTORY_TIMEOUT_S)
            self._reconciler.start_splicing()
            with (
                Server(self._settings.run_dir, handlers, self._log),
                ready_file(self._settings.ready_file),
            ):
                self._log.info(
                    "ready",
                    cgroup=self._cgroup.path,
                    mode=self._settings.mode,
                    kernel_class=kernel_class,
                    fionread=fionread,
                    start_seconds=round(read_own_age(), 2),
                    peak_mib=round(read_peak() / (1 << 20)),
                )
                if self._endpoint.is_on:
                    gatherer = Gatherer(
                        kernel_class,
                        fionread,
                        maps,
                        self._sweeper,
                        volumes,
                        attribution,
                        self._reconciler,
                        watcher.describe,
                        self._mailbox,
                        self._timings,
                        requests.find_trouble,
                        self._settings.run_dir,
                        self._settings.pin_dir,
                        self._log,
                    )
                    page = Page(gatherer.read)
                    source = Source(page.render, requests.find_trouble, self._find_hindrance)
                    opened.enter_context(self._endpoint.serving(source))
                notify.tell(os.environ, "READY=1")
                self._serve()
                notify.tell(os.environ, "STOPPING=1")
                self._stop()
                events.end()

    def _find_hindrance(self) -> str:
        """Why this is not ready, or not any more; empty if it is."""
        return "stopping" if self._signals.stops else ""

    def _read_facts(self) -> Facts:
        host = self._reconciler.describe()
        return Facts(
            host["default"], host["tcp_inq"], self._settings.max_connections, self._settings.hot_reads
        )

    def _say_what_a_container_lacks(self) -> None:
        """If this runs in one, without the host's cgroups or processes: it would splice next to nothing, and
        look healthy."""
        if self._cgroup.is_a_namespaces_root:
            self._log.warning(
                "cgroup_is_not_the_hosts_root",
                cgroup=self._cgroup.path,
                hint=cgroups.HINT_HOST_ROOT,
            )
        if not sees_host_pids():
            self._log.warning(
                "pids_are_not_the_hosts",
                hint=process.HINT_HOST_PIDS,
            )

    def _stop(self) -> None:
        """Drain for up to stop_timeout seconds; a second signal ends the waiting."""
        self._signals.tell()
        self._sweeper.settings.write(registering=False)
        done = self._sweeper.drain(self._settings.stop_timeout, lambda: self._signals.stops > 1)
        self._signals.tell()
        left: dict[str, object] = {"readers": list(done.readers[:_READERS])} if done.left else {}
        self._log.info(
            "drained",
            connections=done.pairs,
            seconds=round(done.seconds, 2),
            unread_connections=done.left,
            **left,
        )

    # -- the loop ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        if self._generation.taken_over:
            for pairs in self._sweeper.walk_pairs_read():
                self._queues.take_over(pairs)
                self._enlistment.take_over(pairs)
        ring = libbpf.RingBuffer(self._generation.maps["events"].fd, self._receive)
        try:
            with select.epoll() as poll:
                poll.register(ring.epoll_fd, select.EPOLLIN)
                poll.register(self._mailbox.read_fd, select.EPOLLIN)
                while not self._signals.stops:
                    poll.poll(self._next_timeout())
                    self._mailbox.empty_pipe()
                    with self._timings.turns.timing():
                        ring.consume()
                        self._work()
        finally:
            ring.close()

    def _receive(self, record: bytes) -> None:
        """Take note of an event of the programs."""
        event = read_event(record)
        self._events.receive(event)
        if event.type == EventType.ADOPT:
            self._attempts.note(event.name)
            self._networks.attend(event.netns, event.tgid)
            self._enlistment.receive(event)
        elif event.type == EventType.DRAIN:
            self._queues.receive(event)
        elif event.name:
            self._patrol.ask(event.name)
        else:
            self._patrol.ask_for_readers(event.tgid[0])

    def _next_timeout(self) -> float:
        waits = (self._enlistment, self._queues, self._patrol, self._leases, self._census)
        deadline = min(self._tend_at, *(each.deadline for each in waits))
        return max(0.0, deadline - time.monotonic())

    def _work(self) -> None:
        """Do what is asked for and what is due."""
        now = self._heartbeat = time.monotonic()
        self._enlist(now)
        self._signals.tell()
        if self._signals.take_reload():
            self._reload()
        if self._mailbox.take(Task.APPLY_POLICY):
            self._apply_policy()
        if self._mailbox.take(Task.LOOK_AT_ALL):
            self._patrol.ask_for_all()
        if self._mailbox.take(Task.DRAIN_ALL):
            self._drain_all()
        if self._mailbox.take(Task.DRAIN_STALLED):
            self._drain_stalled()
        self._queues.work(now)
        self._census.work()
        if now >= self._tend_at:
            self._tend()
        if time.monotonic() >= self._patrol.deadline:
            self._go_on_patrol()
        self._leases.work()

    def _enlist(self, now: float) -> None:
        try:
            self._enlistment.work(now)
        except OSError as error:
            # It could be run when it was loaded. Whatever has changed: there is another way.
            self._log.warning("enlist_not_run", error=str(error))
            self._sweeper.settings.write(walking=True)
            self._enlistment.give_up()

    def _tend(self) -> None:
        """What has to be done once a second, whatever happens."""
        self._tend_at = time.monotonic() + _TEND_PERIOD_S
        if self._watchdog:
            notify.tell(os.environ, "WATCHDOG=1")
        wanted = self._reconciler
        ended = wanted.is_hold_over()
        if ended or wanted.failure or wanted.have_cgroups_changed() or wanted.have_processes_changed():
            self._apply_policy()
        self._events.tend(self._attribution)
        if tap.remove_dead(self._settings.pin_dir, self._generation.maps["taps"]):
            self._log.info("tap_removed", note="its command ended without taking it away")
        if self._tend_at >= self._trim_at:
            self._trim_at = self._tend_at + _TRIM_PERIOD_S
            self._rates.forget()
            process.give_memory_back()
        if self._sweeper.held != self._held:
            self._held = self._sweeper.held
            self._log.warning("sweeps_held_up", namespaces=self._held)

    def _go_on_patrol(self) -> None:
        with self._timings.rounds.timing():
            report = self._patrol.work()
        if report.rescued:
            self._log.warning("rescued", ends=report.rescued)
        for cookie in report.orphaned:
            self._queues.drain(cookie)
        if report.namespaces is not None:
            self._networks.keep(report.namespaces)
        self._leases.receive(report.names, report.begun, report.talking)

    def _apply_policy(self) -> None:
        if self._reconciler.apply():
            self._patrol.ask_for_all()

    def _reload(self) -> None:
        """Read the configuration again. A mistake in it leaves everything as it was."""
        notify.tell_reloading(os.environ)
        try:
            fresh = self._reread()
        except SplicerError as error:
            self._log.error("reload_failed", error=error.message, hint=error.hint)
            self._reload_report.note(error)
        else:
            self._reload_report.note(None)
            outcome = config.reload(self._settings, fresh)
            if outcome.needs_restart:
                self._log.warning("restart_needed", settings=list(outcome.needs_restart))
            self._settings = outcome.settings
            self._leases.lease = self._settings.lease
            self._reconciler.use_settings(self._settings)
            self._apply_policy()
            self._log.info("reloaded", changed=list(outcome.applied), policies=len(self._settings.policies))
        notify.tell(os.environ, "READY=1")

    def _drain_stalled(self) -> None:
        """What plain TCP would not carry any more goes back to it."""
        losses = self._networks.take()
        if losses and (names := self._sweeper.find_stalled(losses)):
            self._log.info("network_gone", connections=self._sweeper.begin_draining("network_gone", names))

    def _drain_all(self) -> None:
        """An operator's wish: everything back to plain TCP, once. Nobody waits here: the watch must go on."""
        self._log.info("draining", connections=self._sweeper.begin_draining("request"))
