# SPDX-License-Identifier: Apache-2.0
"""The workloads of the suites wrk, plain and lives: wrk and a blocking client on nginx.

A workload starts its own servers for every leg: a connection that an earlier leg left open would be
plain for ever (splicer pairs connections when they are made), or would still be spliced.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

from splicer.bench import nginx, wrk
from splicer.bench.cells import Spin
from splicer.bench.model import Expected, Load, Metric, Sample, Workload
from splicer.bench.nginx import LOOPBACK, ORIGIN_PORT, PROXY_PORT
from splicer.bench.testbed import LOADS, SERVER_ADDRESS, Namespace, Testbed, run_load
from splicer.bench.wrk import COST, P50, P99, RATE, SLOWEST
from splicer.host.process import read_machine_cpu_seconds

OFF = ("--default", "off")
# What is imported and not called, by the name of what is to be installed.
_MODULES = {"grpcio": "grpc"}
# What splicer does not splice, and what spins, may be so much slower, beyond the noise of the machine.
REFUSED_BOUND = 0.98
SPINNING_BOUND = 0.97


def run_wrk(bed: Testbed, load: Load, where: Namespace, url: str, closing: bool = False) -> Sample:
    """One run of wrk in a namespace; `closing`: a connection per request."""
    busy = read_machine_cpu_seconds()
    command = wrk.make_command(url, load.seconds, load.connections, load.threads, closing=closing)
    line = run_load(bed, command, where)
    return wrk.read_report(line, read_machine_cpu_seconds() - busy)


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
    connections: int | None = None  # instead of those that the user asks for
    expected: Expected = "spliced"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    unit: str = "request"
    programs: tuple[str, ...] = ("ip", "nginx", "wrk")

    def measure(self, bed: Testbed, load: Load) -> Sample:
        load = replace(load, connections=self.connections or load.connections)
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
    programs: tuple[str, ...] = ("ip", "nginx")

    def measure(self, bed: Testbed, load: Load) -> Sample:
        program = [sys.executable, "-I", str(LOADS / "reader.py"), LOOPBACK, str(ORIGIN_PORT), self.path]
        program += ["close" if self.closing else "keep-alive", str(load.seconds)]
        with nginx.running(bed, load.workers, cpu=1):
            busy = read_machine_cpu_seconds()
            metrics = json.loads(run_load(bed, program, bed.server, 0 if self.apart else 1))
            busy = read_machine_cpu_seconds() - busy
        requests = metrics.pop("requests")
        return Sample({**metrics, "cpu_us": busy / requests * 1e6}, requests=requests)


WRK_WORKLOADS = (
    Wrk(
        "keep-alive",
        "small responses over the bridge, keep-alive",
        "/small",
        (Metric("rate", "requests/s", bound=1.5), Metric("p50_us", "p50 us", False, 0.7), P99, COST),
    ),
    *(
        Wrk(
            f"keep-alive-{number}",
            f"the same with {number} {'connection' if number == 1 else 'connections'}",
            "/small",
            (RATE, P50, P99, COST),
            connections=number,
        )
        for number in (1, 128)
    ),
    Wrk(
        "close",
        "small responses over the bridge, a connection per request",
        "/small",
        (Metric("rate", "requests/s", bound=0.97), P50, P99, COST),
        closing=True,
        expected="either",
    ),
    Wrk(
        "proxy-20k",
        "nginx proxying to nginx on loopback, 20 kB bodies",
        "/20k",
        (Metric("rate", "requests/s", bound=1.0), P50, P99, COST),
        proxied=True,
    ),
    Wrk(
        "proxy-1m",
        "nginx proxying to nginx on loopback, 1 MB bodies",
        "/1m",
        (Metric("rate", "requests/s", bound=1.0), P50, P99, COST),
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


def missing_programs(workload: Workload) -> list[str]:
    """Programs that it wants and that are not installed; or a module of Python's."""
    return [program for program in workload.programs if not _is_installed(program)]


def _is_installed(program: str) -> bool:
    if module := _MODULES.get(program):
        return importlib.util.find_spec(module) is not None
    return shutil.which(program) is not None


def describe_nginx() -> str:
    """Its version; empty without one."""
    if shutil.which("nginx") is None:
        return ""
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().rpartition("/")[2]
