# SPDX-License-Identifier: Apache-2.0
"""The run: workers that talk, phases without and with splicer, and what goes wrong meanwhile."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from support.host import Host
from support.pauses import Stopwatch, count_explained_rescues

from soak.chaos import USUAL, WITHHELD, Event, Phase, plan_phases
from soak.crew import Crew, Hand
from soak.field import Field
from soak.findings import Findings, Options
from soak.keeper import Keeper
from soak.mischief import Mischief
from soak.pressure import Pressure
from soak.quota import Quota
from soak.services import BASE, BLOCKING, EAGER, LISTENERS, MIXED, POLICY
from soak.watch import Watch

BLOCKING_CONNECTIONS = 6
LOOK_UP_PAUSE = 0.03  # seconds, between stalls whose flow is looked up
# Of Findings, where readers are stopped while splicer stops and starts, or TCP itself waits for memory.
MORE_PATIENCE = 24.0
FINISH_SECONDS = 40.0  # for all connections to end
SETTLE_SECONDS = 8.0  # for the maps to be empty afterwards
CONNECTIONS_PER_PACE = 130  # with more, each is slower, so that two cores can serve them all
KILLED = -9


class Interrupted(BaseException):
    """A signal: the run ends, and cleans up."""


class Soak:
    """One run. `run` returns when everything is over; leaving the context removes everything."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.findings = Findings(options)
        self._stack = contextlib.ExitStack()
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._started = time.monotonic()
        self._phase: Phase | None = None
        self._pace = max(0.5, options.connections / CONNECTIONS_PER_PACE)
        self._looked_up = 0.0
        self._out_of_memory: Counter[int] = Counter()  # hosts, and how many of the dead are accounted for

    def __enter__(self) -> Soak:
        options, findings = self.options, self.findings
        self._kinds = set(options.kinds or USUAL)
        if self._kinds & set(WITHHELD):
            findings.patience = MORE_PATIENCE
        try:
            self.host = self._stack.enter_context(Host("--stop-timeout", "3", services=BASE, start=False))
            if shutil.which("setpriv"):
                # Not even SIGKILL of this process leaves a daemon behind.
                self.host.prefix = ("setpriv", "--pdeathsig", "TERM")
            self.field = Field(options.hosts)
            self._stack.callback(self.field.remove)
            self.quota = Quota(self.host.cgroup)
            self._stack.callback(self.quota.remove)
            self.pressure = Pressure(self.host.cgroup, sockets="socket_memory" in self._kinds)
            self._stack.callback(self.pressure.remove)
            self.groups = [self.host.cgroup.child(f"h{host}") for host in range(options.hosts)]
            self.crew = Crew(nonce=random.Random(options.seed).getrandbits(16), seed=options.seed)
            self._stack.callback(self.crew.stop)
            self.crew.on_complaint = self._on_complaint
            self.watch = Watch(self.host, self._on_rescue)
            self.mischief = Mischief(self)
            stopped = self.mischief.count_stopped
            self.keeper = Keeper(self.host, self.watch, findings, self.note, stopped)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        findings.watch = self.watch
        findings.cpu, findings.memory = self.quota.by, self.pressure.by
        if not self.quota.by:
            findings.not_done["quota"] = "no cpu controller; workers were stopped and continued instead"
        if not self.pressure.by:
            self._leave_out("memory", self.pressure.why_not)
        if not self.pressure.sockets:
            self._leave_out("socket_memory", "no memory controller of cgroup v1")
        return self

    def _leave_out(self, kind: str, why: str) -> None:
        if kind in self._kinds:
            self._kinds.discard(kind)
            self.findings.not_done[kind] = why

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Host complains about what is left, but not on top of another error.
        try:
            self._stack.__exit__(kind, error, trace)
        except Exception as complaint:
            self.findings.left_behind = str(complaint)

    def run(self) -> Findings:
        """Carry out all phases, then close all connections and look at what is left of them."""
        phases = plan_phases(self.options.seed, self.options.seconds, frozenset(self._kinds))
        self._started = time.monotonic()
        with Stopwatch() as stopwatch:
            try:
                for host in range(self.options.hosts):
                    self.man("server", host)
                self.man("control_server", self.options.hosts - 1)
                for host in range(self.options.hosts):
                    self.man("client", host)
                self.man("control_client", 0)
                for phase in phases:
                    self._carry_out(phase)
                self._finish()
            except Interrupted:
                self.findings.interrupted = True
        findings = self.findings
        if self.host.has_run:
            log = self.host.daemon.log.read_text(errors="replace")
            findings.rescued_in_pauses = count_explained_rescues(log, stopwatch)
        findings.seconds = time.monotonic() - self._started
        findings.tally = self.crew.sum_tallies()
        findings.refused = self.crew.sum_refused()
        findings.described = self.crew.collect("described")
        findings.stalls = list(self.crew.stalls)
        findings.complaints = list(self.crew.complaints)
        findings.still_open = self.crew.count_open()
        findings.memory_refused = self.pressure.count_refused()
        return findings

    # phases

    def _carry_out(self, phase: Phase) -> None:
        self._say(f"phase {phase.number}: {'spliced' if phase.spliced else 'plain'}, {phase.seconds:.0f} s")
        self._phase = phase
        if phase.spliced:
            self.keeper.start()
        else:
            self.keeper.stop()
        # Connections made while splicer did not run are never spliced; those that were spliced go on.
        self.tell_phase(renew=phase.spliced)
        began = time.monotonic()
        for event in phase.events:
            self._at(began + event.at, lambda event=event: self._cause(event))
        self._wait(phase.seconds)
        while self._actions:  # what was begun is ended
            heapq.heappop(self._actions)[2]()

    def _finish(self) -> None:
        self._say("closing all connections")
        self.keeper.start()
        if "drain" in self._kinds:
            # All there are, while they talk: a number of transitions that every run has.
            self.note("drain")
            self.keeper.drain()
            self._wait(1.5)
        self.crew.tell_all("finish")
        self._wait(2.0)
        deadline = time.monotonic() + FINISH_SECONDS
        while self.crew.count_open() and time.monotonic() < deadline:
            self._wait(0.5)
        self.findings.still_open = self.crew.count_open()
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self.findings.entries = self.watch.count_entries()
            if not any(self.findings.entries.values()) or time.monotonic() > deadline:
                break
            self._wait(0.5)
        self.watch.sample()

    def _wait(self, seconds: float) -> None:
        """Let time pass: due actions, and a look at everything each second."""
        end = time.monotonic() + seconds
        looked = 0.0
        while (now := time.monotonic()) < end:
            while self._actions and self._actions[0][0] <= time.monotonic():
                heapq.heappop(self._actions)[2]()
            if now - looked >= 1.0:
                looked = now
                self._look()
            time.sleep(0.03)

    def _cause(self, event: Event) -> None:
        self.note(event.kind)
        self.mischief.cause(event)
        self.findings.chaos[event.kind] += 1

    def _look(self) -> None:
        self.keeper.revive()
        self.watch.sample()
        for hand in self.crew.find_dead():
            if self._is_out_of_memory(hand):
                self.findings.out_of_memory += 1
                self.note(f"out of memory: {hand.name}")
            else:
                self.findings.dead_workers.append(f"{hand.name}: {hand.process.returncode}")
            self.bury(hand)
            self.man(hand.role, hand.host)

    def _is_out_of_memory(self, hand: Hand) -> bool:
        """True if the OOM killer has ended it: as good as killed by plan."""
        killed = self.pressure.count_killed(self.groups[hand.host])
        if hand.process.returncode != KILLED or killed <= self._out_of_memory[hand.host]:
            return False
        self._out_of_memory[hand.host] += 1
        return True

    # workers

    def man(self, role: str, host: int) -> None:
        """A worker, at work."""
        group = self.groups[host]
        hand = self.crew.spawn(role, host, self.field.namespace(host), group)
        if self.pressure.by and "control" not in role:
            # It is waited for, and must not wait for memory itself. Threads cannot be started without.
            self.pressure.free(group)
            self.pressure.join(group, hand.pid)
        limits = {"patterns": list(self.options.patterns), "reads": list(self.options.reads)}
        self.crew.tell(hand, "settings", pace=self._pace, patience=self.findings.patience, **limits)
        if self._phase is not None:
            number, spliced = self._phase.number, self._phase.spliced
            self.crew.tell(hand, "phase", number=number, spliced=spliced, renew=False)
        if role == "server":
            self.crew.tell(hand, "listen", listeners=LISTENERS)
            self.crew.wait(hand, "listening", 10.0)
        elif role == "control_server":
            self.crew.tell(hand, "listen", listeners=[{"host": "0.0.0.0", "port": BLOCKING}])
            self.crew.wait(hand, "listening", 10.0)
        elif role == "control_client":
            target = {"host": Field.address(self.options.hosts - 1), "port": BLOCKING}
            self.crew.tell(hand, "dial", connections=BLOCKING_CONNECTIONS, targets=[target])
        else:
            share = self.options.connections // self.options.hosts
            self.crew.tell(hand, "dial", connections=share, targets=self._targets(host))

    def _targets(self, host: int) -> list[dict[str, Any]]:
        """Loopback and the other hosts; IPv4, IPv6, and IPv4 through an IPv6 socket."""
        places = [("127.0.0.1", "::1", 3.0), (Field.address(host), Field.address(host, 6), 1.0)]
        others = [other for other in range(self.options.hosts) if other != host]
        places += [(Field.address(other), Field.address(other, 6), 8.0 / len(others)) for other in others]
        found = []
        for v4, v6, weight in places:
            for port, share in ((MIXED, 3.0), (POLICY, 1.5), (EAGER, 1.0)):
                found.append({"family": 4, "host": v4, "port": port, "weight": weight * share})
                mapped = {"family": 6, "host": f"::ffff:{v4}", "port": port, "weight": weight * share / 2}
                found.append(mapped)
                if port != POLICY:
                    found.append({"family": 6, "host": v6, "port": port, "weight": weight * share / 2})
        return found

    def bury(self, hand: Hand) -> None:
        """Kill a worker, if it lives, and note that its connections may break off."""
        self.findings.killed[hand.name] = hand.ended or time.monotonic()
        self.crew.kill(hand)

    def tell_phase(self, renew: bool) -> None:
        """What phase it is, and with `renew` that the connections there are end soon."""
        assert self._phase is not None
        number, spliced = self._phase.number, self._phase.spliced
        self.crew.tell_all("phase", number=number, spliced=spliced, renew=renew)

    # what mischief uses, too

    def note(self, what: str) -> None:
        """An event, for the report."""
        self.findings.events.append((time.monotonic(), what))
        self._say(f"  {what}")

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something then, or at the end of the phase."""
        self._at(time.monotonic() + seconds, action)

    # inside

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (when, next(self._numbers), action))

    def _on_complaint(self, kind: str, what: dict[str, Any]) -> None:
        """In the crew's thread: what splicer knows about the connection, before it is gone."""
        shown = (what.get(key, "") for key in ("worker", "pattern", "local", "how"))
        self._say(f"    {kind}: {' '.join(map(str, shown))}")
        now = time.monotonic()
        what["flow"] = None
        if kind in ("fault", "quiet", "stuck") or (kind == "stall" and now > self._looked_up + LOOK_UP_PAUSE):
            what["flow"] = self.watch.find_flow(what)
            self._looked_up = now

    def _on_rescue(self, flow: dict[str, Any]) -> None:
        port = int(flow["local"].rpartition(":")[2])
        for hand in self.crew.hands:
            self.crew.tell(hand, "describe", port=port)

    def _say(self, text: str) -> None:
        if self.options.verbose:
            print(f"{time.monotonic() - self._started:7.1f} {text}", file=sys.stderr, flush=True)
