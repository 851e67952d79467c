# SPDX-License-Identifier: Apache-2.0
"""The daemon's answers to requests on the control socket, put together in the threads that serve them. What
takes longer, or is not theirs to do, they leave for the daemon's loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from splicer import __version__
from splicer.containers.watcher import Watcher
from splicer.daemon.attribution import Attribution
from splicer.daemon.control import Handler, Rows
from splicer.daemon.coverage import CoverageReporter
from splicer.daemon.mailbox import Mailbox, Task
from splicer.errors import USAGE, SplicerError
from splicer.host.cgroups import Cgroup
from splicer.host.process import read_own_pid, read_own_usage
from splicer.kernel.gauge import Gauge
from splicer.kernel.layout import COUNT_REFUSED, COUNTERS, TRAFFIC, TRAFFIC_KEY, Pair
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
from splicer.policy.reconciler import PolicyReconciler

# The daemon's loop turns at least once a second; a sweep that waits for a socket's lock may take longer.
_HEARTBEAT_S = 15.0


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
        self._find_neighbours = find_neighbours
        self._coverage = coverage
        self._started = time.monotonic()

    def by_command(self) -> dict[str, Handler]:
        """The handlers, by the name of the command that asks for them."""
        return {
            "status": self.status,
            "flows": self.flows,
            "policy": self.policy,
            "set": self.set,
            "unset": self.unset,
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
        beating = time.monotonic() - self._read_heartbeat() < _HEARTBEAT_S
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
            healthy=beating and not self._reconciler.failure,
            trouble=self._reconciler.failure or ("" if beating else "the daemon's loop does not turn"),
            docker=self._watcher.describe(),
            census=self._describe_census(),
            networks=self._describe_networks(),
            leases=self._describe_leases(),
            # Health checks and scrapers come by often, and do not ask.
            neighbours=self._find_neighbours().to_json() if request.get("neighbours") is True else {},
            coverage=self._coverage.measure().to_json() if request.get("coverage") is True else {},
            problems=self._reconciler.list_problems(),
            hold=self._reconciler.describe_hold(),
            traffic=self._attribution.sum_traffic([*self._read_closed(), *living.amounts.items()]),
            usage=asdict(read_own_usage()),
        )
        return status.to_json()

    def flows(self, request: Mapping[str, Any]) -> Rows:
        gauge = self._gauge if request.get("unread") is True else None
        return Rows({"schema": SCHEMA}, "flows", self._walk_flows(gauge))

    def _walk_flows(self, gauge: Gauge | None) -> Iterator[list[dict[str, Any]]]:
        found: dict[tuple[int, int, int], Owner] = {}
        for pairs in self._sweeper.walk_connections():
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            # A pair in the making has no state yet.
            known = (pair for pair in pairs if pair.state in STATES)
            yield [self._describe(pair, now, found, gauge).to_json() for pair in known]

    def _describe(
        self, pair: Pair, now_ns: int, found: dict[tuple[int, int, int], Owner], gauge: Gauge | None
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
            reason=REASON_NAMES[pair.reason] if pair.reason < len(REASON_NAMES) else "",
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
            }
            for rule, matches in self._reconciler.list_rules()
        ]
        return {
            "schema": SCHEMA,
            **self._reconciler.describe(),
            "docker": self._watcher.describe(),
            "rules": rules,
            "containers": [each.to_json() for each in containers],
        }

    def set(self, request: Mapping[str, Any]) -> dict[str, Any]:
        mode = request.get("mode")
        if mode not in CONTAINER_MODES:
            raise SplicerError(
                f"unknown mode ({mode})", hint=f"accepted: {', '.join(CONTAINER_MODES)}", exit_code=USAGE
            )
        changed, unchanged = self._reconciler.override(_read_container(request), mode)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "changed": changed, "unchanged": unchanged, "mode": mode}

    def unset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        changed, unchanged = self._reconciler.override(_read_container(request), None)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "changed": changed, "unchanged": unchanged}

    def drain(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        self._mailbox.post(Task.DRAIN_ALL)
        return {"schema": SCHEMA, "draining": True}

    def hold(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Plain TCP for some seconds, for everything or for `containers`."""
        seconds, texts = request.get("seconds"), request.get("containers")
        if not isinstance(seconds, int | float) or not (texts is None or isinstance(texts, list)):
            raise SplicerError("a hold wants seconds, and containers or none", exit_code=USAGE)
        texts = None if texts is None else [_read_container({"container": text}) for text in texts]
        names = self._reconciler.hold(str(request.get("holder") or ""), seconds, texts)
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "containers": names, "seconds": seconds}

    def release(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The policy as it is, at once."""
        released = self._reconciler.release(str(request.get("holder") or ""))
        self._mailbox.post(Task.LOOK_AT_ALL)
        return {"schema": SCHEMA, "released": released}


def _read_container(request: Mapping[str, Any]) -> str:
    text = request.get("container")
    if not isinstance(text, str) or not text:
        raise SplicerError("which container?", hint="list them with: splicer policy", exit_code=USAGE)
    return text
