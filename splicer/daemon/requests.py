# SPDX-License-Identifier: Apache-2.0
"""The daemon's answers to requests on the control socket, put together in the threads that serve them. What
takes longer, or is not theirs to do, they leave for the daemon's loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from splicer import __version__
from splicer.containers.watcher import Watcher
from splicer.daemon.attribution import Attribution
from splicer.daemon.control import Handler, Rows
from splicer.daemon.coverage import CoverageReporter
from splicer.daemon.judge import Judge, Judges
from splicer.daemon.mailbox import Mailbox, Task
from splicer.errors import USAGE, SplicerError
from splicer.host.cgroups import Cgroup
from splicer.host.process import read_own_pid, read_own_usage
from splicer.kernel.gauge import Gauge
from splicer.kernel.layout import (
    COUNT_REFUSED,
    COUNTERS,
    STATE_SPLICED,
    TRAFFIC,
    TRAFFIC_KEY,
    Pair,
    read_pair,
)
from splicer.kernel.libbpf import Map
from splicer.kernel.sweep import Sweeper
from splicer.kernel.tally import Amount
from splicer.model import (
    REASON_NAMES,
    SCHEMA,
    STATES,
    Connections,
    Flow,
    Neighbourhood,
    Owner,
    Status,
    Totals,
)
from splicer.policy.config import CONTAINER_MODES
from splicer.policy.overrides import KINDS
from splicer.policy.reconciler import PolicyReconciler

# The daemon's loop turns at least once a second; a sweep that waits for a socket's lock may take longer.
_HEARTBEAT_S = 15.0
DESCRIBED_AT_ONCE = 256
"""So many connections one request can ask to have described."""


class RequestHandlers:
    """Answers about one generation of programs, and changes of it."""

    def __init__(
        self,
        cgroup: Cgroup,
        kernel_class: str,
        fionread: str,
        maps: Mapping[str, Map],
        sweeper: Sweeper,
        gauge: Gauge | None,
        reconciler: PolicyReconciler,
        watcher: Watcher,
        attribution: Attribution,
        mailbox: Mailbox,
        read_heartbeat: Callable[[], float],
        describe_census: Callable[[], dict[str, Any]],
        describe_networks: Callable[[], dict[str, Any]],
        describe_leases: Callable[[], dict[str, Any]],
        describe_reload: Callable[[], dict[str, Any]],
        find_neighbours: Callable[[], Neighbourhood],
        coverage: CoverageReporter,
    ) -> None:
        """`read_heartbeat` gives the time (time.monotonic()) at which the daemon's loop last turned."""
        self._cgroup = cgroup
        self._kernel_class = kernel_class
        self._fionread = fionread
        self._maps = maps
        self._sweeper = sweeper
        self._gauge = gauge
        self._reconciler = reconciler
        self._watcher = watcher
        self._attribution = attribution
        self._mailbox = mailbox
        self._read_heartbeat = read_heartbeat
        self._describe_census = describe_census
        self._describe_networks = describe_networks
        self._describe_leases = describe_leases
        self._describe_reload = describe_reload
        self._find_neighbours = find_neighbours
        self._coverage = coverage
        self._judges = Judges(reconciler, attribution)
        self._started = time.monotonic()

    def by_command(self) -> dict[str, Handler]:
        """The handlers, by the name of the command that asks for them."""
        return {
            "status": self.status,
            "flows": self.flows,
            "describe": self.describe,
            "policy": self.policy,
            "set": self.set,
            "unset": self.unset,
            "pause": self.pause,
            "resume": self.resume,
            "drain": self.drain,
            "hold": self.hold,
            "release": self.release,
            "advise": self._coverage.advise,
        }

    def _read_closed(self) -> list[tuple[tuple[int, int], Amount]]:
        found = []
        for key, value in self._maps["traffic"].items():
            client, server = TRAFFIC_KEY.unpack(key)
            found.append(((client, server), Amount(*TRAFFIC.unpack(value))))
        return found

    def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        counted = {name: self._sweeper.read_counter(index) for index, name in enumerate(COUNTERS)}
        refused = {
            name: n
            for index, name in enumerate(REASON_NAMES)
            if name and (n := self._sweeper.read_counter(COUNT_REFUSED + index))
        }
        living = self._sweeper.tally()
        states = dict.fromkeys(STATES.values(), 0)
        for number, name in STATES.items():
            states[name] += living.states[number]
        host = self._reconciler.describe()
        settings = self._sweeper.settings.read()
        trouble = self.find_trouble()
        status = Status(
            pid=read_own_pid(),
            version=__version__,
            mode=host["mode"],
            default=host["default"],
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
            fionread=self._fionread,
            adoption="walk" if settings.walking else "name",
            blocking_readers="told apart" if settings.switched else "refused",
            uptime_seconds=round(time.monotonic() - self._started, 3),
            healthy=not trouble,
            trouble=trouble,
            docker=self._watcher.describe(),
            census=self._describe_census(),
            networks=self._describe_networks(),
            leases=self._describe_leases(),
            paused=self._describe_pause(),
            reload=self._describe_reload(),
            # Health checks and scrapers come by often, and do not ask.
            neighbours=self._find_neighbours().to_json() if request.get("neighbours") is True else {},
            coverage=self._coverage.measure().to_json() if request.get("coverage") is True else {},
            problems=self._reconciler.list_problems(),
            hold=self._reconciler.describe_hold(),
            traffic=self._attribution.sum_traffic([*self._read_closed(), *living.amounts.items()]),
            usage=asdict(read_own_usage()),
        )
        return status.to_json()

    def find_trouble(self) -> str:
        """Why this is not healthy; empty if it is."""
        beating = time.monotonic() - self._read_heartbeat() < _HEARTBEAT_S
        return self._reconciler.failure or ("" if beating else "the daemon's loop does not turn")

    def _describe_pause(self) -> dict[str, Any]:
        since = self._reconciler.paused_seconds
        return {} if since is None else {"since_seconds": round(since, 3)}

    def flows(self, request: Mapping[str, Any]) -> Rows:
        gauge = self._gauge if request.get("unread") is True else None
        return Rows({"schema": SCHEMA}, "flows", self._walk_flows(gauge))

    def _walk_flows(self, gauge: Gauge | None) -> Iterator[list[dict[str, Any]]]:
        found: dict[tuple[int, int, int], Owner] = {}
        judge = self._judges.make()
        for pairs in self._walk_known():
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            yield [self._describe(pair, now, found, gauge, judge).to_json() for pair in pairs]

    def describe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Rows as of `flows`, for some connections by their names; none for those that have gone."""
        names = request.get("connections")
        if not isinstance(names, list) or len(names) > DESCRIBED_AT_ONCE:
            raise SplicerError(f"up to {DESCRIBED_AT_ONCE} connections can be described", exit_code=USAGE)
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        found: dict[tuple[int, int, int], Owner] = {}
        judge = self._judges.make()
        rows = {}
        for name in names:
            if not isinstance(name, int) or not 0 <= name < 1 << 64:
                raise SplicerError("a connection is named by 64 bits", exit_code=USAGE)
            value = self._maps["pairs"].get(name.to_bytes(8, sys.byteorder))
            if value is not None and (pair := read_pair(value)).state in STATES:
                rows[str(name)] = self._describe(pair, now, found, None, judge).to_json()
        return {"schema": SCHEMA, "flows": rows}

    def _walk_known(self) -> Iterator[list[Pair]]:
        # A pair in the making has no state yet.
        for pairs in self._sweeper.walk_connections():
            yield [pair for pair in pairs if pair.state in STATES]

    def _describe(
        self,
        pair: Pair,
        now_ns: int,
        found: dict[tuple[int, int, int], Owner],
        gauge: Gauge | None,
        judge: Judge,
    ) -> Flow:
        sent = (pair.client_sends, pair.server_sends)
        unread = (gauge.read(pair) if gauge else None) or (None, None)
        return Flow(
            local=pair.client.local,
            remote=pair.client.remote,
            peer=pair.server.local,
            netns=pair.client.netns,
            peer_netns=pair.server.netns,
            state=STATES[pair.state],
            reason=judge.find_reason(pair),
            redirected_bytes=sum(d.redirected_bytes for d in sent),
            redirected_messages=sum(d.redirected_messages for d in sent),
            passed_messages=sum(d.passed_messages for d in sent),
            age_seconds=round((now_ns - pair.born_ns) / 1e9, 3),
            client=self._attribution.find_owner(pair.client, found),
            server=self._attribution.find_owner(pair.server, found),
            client_unread=unread[0],
            server_unread=unread[1],
        )

    def policy(self, request: Mapping[str, Any]) -> dict[str, Any]:
        text = request.get("container")
        containers = self._reconciler.explain(text if isinstance(text, str) else None)
        listed = self._reconciler.list_rules()
        counts = self._judges.make().count_matches([rule for rule, _ in listed], self._walk_known)
        rules = [
            {
                "number": rule.number,
                "file": rule.file,
                "selectors": rule.selectors,
                "ports": list(rule.ports),
                "mode": rule.mode,
                "blocking": rule.blocking,
                "tcp_inq": rule.tcp_inq,
                "matches": matches,
                "connections": connections,
            }
            for (rule, matches), connections in zip(listed, counts, strict=True)
        ]
        overridden = [
            {"kind": subject.kind, "value": subject.value, "mode": mode}
            for subject, mode in self._reconciler.list_overrides()
        ]
        return {
            "schema": SCHEMA,
            **self._reconciler.describe(),
            "docker": self._watcher.describe(),
            "rules": rules,
            "overrides": overridden,
            "containers": [each.to_json() for each in containers],
        }

    def set(self, request: Mapping[str, Any]) -> dict[str, Any]:
        mode = request.get("mode")
        if mode not in CONTAINER_MODES:
            raise SplicerError(
                f"unknown mode ({mode})", hint=f"accepted: {', '.join(CONTAINER_MODES)}", exit_code=USAGE
            )
        kind, text = _read_subject(request)
        changed, unchanged = self._reconciler.override(text, mode, kind)
        self._mailbox.post(Task.LOOK_AT_ALL)
        note = self._reconciler.note(text, kind)
        return {"schema": SCHEMA, "changed": changed, "unchanged": unchanged, "mode": mode, "note": note}

    def unset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        kind, text = _read_subject(request)
        changed, unchanged = self._reconciler.override(text, None, kind)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "changed": changed, "unchanged": unchanged}

    def pause(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        count = self._count_spliced()
        changed = self._reconciler.pause(True)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "paused": True, "changed": changed, "connections": count}

    def resume(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        changed = self._reconciler.pause(False)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "paused": False, "changed": changed}

    def drain(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        count = self._count_spliced()
        self._mailbox.post(Task.DRAIN_ALL)
        return {"schema": SCHEMA, "draining": True, "connections": count}

    def _count_spliced(self) -> int:
        return self._sweeper.tally().states[STATE_SPLICED]

    def hold(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Plain TCP for some seconds, for everything or for `containers`."""
        seconds, texts = request.get("seconds"), request.get("containers")
        if not isinstance(seconds, int | float) or not (texts is None or isinstance(texts, list)):
            raise SplicerError("a hold wants seconds, and containers or none", exit_code=USAGE)
        texts = None if texts is None else [_require_container(text) for text in texts]
        names = self._reconciler.hold(str(request.get("holder") or ""), seconds, texts)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "containers": names, "seconds": seconds}

    def release(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The policy as it is, at once."""
        released = self._reconciler.release(str(request.get("holder") or ""))
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "released": released}


def _require_container(text: object) -> str:
    if isinstance(text, str) and text:
        return text
    raise _ask_which()


def _ask_which() -> SplicerError:
    return SplicerError("which container?", hint="list them with: splicer policy", exit_code=USAGE)


def _read_subject(request: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of what an override is about, and what the operator wrote of it."""
    for kind in KINDS:
        text = request.get(kind)
        if isinstance(text, str) and text:
            return kind, text
    raise _ask_which()
