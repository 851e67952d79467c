# SPDX-License-Identifier: Apache-2.0
"""wrk(1): its command line and what it says, wherever it runs."""

from __future__ import annotations

import json
import math
from typing import Any

from splicer.bench.model import Metric, Sample
from splicer.bench.testbed import LOADS

ERRORS = ("connect", "read", "write", "status", "timeout")

RATE = Metric("rate", "requests/s")
P50 = Metric("p50_us", "p50 us", higher_is_better=False)
P99 = Metric("p99_us", "p99 us", higher_is_better=False)
SLOWEST = Metric("max_us", "slowest us", higher_is_better=False)
COST = Metric("cpu_us", "CPU us/request", higher_is_better=False)


def make_command(
    url: str, seconds: float, connections: int, threads: int = 1, *, closing: bool = False
) -> list[str]:
    """`seconds` are rounded up to whole ones; `closing`: a connection per request."""
    command = ["wrk", f"-t{min(threads, connections)}", f"-c{connections}", f"-d{math.ceil(seconds)}s"]
    command += ["--latency", "-s", str(LOADS / "report.lua")]
    return [*command, *(("-H", "Connection: close") if closing else ()), url]


def read_report(line: str | bytes, busy_seconds: float) -> Sample:
    """What report.lua printed; `busy_seconds` is the CPU time of the machine meanwhile. Raises ValueError."""
    report: dict[str, Any] = json.loads(line)
    metrics = {
        "rate": report["requests"] / report["duration"] * 1e6,
        "p50_us": float(report["p50"]),
        "p99_us": float(report["p99"]),
        "max_us": float(report["max"]),
        "cpu_us": busy_seconds / max(report["requests"], 1) * 1e6,
    }
    errors = {kind: report[kind] for kind in ERRORS if report[kind]}
    return Sample(metrics, errors, report["requests"])
