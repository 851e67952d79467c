# SPDX-License-Identifier: Apache-2.0
"""Which part of what a stack of programs says to each other is redirected, if splicer is started last;
between whom the rest is, and why it is plain."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from splicer.bench.ledger import Connection, Ledger, Looker, Packets, read_packets
from splicer.bench.model import Metric
from splicer.bench.progress import Progress
from splicer.bench.results import Row, format_number
from splicer.bench.services import NGINX, PAGES, SERVICES, Services, describe
from splicer.bench.splicing import Splicer
from splicer.bench.suite import Comparison, Findings, Workshop
from splicer.bench.testbed import TestbedError
from splicer.host.process import read_machine_cpu_seconds

# Seconds from the start of the load, or of splicer, until something is measured. A pair that was refused is
# tried again for the first time after two.
SETTLE = 5.0
GLANCE = 0.25
# Longer than any run.
LOAD_SECONDS = 3600
OLDER = "older, not listed"
UNLISTED = "not listed"
_WIDTH = 80
ENDED = "ended"


class Ends(NamedTuple):
    """Names of services: who has connected, and to whom."""

    client: str
    server: str


@dataclass
class Amount:
    connections: int = 0
    bytes: int = 0

    def add(self, connections: int, amount: int) -> None:
        self.connections += connections
        self.bytes += amount


@dataclass
class PairRow:
    """Two programs. Bytes are of both directions; `plain` went through TCP, by the reason for each connection
    at the end: "spliced" for what was spliced by then."""

    ends: Ends
    redirected_bytes: int = 0
    plain: dict[str, Amount] = field(default_factory=dict)

    @property
    def plain_bytes(self) -> int:
        return sum(amount.bytes for amount in self.plain.values())

    @property
    def share(self) -> float:
        return share_of(self.redirected_bytes, self.plain_bytes)

    def merge(self, other: PairRow) -> None:
        self.redirected_bytes += other.redirected_bytes
        for reason, amount in other.plain.items():
            self.plain.setdefault(reason, Amount()).add(amount.connections, amount.bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.ends._asdict(),
            "tcp_bytes": self.plain_bytes,
            "redirected_bytes": self.redirected_bytes,
            "share": self.share,
            "plain": {reason: asdict(amount) for reason, amount in self.plain.items()},
        }


def share_of(redirected: int, plain: int) -> float:
    return redirected / (redirected + plain) if redirected + plain else 0.0


def sum_redirected(traffic: Sequence[Mapping[str, Any]]) -> dict[Ends, int]:
    """Redirected bytes between services, from `traffic` of `splicer status`: closed connections too."""
    found: dict[Ends, int] = {}
    for row in traffic:
        ends = Ends(*(Path(row[end]["cgroup"]).name for end in ("client", "server")))
        found[ends] = found.get(ends, 0) + row["redirected_bytes"]
    return found


def explain(
    sent: Mapping[Connection, int],
    still_open: set[Connection],
    older: set[Connection],
    flows: Sequence[Mapping[str, Any]],
) -> list[PairRow]:
    """What went through TCP, by pair of services and by the reason that splicer gives for each connection.
    `older` are those that were there before it was."""
    known = {(flow["local"], flow["remote"]): flow for flow in flows}
    rows: dict[Ends, PairRow] = {}
    for connection, amount in sent.items():
        ends = Ends(connection.client, connection.server)
        flow = known.get((connection.client_end, connection.server_end))
        if connection not in still_open:
            reason = ENDED
        elif flow is None:
            reason = OLDER if connection in older else UNLISTED
        elif flow["state"] == "spliced":
            reason = "spliced"
        else:
            reason = flow["reason"] or flow["state"]
        row = rows.setdefault(ends, PairRow(ends))
        row.plain.setdefault(reason, Amount()).add(1, amount)
    return list(rows.values())


@dataclass(frozen=True)
class SplicedLeg:
    rows: Sequence[PairRow]
    missed_bytes: int


@dataclass(frozen=True)
class Rates:
    per_second: float
    cpu_us: float


@dataclass
class Measured:
    """Plain legs are one more than spliced ones. `errors` are wrk's, over all legs and between them."""

    services: Mapping[str, str]
    driver: str
    seconds: float
    plains: list[Rates] = field(default_factory=list)
    splices: list[Rates] = field(default_factory=list)
    legs: list[SplicedLeg] = field(default_factory=list)
    rescued: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[PairRow]:
        """Those of all legs, the most bytes first."""
        rows: dict[Ends, PairRow] = {}
        for leg in self.legs:
            for each in leg.rows:
                rows.setdefault(each.ends, PairRow(each.ends)).merge(each)
        return sorted(rows.values(), key=lambda row: -(row.plain_bytes + row.redirected_bytes))

    @property
    def shares(self) -> list[float]:
        """Of each leg, all pairs together."""
        return [
            share_of(sum(row.redirected_bytes for row in leg.rows), sum(row.plain_bytes for row in leg.rows))
            for leg in self.legs
        ]

    @property
    def missed(self) -> float:
        """The part of all that TCP has sent that no look at the sockets has seen."""
        missed = sum(leg.missed_bytes for leg in self.legs)
        seen = sum(row.plain_bytes for row in self.rows)
        return share_of(missed, seen)

    @property
    def metrics(self) -> list[Row]:
        return [
            Row(
                Metric(key, label, key == "per_second"),
                [getattr(rates, key) for rates in self.plains],
                [getattr(rates, key) for rates in self.splices],
            )
            for key, label in (("per_second", "requests/s"), ("cpu_us", "CPU us/request"))
        ]

    def failures(self) -> list[str]:
        return [f"stack: wrk counted {count} errors ({kind})" for kind, count in self.errors.items() if count]

    def to_json(self) -> dict[str, Any]:
        rows = self.rows
        return {
            "services": dict(self.services),
            "driver": self.driver,
            "seconds": self.seconds,
            "pairs": [row.to_json() for row in rows],
            "shares": self.shares,
            "share": share_of(
                sum(row.redirected_bytes for row in rows), sum(row.plain_bytes for row in rows)
            ),
            "missed": self.missed,
            "rescued": self.rescued,
            "errors": self.errors,
            "metrics": {row.metric.key: row.to_json() for row in self.metrics},
        }

    def to_text(self) -> str:
        lines = [
            *textwrap.wrap(", ".join(f"{name} {version}" for name, version in self.services.items()), _WIDTH),
            f"MariaDB by {self.driver}; splicer started last; {len(self.legs)} legs of {self.seconds:g} s",
            "",
            f"{'':<25}{'TCP MB':>8}{'redir. MB':>10}{'share':>6}  why the rest is plain",
        ]
        rows = self.rows
        for row in rows:
            name = f"{row.ends.client} -> {row.ends.server}"
            lines.append(_line(name, row.plain_bytes, row.redirected_bytes, self._why(row)))
        total = PairRow(Ends("", ""))
        for row in rows:
            total.merge(row)
        shares = f"{min(self.shares):.0%} - {max(self.shares):.0%} in a leg" if len(self.legs) > 1 else ""
        lines += [
            "",
            f"{'':<15}{'plain':>10}{'spliced':>10}  {'ratio (min - max)':<20}plain/plain",
            *(
                f"{each.metric.label:<15}{format_number(each.plain):>10}{format_number(each.spliced):>10}"
                f"  {each.ratios!s:<20}{each.noises}"
                for each in self.metrics
            ),
            f"{self.rescued} rescued; {self.missed:.1%} of what TCP has sent was not seen",
            "",
            _line("all", total.plain_bytes, total.redirected_bytes, shares),
        ]
        return "\n".join(lines)

    def _why(self, row: PairRow) -> str:
        """Shares of this pair's TCP bytes; the number of connections is that of one leg."""
        ordered = sorted(row.plain.items(), key=lambda item: -item[1].bytes)
        parts = []
        for reason, amount in ordered:
            part = amount.bytes / row.plain_bytes if row.plain_bytes else 0.0
            if part >= 0.005:
                number = amount.connections / len(self.legs)
                parts.append(f"{reason} {part:.0%} ({number:.0f})")
        return ", ".join(parts)


def _line(name: str, plain: int, redirected: int, why: str) -> str:
    share = share_of(redirected, plain)
    lines = [f"{name:<25}{plain / 1e6:>8.2f}{redirected / 1e6:>10.2f}{share:>6.0%}  "]
    indent = len(lines[0])
    for part in why.split(", "):
        glue = ", " if len(lines[-1]) > indent else ""
        if len(lines[-1]) + len(glue) + len(part) > _WIDTH - 1 and glue:
            lines[-1] += ","
            lines.append(" " * indent)
            glue = ""
        lines[-1] += glue + part
    return "\n".join(line.rstrip() for line in lines)


class Bench:
    """Measures one stack under one load that never pauses."""

    def __init__(self, services: Services, splicer: Splicer, seconds: float) -> None:
        self._bed = splicer.bed
        self._services = services
        self._splicer = splicer
        self._seconds = seconds
        self._lookers: dict[str, Looker] = {}

    def measure(self, into: Measured, connections: int, legs: int, progress: Progress) -> None:
        """Raises TestbedError."""
        with contextlib.ExitStack() as stack:
            for service, namespace in self._services.namespaces.items():
                with namespace.entered():
                    self._lookers[service.name] = stack.enter_context(contextlib.closing(Looker()))
            load = stack.enter_context(self._loading(connections))
            progress.begin(legs + 1)
            progress.step("stack: settling")
            self._pause(SETTLE, load)
            into.plains.append(self._watch(self._make_ledger())[0])
            for turn in range(legs):
                progress.step(f"stack: spliced, {turn + 1} of {legs}")
                self._measure_spliced(into, load)
                self._pause(1.0, load)
                into.plains.append(self._watch(self._make_ledger())[0])
            into.errors.update(self._end(load))

    @contextlib.contextmanager
    def _loading(self, connections: int) -> Iterator[subprocess.Popen[bytes]]:
        """wrk, outside of the cgroup: its users are on other hosts."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{LOAD_SECONDS}s", "--timeout", "10s"]
        command += ["-s", str(PAGES / "mix.lua"), f"http://{NGINX.address}:{NGINX.port}"]
        load = self._bed.start(
            command, self._bed.client, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, watched=False
        )
        try:
            yield load
        finally:
            self._bed.stop(load)

    @staticmethod
    def _pause(seconds: float, load: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            load.wait(seconds)
            raise TestbedError("wrk has ended")

    @staticmethod
    def _end(load: subprocess.Popen[bytes]) -> dict[str, int]:
        load.send_signal(signal.SIGINT)
        out, _ = load.communicate(timeout=20)
        try:
            report = json.loads(out.splitlines()[-1])
        except (IndexError, ValueError):
            raise TestbedError(f"wrk said {out[-200:]!r}") from None
        return {
            kind: report[kind] for kind in ("connect", "read", "write", "status", "timeout") if report[kind]
        }

    def _watch(self, ledger: Ledger) -> tuple[Rates, float]:
        """What is served meanwhile, and how many bytes TCP has sent. Plain legs are watched as well, for that
        costs a little."""
        begun, served, busy = time.monotonic(), self._count_served(), read_machine_cpu_seconds()
        first = last = self._look_and_weigh(ledger)
        while (left := begun + self._seconds - time.monotonic()) > 0:
            time.sleep(min(GLANCE, left))
            last = self._look_and_weigh(ledger)
        busy = read_machine_cpu_seconds() - busy
        # One of them is this question.
        served = self._count_served() - served - 1
        return Rates(served / (time.monotonic() - begun), busy / max(served, 1) * 1e6), last - first

    def _count_served(self) -> int:
        with (
            self._bed.client.entered(),
            contextlib.closing(HTTPConnection(NGINX.address, NGINX.port, timeout=10)) as connection,
        ):
            connection.request("GET", "/served")
            # Its third line: accepts, handled, requests.
            return int(connection.getresponse().read().splitlines()[2].split()[2])

    def _measure_spliced(self, into: Measured, load: subprocess.Popen[bytes]) -> None:
        with self._splicer.running():
            older = self._make_ledger()
            self._look(older)
            self._pause(SETTLE, load)
            ledger = self._make_ledger()
            before = sum_redirected(self._splicer.ask("status")["traffic"])
            rates, payload = self._watch(ledger)
            status, flows = self._splicer.ask("status"), self._splicer.ask("flows")["flows"]
            rows = {row.ends: row for row in explain(ledger.sent, ledger.open, older.open, flows)}
            for ends, amount in sum_redirected(status["traffic"]).items():
                if more := amount - before.get(ends, 0):
                    rows.setdefault(ends, PairRow(ends)).redirected_bytes = more
        seen = sum(ledger.sent.values()) + ledger.sent_elsewhere
        into.splices.append(rates)
        into.legs.append(SplicedLeg(list(rows.values()), max(0, round(payload - seen))))
        into.rescued += status["totals"]["rescued"]

    def _make_ledger(self) -> Ledger:
        return Ledger(
            {service.address: service.name for service in SERVICES},
            {service.name: service.port for service in SERVICES},
        )

    def _look(self, ledger: Ledger) -> None:
        ledger.look(itertools.chain.from_iterable(looker.look() for looker in self._lookers.values()))

    def _look_and_weigh(self, ledger: Ledger) -> float:
        """What IP has sent so far, in the middle of the look: that takes a while on a busy machine."""
        before = self._read_packets()
        self._look(ledger)
        return (before.payload + self._read_packets().payload) / 2

    def _read_packets(self) -> Packets:
        return sum((read_packets(pid) for pid in self._services.pids.values()), Packets())


def run(workshop: Workshop) -> Findings:
    """The suite `stack`."""
    options = workshop.options
    found = Measured(describe(options.python), options.driver, options.seconds or 5.0)
    connections = options.connections or 16
    with workshop.splicing() as splicer:
        services = Services(splicer.bed, connections, options.driver, options.python)
        with services.running():
            bench = Bench(services, splicer, found.seconds)
            bench.measure(found, connections, options.pairs, workshop.progress)
    workshop.write(found.to_text())
    redirected = sum(row.redirected_bytes for row in found.rows)
    comparison = Comparison("stack", "the stack as a whole", found.metrics, redirected)
    return Findings("stack", found.to_json(), [comparison], splicer.failures + found.failures())
