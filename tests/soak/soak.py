# SPDX-License-Identifier: Apache-2.0
"""The run: workers that talk, phases without and with splicer, and what goes wrong meanwhile."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.cgroup import find_v2_root
from support.daemon import ControlError, call
from support.host import Host

from soak.chaos import KINDS, Event, Phase, plan_phases
from soak.crew import Crew, Hand
from soak.field import Field
from soak.quota import Bounds
from soak.tally import Tally
from soak.watch import Watch

MIXED, POLICY, EAGER, BLOCKING = 7000, 7001, 7002, 7003  # ports of the servers
LISTENERS = [
    {"host": "::", "port": MIXED, "dual": True},
    {"host": "0.0.0.0", "port": POLICY},
    {"host": "::", "port": EAGER, "dual": True},
]
BASE = f'[[policy]]\nports = {EAGER}\nmode = "eager"\n'
MISTAKES = ("= =", "mode = 'sometimes'\n", "[[policy]]\nmode = 'off'\n")
BLOCKING_CONNECTIONS = 6
LOOK_UP_PAUSE = 0.03  # seconds, between stalls whose flow is looked up
PATIENCE = 12.0  # seconds without a byte moved until a connection counts as stuck
FINISH_SECONDS = 40.0  # for all connections to end
SETTLE_SECONDS = 8.0  # for the maps to be empty afterwards
CONNECTIONS_PER_PACE = 130  # with more, each is slower, so that two cores can serve them all


class Interrupted(BaseException):
    """A signal: the run ends, and cleans up."""


@dataclass(frozen=True)
class Options:
    """What a run is to be. `patterns`, `reads` and `kinds` (of chaos): empty for all."""

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
    chaos: Counter[str] = field(default_factory=Counter)
    events: list[tuple[float, str]] = field(default_factory=list)  # chaos, and starts and stops of the daemon
    not_done: dict[str, str] = field(default_factory=dict)  # kind of chaos: why
    daemon_deaths: list[str] = field(default_factory=list)
    no_daemon: list[tuple[float, float]] = field(default_factory=list)  # from a SIGKILL to the next start
    described: list[dict[str, Any]] = field(default_factory=list)  # ends of flows that were rescued
    dead_workers: list[str] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)  # of maps, at the end
    still_open: int = 0
    refused: int = 0
    watch: Watch | None = None
    cpu: str = ""
    memory: str = ""
    seconds: float = 0.0
    interrupted: bool = False
    left_behind: str = ""


class Soak:
    """One run. `run` returns when everything is over; leaving the context removes everything."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.findings = Findings(options)
        self._stack = contextlib.ExitStack()
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._started = time.monotonic()
        self._away: set[int] = set()  # hosts that are being deleted
        self._phase: Phase | None = None
        self._pace = max(0.5, options.connections / CONNECTIONS_PER_PACE)
        self._wants_daemon = False
        self._killed_at = 0.0
        self._looked_up = 0.0

    def __enter__(self) -> Soak:
        options = self.options
        try:
            self.host = self._stack.enter_context(Host("--stop-timeout", "3", services=BASE, start=False))
            if shutil.which("setpriv"):
                # Not even SIGKILL of this process leaves a daemon behind.
                self.host.prefix = ("setpriv", "--pdeathsig", "TERM")
            self.field = Field(options.hosts)
            self._stack.callback(self.field.remove)
            self.bounds = Bounds(self.host.cgroup)
            self._stack.callback(self.bounds.remove)
            self.groups = [self.host.cgroup.child(f"h{host}") for host in range(options.hosts)]
            self.crew = Crew(nonce=random.Random(options.seed).getrandbits(16), seed=options.seed)
            self._stack.callback(self.crew.stop)
            self.crew.on_complaint = self._on_complaint
            self.watch = Watch(self.host, self._on_rescue)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        self.findings.watch = self.watch
        self.findings.cpu, self.findings.memory = self.bounds.cpu, self.bounds.memory
        if not self.bounds.memory:
            self.findings.not_done["memory"] = "no memory controller in this machine's cgroup v2"
        if not self.bounds.cpu:
            self.findings.not_done["quota"] = "no cpu controller; workers were stopped and continued instead"
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Host complains about what is left, but not on top of another error.
        try:
            self._stack.__exit__(kind, error, trace)
        except Exception as complaint:
            self.findings.left_behind = str(complaint)

    def run(self) -> Findings:
        """Carry out all phases, then close all connections and look at what is left of them."""
        kinds = frozenset(self.options.kinds or KINDS) - {"memory" if not self.bounds.memory else ""}
        phases = plan_phases(self.options.seed, self.options.seconds, kinds)
        self._started = time.monotonic()
        try:
            for host in range(self.options.hosts):
                self._man("server", host)
            self._man("control_server", self.options.hosts - 1)
            for host in range(self.options.hosts):
                self._man("client", host)
            self._man("control_client", 0)
            for phase in phases:
                self._carry_out(phase)
            self._finish()
        except Interrupted:
            self.findings.interrupted = True
        findings = self.findings
        findings.seconds = time.monotonic() - self._started
        findings.tally = self.crew.sum_tallies()
        findings.refused = self.crew.sum_refused()
        findings.described = self.crew.collect("described")
        findings.stalls = list(self.crew.stalls)
        findings.complaints = list(self.crew.complaints)
        findings.still_open = self.crew.count_open()
        return findings

    # phases

    def _carry_out(self, phase: Phase) -> None:
        self._say(f"phase {phase.number}: {'spliced' if phase.spliced else 'plain'}, {phase.seconds:.0f} s")
        self._phase = phase
        self._wants_daemon = phase.spliced
        if phase.spliced:
            self._start_daemon()
        else:
            self._stop_daemon()
        # Connections made while splicer did not run are never spliced; those that were spliced go on.
        self.crew.tell_all("phase", number=phase.number, spliced=phase.spliced, renew=phase.spliced)
        began = time.monotonic()
        for event in phase.events:
            self._at(began + event.at, lambda event=event: self._cause(event))
        self._wait(phase.seconds)
        while self._actions:  # what was begun is ended
            heapq.heappop(self._actions)[2]()

    def _finish(self) -> None:
        self._say("closing all connections")
        self._wants_daemon = True
        self._start_daemon()
        if "drain" in (self.options.kinds or KINDS):
            # All there are, while they talk: a number of transitions that every run has.
            self._note("drain")
            self._do_drain(random.Random(0))
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

    def _look(self) -> None:
        if self._wants_daemon and self.host.has_run and not self.host.daemon.alive:
            daemon = self.host.daemon
            self.findings.daemon_deaths.append(f"ended with {daemon.process.returncode}:\n{daemon.tail(30)}")
            self._start_daemon()
        self.watch.sample()
        for hand in self.crew.find_dead():
            self.findings.dead_workers.append(f"{hand.name}: {hand.process.returncode}")
            self._bury(hand)
            self._man(hand.role, hand.host)

    # workers

    def _man(self, role: str, host: int) -> None:
        """A worker, at work."""
        hand = self.crew.spawn(role, host, self.field.namespace(host), self.groups[host])
        limits = {"patterns": list(self.options.patterns), "reads": list(self.options.reads)}
        self.crew.tell(hand, "settings", pace=self._pace, patience=PATIENCE, **limits)
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

    def _bury(self, hand: Hand) -> None:
        """Kill a worker, and note that its connections may break off."""
        self.findings.killed[hand.name] = time.monotonic()
        self.crew.kill(hand)

    def _pick(self, rng: random.Random, *roles: str) -> Hand:
        return rng.choice([hand for hand in self.crew.hands if hand.role in roles or not roles])

    # the daemon

    def _start_daemon(self) -> None:
        if not (self.host.has_run and self.host.daemon.alive):
            self.host.start()
            self._note("started")
            if self._killed_at:
                self.findings.no_daemon.append((self._killed_at, time.monotonic()))
                self._killed_at = 0.0

    def _stop_daemon(self) -> None:
        if self.host.has_run and self.host.daemon.alive:
            self.watch.sample()
            code = self.host.daemon.stop()
            if code:
                self.findings.daemon_deaths.append(f"stop: {code}\n{self.host.daemon.tail(30)}")
            self._note("stopped")
            self.watch.end_generation()

    def _reload(self, text: str) -> None:
        self.host.config.write_text(text)
        if self.host.has_run and self.host.daemon.alive:
            try:
                self.host.reload(text)
            except AssertionError as error:
                self.findings.daemon_deaths.append(f"no reload: {error}\n{self.host.daemon.tail(30)}")

    # chaos

    def _cause(self, event: Event) -> None:
        self._note(event.kind)
        rng = random.Random(event.seed)
        getattr(self, f"_do_{event.kind}")(rng)
        self.findings.chaos[event.kind] += 1

    def _note(self, what: str) -> None:
        self.findings.events.append((time.monotonic(), what))
        self._say(f"  {what}")

    def _do_kill_client(self, rng: random.Random) -> None:
        self._kill(self._pick(rng, "client", "client", "control_client"), rng)

    def _do_kill_server(self, rng: random.Random) -> None:
        self._kill(self._pick(rng, "server", "server", "control_server"), rng)

    def _kill(self, hand: Hand, rng: random.Random) -> None:
        if hand.host in self._away:
            return
        self._bury(hand)
        self._later(rng.uniform(0.05, 0.6), lambda: self._replace(hand))

    def _replace(self, hand: Hand) -> None:
        present = {(each.role, each.host) for each in self.crew.hands}
        if hand.host not in self._away and (hand.role, hand.host) not in present:
            self._man(hand.role, hand.host)

    def _do_pause(self, rng: random.Random) -> None:
        hand = self._pick(rng)
        hand.process.send_signal(signal.SIGSTOP)
        self._later(rng.uniform(0.1, 1.3), lambda: hand.process.send_signal(signal.SIGCONT))

    def _do_quota(self, rng: random.Random) -> None:
        host = rng.randrange(self.options.hosts)
        hands = [hand for hand in self.crew.hands if hand.host == host]
        seconds = rng.uniform(1.0, 2.5)
        if self.bounds.cpu:
            self.bounds.limit_cpu(self.groups[host], [hand.pid for hand in hands], rng.uniform(0.05, 0.4))
            self._later(seconds, lambda: self.bounds.free_cpu(self.groups[host]))
            return
        for number in range(int(seconds / 0.1)):
            for hand in hands:
                self._later(number * 0.1, lambda hand=hand: hand.process.send_signal(signal.SIGSTOP))
                self._later(number * 0.1 + 0.07, lambda hand=hand: hand.process.send_signal(signal.SIGCONT))

    def _do_memory(self, rng: random.Random) -> None:
        group = rng.choice(self.groups)
        self.bounds.limit_memory(group, rng.choice((0, 1 << 20, 4 << 20)))
        self._later(rng.uniform(1.0, 3.0), lambda: self.bounds.free_memory(group))

    def _do_delete_namespace(self, rng: random.Random) -> None:
        host = rng.randrange(self.options.hosts)
        if host in self._away:
            return
        self._away.add(host)
        if rng.random() < 0.5:
            self.field.unplug(host)
            self._later(rng.uniform(0.1, 0.8), lambda: self._delete(host))
        else:
            self._delete(host)

    def _delete(self, host: int) -> None:
        roles = []
        for hand in [each for each in self.crew.hands if each.host == host]:
            self._bury(hand)
            roles.append(hand.role)
        self.field.delete_host(host)
        self.crew.tell_all("gone", hosts=[Field.address(host), Field.address(host, 6)])
        self.field.make_host(host)
        self._away.discard(host)
        present = {each.role for each in self.crew.hands if each.host == host}
        wanted = {"server", "client"}
        wanted |= {"control_client"} if host == 0 else set()
        wanted |= {"control_server"} if host == self.options.hosts - 1 else set()
        for role in sorted(wanted - present, reverse=True):
            self._man(role, host)

    def _do_policy(self, rng: random.Random) -> None:
        root = find_v2_root()
        assert root is not None
        host = rng.randrange(self.options.hosts)
        cgroup = str(self.groups[host].path.relative_to(root))
        texts = [
            f'[[policy]]\ncidr = "{Field.address(host)}"\nmode = "off"\n',
            f'[[policy]]\ncidr = "{Field.address(host, 6)}"\nmode = "off"\n',
            '[[policy]]\ncidr = "127.0.0.0/8"\nmode = "off"\n[[policy]]\ncidr = "::1"\nmode = "off"\n',
            f'[[policy]]\nports = {POLICY}\nmode = "off"\n',
            f'[[policy]]\nports = {POLICY}\nmode = "eager"\n',
            f'[[policy]]\nports = [{MIXED}, {EAGER}]\nmode = "off"\n',
            f'[[policy]]\nports = {BLOCKING}\nblocking = "allow"\n',
            f'[[policy]]\ncgroup = "{cgroup}"\nmode = "off"\n',
            'default = "off"\n',
            f'default = "off"\n[[policy]]\ncgroup = "{cgroup}"\nmode = "adaptive"\n',
            'mode = "eager"\n',
        ]
        text = rng.choice(texts)
        self._note(" ".join(text.split()))
        self._reload(text)
        self._later(rng.uniform(0.3, 2.5), lambda: self._reload(BASE))

    def _do_mistake(self, rng: random.Random) -> None:
        if self.host.daemon.alive:
            self._reload(rng.choice(MISTAKES))
            self._reload(BASE)

    def _do_drain(self, rng: random.Random) -> None:
        if self.host.daemon.alive:
            with contextlib.suppress(OSError, ControlError):
                self.host.daemon.drain()

    def _do_daemon_kill(self, rng: random.Random) -> None:
        self.watch.sample()
        self._wants_daemon = False
        self._killed_at = self._killed_at or time.monotonic()
        self.host.daemon.kill()
        self._later(rng.uniform(0.1, 2.0), self._bring_back)

    def _do_daemon_restart(self, rng: random.Random) -> None:
        self._wants_daemon = False
        self._stop_daemon()
        self._later(rng.uniform(0.0, 1.0), self._bring_back_and_renew)

    def _do_daemon_unload(self, rng: random.Random) -> None:
        self._wants_daemon = False
        self.watch.sample()
        self._killed_at = self._killed_at or time.monotonic()
        self.host.daemon.kill()
        done = call("unload", f"--run-dir={self.host.run_dir}", f"--pin-dir={self.host.pin_dir}")
        if done.code:
            self.findings.daemon_deaths.append(f"unload: {done}")
        self.watch.end_generation()
        self._later(rng.uniform(0.0, 1.0), self._bring_back_and_renew)

    def _bring_back(self) -> None:
        self._wants_daemon = True
        self._start_daemon()

    def _bring_back_and_renew(self) -> None:
        self._bring_back()
        assert self._phase is not None
        self.crew.tell_all("phase", number=self._phase.number, spliced=True, renew=True)

    # inside

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (when, next(self._numbers), action))

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(time.monotonic() + seconds, action)

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
