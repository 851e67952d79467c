# SPDX-License-Identifier: Apache-2.0
"""Programs with loads of their own, over the bridge: Redis and PostgreSQL, with what each brings for that,
and gRPC."""

from __future__ import annotations

import csv
import json
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from splicer.bench import nginx
from splicer.bench.model import Expected, Load, Metric, Sample
from splicer.bench.services import find_postgresql
from splicer.bench.testbed import LOADS, SERVER_ADDRESS, Testbed, TestbedError, run_load, run_program
from splicer.bench.workloads import WRK_WORKLOADS, Wrk
from splicer.host.process import read_machine_cpu_seconds

PORT = 9100
# What redis-benchmark does in a second at least, on a small machine.
REDIS_RATE = 50_000


@dataclass(frozen=True)
class App:
    """A server that `prepare` gives the command of, and a load that `drive` measures for some seconds."""

    name: str
    title: str
    programs: tuple[str, ...]
    prepare: Callable[[Testbed], list[str]]
    drive: Callable[[Testbed, Load], Sample]
    metrics: tuple[Metric, ...] = (
        Metric("rate", "requests/s"),
        Metric("p50_us", "latency us", higher_is_better=False),
        Metric("cpu_us", "CPU us/request", higher_is_better=False),
    )
    expected: Expected = "either"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    unit: str = "request"

    def measure(self, bed: Testbed, load: Load) -> Sample:
        log = bed.directory / f"{self.name}.log"
        with log.open("wb") as said:
            server = bed.start(self.prepare(bed), bed.server, stdout=said, stderr=subprocess.STDOUT)
        try:
            nginx.await_listener(bed.server, PORT, self.name, server, log, address=SERVER_ADDRESS)
            busy = read_machine_cpu_seconds()
            sample = self.drive(bed, load)
            busy = read_machine_cpu_seconds() - busy
        finally:
            bed.stop(server)
        metrics = {**sample.metrics, "cpu_us": busy / max(sample.requests, 1) * 1e6}
        return Sample(metrics, sample.errors, sample.requests)


def _prepare_redis(_bed: Testbed) -> list[str]:
    options = ["--bind", SERVER_ADDRESS, "--port", str(PORT), "--protected-mode", "no"]
    return ["redis-server", *options, "--save", "", "--appendonly", "no"]


def _drive_redis(bed: Testbed, load: Load) -> Sample:
    requests = int(load.seconds * REDIS_RATE)
    command = ["redis-benchmark", "-h", SERVER_ADDRESS, "-p", str(PORT), "-c", str(load.connections)]
    said = run_program(bed, [*command, "-n", str(requests), "-t", "get", "--csv"], bed.client)
    return read_redis(said, requests)


def read_redis(text: str, requests: int) -> Sample:
    """What `redis-benchmark --csv` prints: a heading and a line. Raises TestbedError."""
    rows = [row for row in csv.reader(text.splitlines()) if len(row) > 1]
    if len(rows) < 2:
        raise TestbedError("redis-benchmark printed no table", hint="it takes Redis 7 or later")
    found = dict(zip(rows[0], rows[-1], strict=False))
    metrics = {"rate": float(found["rps"]), "p50_us": 1000 * float(found["p50_latency_ms"])}
    return Sample(metrics, requests=requests)


def _as_nobody(bed: Testbed, *command: str | Path) -> list[str]:
    user = pwd.getpwnam("nobody")
    ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids, "env", f"--chdir={bed.directory}", *map(str, command)]


def _prepare_postgresql(bed: Testbed) -> list[str]:
    """The database is made once, and not for each leg."""
    data, programs = bed.directory / "pgbench", find_postgresql()
    if not data.exists():
        bed.directory.chmod(0o711)
        data.mkdir(mode=0o700)
        shutil.chown(data, "nobody", pwd.getpwnam("nobody").pw_gid)
        options = ("-U", "bench", "-A", "trust", "--no-sync", "--no-locale")
        bed.run(_as_nobody(bed, programs / "initdb", "-D", data, *options), bed.server)
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 trust\n")
    serve = ("-D", data, "-h", SERVER_ADDRESS, "-p", str(PORT), "-k", "", "-c", "fsync=off")
    return _as_nobody(bed, programs / "postgres", *serve)


def _drive_postgresql(bed: Testbed, load: Load) -> Sample:
    program = find_postgresql() / "pgbench"
    common = [str(program), "-h", SERVER_ADDRESS, "-p", str(PORT), "-U", "bench"]
    made = bed.directory / "pgbench.made"
    if not made.exists():
        bed.run([*common, "-i", "-q", "-s", "1", "postgres"], bed.client)
        made.touch()
    seconds = str(max(1, round(load.seconds)))
    said = run_program(
        bed, [*common, "-n", "-S", "-c", str(load.connections), "-T", seconds, "postgres"], bed.client
    )
    return read_pgbench(said)


def read_pgbench(text: str) -> Sample:
    """What pgbench prints at its end. Raises TestbedError."""
    found = [
        re.search(pattern, text, re.M)
        for pattern in (
            r"^tps = ([\d.]+)",
            r"^latency average = ([\d.]+) ms",
            r"^number of transactions actually processed: (\d+)",
        )
    ]
    if not all(found):
        raise TestbedError("pgbench printed no result")
    rate, latency, requests = (float(match[1]) for match in found if match)
    return Sample({"rate": rate, "p50_us": 1000 * latency}, requests=int(requests))


def _prepare_grpc(_bed: Testbed) -> list[str]:
    return [sys.executable, str(LOADS / "rpc.py"), "serve", SERVER_ADDRESS, str(PORT)]


def _drive_grpc(bed: Testbed, load: Load) -> Sample:
    where = (SERVER_ADDRESS, str(PORT), str(load.connections), str(load.seconds))
    metrics = json.loads(run_load(bed, [sys.executable, str(LOADS / "rpc.py"), "call", *where], bed.client))
    return Sample(metrics, requests=metrics.pop("calls"))


APP_WORKLOADS: tuple[App | Wrk, ...] = (
    App(
        "redis",
        "redis-benchmark: GET over the bridge, keep-alive",
        ("ip", "redis-server", "redis-benchmark"),
        _prepare_redis,
        _drive_redis,
    ),
    App(
        "pgbench",
        "pgbench: one row by its key, over the bridge; latency is the mean",
        ("ip", "setpriv", "pgbench"),
        _prepare_postgresql,
        _drive_postgresql,
        unit="transaction",
    ),
    App(
        "grpc",
        "gRPC on its C core, 100 bytes there and back over the bridge; both ends are Python",
        ("ip", "grpcio"),
        _prepare_grpc,
        _drive_grpc,
        unit="call",
    ),
    *(each for each in WRK_WORKLOADS if each.proxied),
)
