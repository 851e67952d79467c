# SPDX-License-Identifier: Apache-2.0
"""What is measured by default and with --refused: wrk and a blocking client on nginx.

A workload starts its own servers for every leg: a connection that an earlier leg left open would be
plain for ever (splicer pairs connections when they are made), or would still be spliced.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nginx
import psutil
from cells import Spin
from model import Expected, Load, Metric, Sample, Workload
from nginx import LOOPBACK, ORIGIN_PORT, PROXY_PORT
from testbed import SERVER_ADDRESS, Namespace, Testbed, run_load

HERE = Path(__file__).resolve().parent
OFF = ("--default", "off")
# What splicer does not splice, and what spins, may be so much slower, beyond the noise of the machine.
REFUSED_BOUND = 0.98
SPINNING_BOUND = 0.97


def run_wrk(bed: Testbed, load: Load, where: Namespace, url: str, closing: bool = False) -> Sample:
    """One run of wrk in a namespace; `closing`: a connection per request."""
    busy = busy_seconds()
    command = ["wrk", f"-t{load.threads}", f"-c{load.connections}", f"-d{math.ceil(load.seconds)}s"]
    command += ["--latency", "-s", str(HERE / "report.lua")]
    if closing:
        command += ["-H", "Connection: close"]
    report = json.loads(run_load(bed, [*command, url], where))
    busy = busy_seconds() - busy
    errors = {kind: report[kind] for kind in ("connect", "read", "write", "status", "timeout")}
    metrics = {
        "rate": report["requests"] / report["duration"] * 1e6,
        "p50_us": float(report["p50"]),
        "p99_us": float(report["p99"]),
        "max_us": float(report["max"]),
        "cpu_us": busy / max(report["requests"], 1) * 1e6,
    }
    return Sample(metrics, {kind: count for kind, count in errors.items() if count}, report["requests"])


@dataclass(frozen=True)
class Wrk:
    """wrk on nginx, over the bridge or (`inside`) over loopback. `proxied`: through a second nginx server,
    all over loopback. `remote`: nginx is outside the cgroup that splicer watches."""

    name: str
    title: str
    path: str
    metrics: tuple[Metric, ...]
    proxied: bool = False
    inside: bool = False
    closing: bool = False
    remote: bool = False
    requests: int = nginx.FOR_EVER  # on one connection
    expected: Expected = "spliced"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    unit: str = "request"

    def measure(self, bed: Testbed, load: Load) -> Sample:
        where, address, port = bed.client, SERVER_ADDRESS, ORIGIN_PORT
        if self.proxied or self.inside:
            where, address = bed.server, LOOPBACK
        if self.proxied:
            port = PROXY_PORT
        with nginx.running(bed, load.workers, requests=self.requests, watched=not self.remote):
            url = f"http://{address}:{port}{self.path}"
            return run_wrk(bed, load, where, url, self.closing)


@dataclass(frozen=True)
class Blocking:
    """reader.py on nginx over loopback, one connection. Each has a CPU of its own for large bodies, and they
    share one for small ones, for the reason that cells.Cell gives."""

    name: str
    title: str
    path: str
    metrics: tuple[Metric, ...]
    closing: bool = False
    apart: bool = False
    expected: Expected = "refused"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    unit: str = "request"

    def measure(self, bed: Testbed, load: Load) -> Sample:
        program = [sys.executable, "-I", str(HERE / "reader.py"), LOOPBACK, str(ORIGIN_PORT), self.path]
        program += ["close" if self.closing else "keep-alive", str(load.seconds)]
        with nginx.running(bed, load.workers, cpu=1):
            busy = busy_seconds()
            metrics = json.loads(run_load(bed, program, bed.server, 0 if self.apart else 1))
            busy = busy_seconds() - busy
        requests = metrics.pop("requests")
        return Sample({**metrics, "cpu_us": busy / requests * 1e6}, requests=requests)


RATE = Metric("rate", "requests/s")
P50 = Metric("p50_us", "p50 us", higher_is_better=False)
P99 = Metric("p99_us", "p99 us", higher_is_better=False)
SLOWEST = Metric("max_us", "slowest us", higher_is_better=False)
COST = Metric("cpu_us", "CPU us/request", higher_is_better=False)

WRK_WORKLOADS = (
    Wrk(
        "keep-alive",
        "small responses over the bridge, keep-alive",
        "/small",
        (Metric("rate", "requests/s", bound=1.5), Metric("p50_us", "p50 us", False, 0.7), COST),
    ),
    Wrk(
        "close",
        "small responses over the bridge, a connection per request",
        "/small",
        (Metric("rate", "requests/s", bound=0.97), P50, COST),
        closing=True,
        expected="either",
    ),
    Wrk(
        "proxy-20k",
        "nginx proxying to nginx on loopback, 20 kB bodies",
        "/20k",
        (Metric("rate", "requests/s", bound=1.0), P50, COST),
        proxied=True,
    ),
    Wrk(
        "proxy-1m",
        "nginx proxying to nginx on loopback, 1 MB bodies",
        "/1m",
        (Metric("rate", "requests/s", bound=1.0), P50, COST),
        proxied=True,
    ),
)

_NO_SLOWER = (Metric("rate", "requests/s", bound=REFUSED_BOUND), P50, COST)
_BY_THE_BYTE = (Metric("megabytes", "MB/s", bound=REFUSED_BOUND), P50, COST)

REFUSED_WORKLOADS: tuple[Workload, ...] = (
    Blocking("blocking-1m", "a blocking client reads 1 MB bodies in 8 KiB", "/1m", _BY_THE_BYTE, apart=True),
    Blocking("blocking-small", "a blocking client, small responses, keep-alive", "/small", _NO_SLOWER),
    Blocking(
        "blocking-close", "a blocking client, a connection per request", "/small", _NO_SLOWER, closing=True
    ),
    *(
        Wrk(
            f"{group}-{name}",
            f"{what} over {'loopback' if group == 'off' else 'the bridge'}, {why}",
            path,
            _NO_SLOWER,
            inside=group == "off",
            closing=name == "close",
            remote=group == "remote",
            expected="refused",
            daemon_options=OFF if group == "off" else (),
        )
        for group, why in (("off", "with --default off"), ("remote", "nginx out of splicer's sight"))
        for name, path, what in (
            ("1m", "/1m", "1 MB bodies"),
            ("small", "/small", "small responses"),
            ("close", "/small", "a connection per request"),
        )
    ),
    Spin(SPINNING_BOUND),
)

LIFE_WORKLOADS = tuple(
    Wrk(
        f"proxy-{requests}-{size}",
        f"nginx proxying to nginx, connections of {requests} requests, {body} bodies",
        f"/{size}",
        (RATE, P50, P99, SLOWEST, COST),
        proxied=True,
        requests=requests,
    )
    for requests, size, body in (
        (300, "100b", "100 B"),
        (300, "20k", "20 kB"),
        (100, "20k", "20 kB"),
        (100, "300k", "300 kB"),
    )
)


def missing_programs() -> list[str]:
    return [program for program in ("ip", "nginx", "wrk") if shutil.which(program) is None]


def describe_nginx() -> str:
    """Its version."""
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().rpartition("/")[2]


def busy_seconds() -> float:
    """CPU time of the whole machine: most of a packet's is spent in interrupts, which no process is
    charged for. What a hypervisor gave to others is not in it."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
