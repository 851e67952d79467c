# SPDX-License-Identifier: Apache-2.0
"""What is measured: wrk on nginx, and the matrix of ping-pong and stream on one connection.

A workload starts its own servers for every leg: a connection that an earlier leg left open would be
plain for ever (splicer pairs connections when they are made), or would still be spliced.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
from testbed import SERVER_ADDRESS, Namespace, Testbed, TestbedError

HERE = Path(__file__).resolve().parent
ORIGIN_PORT = 8080
PROXY_PORT = 8081
LOAD_PORT = 9000
LOOPBACK = "127.0.0.1"
SMALL_BODY = "0123456789abcdef" * 4
MATRIX_SIZES = (64, 1024, 16384, 262144)

NGINX_CONF = """\
daemon off;
user root;
worker_processes {workers};
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    proxy_max_temp_file_size 0;
    server {{
        listen {origin} backlog=4096;
        root files;
        location = /small {{ default_type text/plain; return 200 "{small}"; }}
    }}
    upstream origin {{
        server 127.0.0.1:{origin};
        keepalive 64;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {proxy} backlog=4096;
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Metric:
    """One number of a workload; `bound` is what --check asks of the median of its ratios."""

    key: str
    label: str
    higher_is_better: bool = True
    bound: float | None = None

    def holds(self, ratio: float) -> bool:
        if self.bound is None:
            return True
        return ratio >= self.bound if self.higher_is_better else ratio <= self.bound


@dataclass(frozen=True)
class Sample:
    """One leg: metrics by key, what went wrong by kind (wrk's own kinds), and wrk's number of requests."""

    metrics: dict[str, float]
    errors: dict[str, int] = field(default_factory=dict)
    requests: int = 0


@dataclass(frozen=True)
class Load:
    """How hard: seconds per leg, and the numbers of processes and threads."""

    seconds: float
    connections: int
    threads: int
    workers: int


class Workload(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def metrics(self) -> tuple[Metric, ...]: ...
    @property
    def expects_splices(self) -> bool: ...
    def measure(self, bed: Testbed, load: Load) -> Sample: ...


@dataclass(frozen=True)
class Wrk:
    """wrk on nginx. `proxied`: through a second nginx server over loopback, wrk beside it."""

    name: str
    title: str
    path: str
    metrics: tuple[Metric, ...]
    proxied: bool = False
    closing: bool = False
    expects_splices: bool = True

    def measure(self, bed: Testbed, load: Load) -> Sample:
        where, address, port = bed.client, SERVER_ADDRESS, ORIGIN_PORT
        if self.proxied:
            where, address, port = bed.server, LOOPBACK, PROXY_PORT
        nginx = _start_nginx(bed, load.workers)
        try:
            busy = _busy_seconds()
            command = ["wrk", f"-t{load.threads}", f"-c{load.connections}", f"-d{math.ceil(load.seconds)}s"]
            command += ["--latency", "-s", str(HERE / "report.lua")]
            if self.closing:
                command += ["-H", "Connection: close"]
            report = json.loads(_output(bed, [*command, f"http://{address}:{port}{self.path}"], where))
            busy = _busy_seconds() - busy
        finally:
            bed.stop(nginx)
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
class Cell:
    """One cell of the matrix: one connection, ping-pong or stream, driven by load.py.

    The two processes of a ping-pong share a CPU and those of a stream do not. Left to the scheduler
    they do now one and now the other, and that decides the result more than anything under test.
    """

    path: str
    pattern: str
    size: int
    nagle: bool
    expects_splices: bool = False  # a stream that TCP serves better is rightly taken out

    @property
    def name(self) -> str:
        return f"{self.path}-{self.pattern}-{self.size}-{'nagle' if self.nagle else 'nodelay'}"

    @property
    def title(self) -> str:
        pattern = "ping-pong" if self.pattern == "rr" else "stream"
        return f"{pattern} of {self.size} bytes over {self.path}, Nagle {'on' if self.nagle else 'off'}"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.pattern == "stream":
            return (Metric("rate", "Gbit/s", bound=0.95),)
        return (Metric("rate", "exchanges/s", bound=0.95), Metric("p50_us", "p50 us", False))

    def measure(self, bed: Testbed, load: Load) -> Sample:
        where, address = bed.client, SERVER_ADDRESS
        if self.path == "loopback":
            where, address = bed.server, LOOPBACK
        program = [sys.executable, "-I", str(HERE / "load.py")]
        serve = [*program, "serve", address, str(LOAD_PORT)]
        server = bed.start(serve, bed.server, subprocess.PIPE, cpu=1)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            nodelay = "0" if self.nagle else "1"
            drive = ["drive", address, str(LOAD_PORT), self.pattern, str(self.size), nodelay]
            cpu = 1 if self.pattern == "rr" else 0
            return Sample(json.loads(_output(bed, [*program, *drive, str(load.seconds)], where, cpu)))
        finally:
            bed.stop(server)


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
        (Metric("rate", "requests/s", bound=0.97), Metric("p50_us", "p50 us", False), COST),
        closing=True,
        expects_splices=False,
    ),
    Wrk(
        "proxy-20k",
        "nginx proxying to nginx on loopback, 20 kB bodies",
        "/20k",
        (Metric("rate", "requests/s", bound=1.0), Metric("p50_us", "p50 us", False), COST),
        proxied=True,
    ),
    Wrk(
        "proxy-1m",
        "nginx proxying to nginx on loopback, 1 MB bodies",
        "/1m",
        (Metric("rate", "requests/s", bound=1.0), Metric("p50_us", "p50 us", False), COST),
        proxied=True,
    ),
)


def matrix() -> Iterator[Cell]:
    axes = (("loopback", "bridge"), ("rr", "stream"), MATRIX_SIZES, (True, False))
    for path, pattern, size, nagle in itertools.product(*axes):
        yield Cell(path, pattern, size, nagle)


def missing_programs() -> list[str]:
    return [program for program in ("ip", "nginx", "wrk") if shutil.which(program) is None]


def _busy_seconds() -> float:
    """CPU time of the whole machine: most of a packet's is spent in interrupts, which no process is
    charged for. What a hypervisor gave to others is not in it."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _start_nginx(bed: Testbed, workers: int) -> subprocess.Popen[bytes]:
    prefix = bed.directory / "nginx"
    files = prefix / "files"
    if not files.exists():
        files.mkdir(parents=True)
        (files / "20k").write_bytes(b"x" * 20_000)
        (files / "1m").write_bytes(b"x" * 1_000_000)
    settings: dict[str, Any] = {"origin": ORIGIN_PORT, "proxy": PROXY_PORT, "small": SMALL_BODY}
    (prefix / "nginx.conf").write_text(NGINX_CONF.format(workers=workers, **settings))
    with (prefix / "log").open("wb") as log:
        nginx = bed.start(
            ["nginx", "-p", f"{prefix}/", "-c", "nginx.conf", "-e", "stderr"], bed.server, stderr=log
        )
    deadline = time.monotonic() + 5
    while not _listens(bed.server, PROXY_PORT):
        if nginx.poll() is not None or time.monotonic() > deadline:
            raise TestbedError(f"nginx does not start: {(prefix / 'log').read_text().strip()}")
        time.sleep(0.01)
    return nginx


def _listens(namespace: Namespace, port: int) -> bool:
    with namespace.entered(), socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def _output(bed: Testbed, command: list[str], namespace: Namespace, cpu: int | None = None) -> bytes:
    """The last line a load program prints. Raises TestbedError when it fails or prints none."""
    child = bed.start(command, namespace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cpu=cpu)
    try:
        out, err = child.communicate()
    finally:
        status = bed.stop(child)
    lines = out.splitlines()
    if status != 0 or not lines:
        said = (err.decode() or out.decode()).strip().splitlines()
        raise TestbedError(f"{Path(command[0]).name} failed ({status}): {said[-1] if said else 'no output'}")
    return lines[-1]
