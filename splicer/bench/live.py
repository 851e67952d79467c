# SPDX-License-Identifier: Apache-2.0
"""A service as it is: the daemon that runs here is told to keep it plain for each plain leg.

By a hold (splicer/policy/holds.py), which ends with the run however that ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from splicer.bench import wrk
from splicer.bench.chains import alternate, compare
from splicer.bench.children import find_number, run_child
from splicer.bench.model import Expected, Metric, Sample, Splicing
from splicer.bench.results import Leg, Result
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import signals_ignored
from splicer.daemon import control
from splicer.errors import USAGE, SplicerError
from splicer.host.process import read_machine_cpu_seconds
from splicer.model import REASONS
from splicer.text import plural

# A hold is asked for again so often, and ends by itself so long after that.
RENEWAL, LEASE = 5.0, 20.0
# How long connections may take to go back to plain TCP, or to be looked at again.
SETTLING = 5.0
WARM_UP = 1.0
# So many reasons are named.
MOST_REASONS = 4


@dataclass(frozen=True)
class Service:
    """What is compared. `port` is the one that its connections go to, 0 for those of the whole host."""

    name: str
    title: str
    metrics: tuple[Metric, ...]
    port: int = 0
    expected: Expected = "either"
    unit: str = "request"


class Switch:
    """Splicing off and on, for everything that the daemon of `run_dir` serves, or for some containers."""

    def __init__(self, run_dir: str, containers: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._containers = list(containers) or None
        self._holder = f"splicer bench {os.getpid()} {secrets.token_hex(4)}"
        self._held = False
        self._renew_at = 0.0

    def ask(self, command: str, **fields: object) -> dict[str, Any]:
        """Raises SplicerError."""
        return control.request(self._run_dir, command, fields, timeout=30.0)

    def close(self) -> None:
        """Leave everything as it was. A daemon that is gone holds nothing any more."""
        if self._held:
            with signals_ignored(), contextlib.suppress(SplicerError):
                self.ask("release", holder=self._holder)
            self._held = False

    def turn_off(self) -> None:
        """Until `turn_on`; then nothing that it is for is spliced. Raises SplicerError."""
        self._hold()
        self._settle(lambda: not self._count_spliced())

    def turn_on(self) -> None:
        if self._held:
            self.ask("release", holder=self._holder)
            self._held = False
            # A pair that policy kept plain is looked at again at once, and then spliced when it is hot.
            time.sleep(0.2)

    def renew(self) -> None:
        """To be called now and then while something is measured."""
        if self._held and time.monotonic() >= self._renew_at:
            self._hold()

    def _hold(self) -> None:
        self._held = True  # before it is: what comes between must not leave it
        self.ask("hold", holder=self._holder, seconds=LEASE, containers=self._containers)
        self._renew_at = time.monotonic() + RENEWAL

    def _settle(self, is_settled: Callable[[], bool]) -> None:
        """A connection whose reader takes nothing stays as it is: so this does not wait for ever."""
        deadline = time.monotonic() + SETTLING
        while not is_settled() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _count_spliced(self) -> int:
        if self._containers is None:
            connections = self.ask("status")["connections"]
            return int(connections["spliced"] + connections["draining"])
        policies = self.ask("policy")["containers"]
        names = {
            each["name"] for each in policies if {each["name"], each.get("service")} & set(self._containers)
        }
        return sum(
            flow["state"] != "paired"
            and bool({flow[end]["container"] for end in ("client", "server")} & names)
            for flow in self.ask("flows")["flows"]
        )


class Bench:
    """Measures one service by turns."""

    def __init__(self, workshop: Workshop, switch: Switch, service: Service) -> None:
        self._workshop = workshop
        self._switch = switch
        self._service = service
        self._flows: list[dict[str, Any]] | None = None
        self._plain_redirected: list[int] = []

    def measure(self, run: Callable[[Callable[[], None]], Sample]) -> Findings:
        """`run` is one leg; it calls what it is given now and then. Raises SplicerError."""
        options, progress = self._workshop.options, self._workshop.progress

        def measure_plain() -> Sample:
            self._switch.turn_off()
            before = self._count_redirected()
            sample = run(self._switch.renew)
            self._plain_redirected.append(self._count_redirected() - before)
            return sample

        def measure_spliced() -> Leg:
            return Leg(measure_plain(), None) if options.baseline else self._measure_spliced(run)

        progress.begin(2 * options.pairs + 1)
        with contextlib.closing(self._switch):
            legs = alternate(self._service.name, options.pairs, progress, measure_plain, measure_spliced)
        result = Result(self._service, *legs)
        self._workshop.write(result.to_text())
        comparison = compare(result)
        notes = self.explain() if comparison.redirected == 0 else []
        document = {**result.to_json(False), "redirected_in_plain_legs": self._plain_redirected}
        return Findings("workloads", [document], [comparison], result.failures(False), notes)

    def _measure_spliced(self, run: Callable[[Callable[[], None]], Sample]) -> Leg:
        self._switch.turn_on()
        before, begun = self._switch.ask("status"), time.monotonic()
        redirected, looked = before["totals"]["redirected_messages"], False

        def look() -> None:
            # Once, and where there is something to explain: a list of everything is not for nothing.
            nonlocal looked
            if not looked:
                looked = True
                if self._count_redirected() == redirected:
                    self._flows = self._switch.ask("flows")["flows"]

        sample = run(look)
        after = self._switch.ask("status")
        return Leg(sample, subtract(after, before, time.monotonic() - begun))

    def _count_redirected(self) -> int:
        """Messages of the whole host so far."""
        return int(self._switch.ask("status")["totals"]["redirected_messages"])

    def explain(self) -> list[str]:
        """What would have been needed for anything to be spliced."""
        if self._flows is None:
            return ["the runs are too short to look at their connections; longer ones are told why"]
        flows = [flow for flow in self._flows if is_at(flow, self._service.port)]
        if not flows:
            where = f" to port {self._service.port}" if self._service.port else ""
            return [
                f"splicer knows no connection{where} of this run: both ends have to be on this host, in the "
                "daemon's cgroup, and connected to each other, not through a relay that splices by itself"
            ]
        counted = Counter(flow["reason"] or flow["state"] for flow in flows)
        return [
            f"{number} of {len(flows)} connections: {reason}. {REASONS.get(reason, '')}".strip()
            for reason, number in counted.most_common(MOST_REASONS)
        ]


def is_at(flow: Mapping[str, Any], port: int) -> bool:
    """Does it go to that port, before or after DNAT? All do where it is 0."""
    return not port or any(str(flow[key]).endswith(f":{port}") for key in ("remote", "peer"))


def subtract(after: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> Splicing:
    """What the daemon did between two answers of `status`, `seconds` apart."""
    totals, earlier = after["totals"], before["totals"]
    keys = ("spliced", "redirected_messages", "redirected_bytes", "passed_messages", "rescued")
    refused = {
        reason: count - earlier["refused"].get(reason, 0)
        for reason, count in totals["refused"].items()
        if count > earlier["refused"].get(reason, 0)
    }
    cpu = after["usage"].get("cpu_seconds", 0.0) - before["usage"].get("cpu_seconds", 0.0)
    return Splicing(
        **{key: totals[key] - earlier[key] for key in keys},
        cpu_percent=round(100 * cpu / seconds, 1),
        rss_kib=after["usage"].get("rss_bytes", 0) // 1024,
        programs={},
        refused=refused,
    )


def _require_daemon(run_dir: str) -> None:
    """Raises SplicerError: not root, nothing that could be spliced, or (exit code 3) no daemon."""
    if os.geteuid() != 0:
        raise SplicerError("only root may switch splicing off and on", hint="sudo splicer bench")
    if control.request(run_dir, "status", timeout=30.0).get("paused"):
        raise SplicerError("splicing is paused, and would be in the spliced legs", hint="resume it first")


def measure_url(workshop: Workshop, run_dir: str, url: str, containers: Sequence[str]) -> Findings:
    """wrk on a service that is there. Raises SplicerError."""
    if shutil.which("wrk") is None:
        raise SplicerError("wrk is not installed, and makes the load for --url", hint="apt-get install wrk")
    parts = split_url(url)
    _require_daemon(run_dir)
    _require_answer(url)
    options = workshop.options
    seconds, connections = options.seconds or 3.0, options.connections or 16
    metrics = (wrk.RATE, wrk.P50, wrk.P99, wrk.COST)
    service = Service(parts.netloc.rpartition("@")[2], f"wrk on {url}", metrics, _find_port(parts))

    def run(tick: Callable[[], None], length: float = seconds) -> Sample:
        command = wrk.make_command(url, length, connections, options.threads)
        busy = read_machine_cpu_seconds()
        said = run_child(command, tick)
        return read_wrk(said, read_machine_cpu_seconds() - busy)

    run(lambda: None, WARM_UP)
    workshop.write(
        f"{plural(options.pairs, 'spliced leg')} of {seconds:g} s, a plain one before and after each; "
        f"{connections} connections"
    )
    findings = Bench(workshop, Switch(run_dir, containers), service).measure(run)
    findings.load = {"seconds": seconds, "connections": connections, "threads": options.threads}
    return findings


def read_wrk(said: str, busy_seconds: float) -> Sample:
    """wrk's last line. Raises SplicerError if there was no answer at all."""
    try:
        sample = wrk.read_report(said.strip().splitlines()[-1], busy_seconds)
    except (IndexError, ValueError, KeyError):
        raise SplicerError(f"wrk said something else ({said.strip()[-60:]})") from None
    if not sample.requests:
        raise SplicerError("the service did not answer one request of wrk", hint="try it: wrk -d1s URL")
    return sample


def split_url(url: str) -> SplitResult:
    """Raises SplicerError (exit code 2)."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise SplicerError(f"bad URL ({url})", hint="such as http://127.0.0.1:8080/", exit_code=USAGE)
    return parts


def _find_port(parts: SplitResult) -> int:
    return parts.port or {"http": 80, "https": 443}[parts.scheme]


def _require_answer(url: str) -> None:
    """One request. Raises SplicerError if it does not bring an answer, or one that says no."""
    unverified = ssl.create_default_context()  # wrk does not look at certificates either
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
    )
    try:
        with opener.open(url, timeout=10) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        raise SplicerError(f"{url} answers {error.code}", hint="name a page that it has") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise SplicerError(f"{url} does not answer ({why})", hint=f"try it: curl -i {url}") from None


def measure_command(
    workshop: Workshop, run_dir: str, command: str, containers: Sequence[str], more_is_better: bool
) -> Findings:
    """A command of the user's, whose number is compared. Raises SplicerError."""
    _require_daemon(run_dir)
    metrics = (Metric("number", "number", more_is_better),)
    service = Service("command", command, metrics, unit="run")

    def run(tick: Callable[[], None]) -> Sample:
        said = run_child(["sh", "-c", command], tick)
        return Sample({"number": find_number(said, command)}, requests=1)

    workshop.write(
        f"{plural(workshop.options.pairs, 'spliced run')}, a plain one before and after each: {command}"
    )
    # Before anything is switched: it may not work, and its first run may be slower than the others.
    run(lambda: None)
    return Bench(workshop, Switch(run_dir, containers), service).measure(run)
