# SPDX-License-Identifier: Apache-2.0
"""Asks the daemon under test for its metrics, and runs a real Prometheus that does."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.daemon import wait_until

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
_LINE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Prometheus asks so often, and looks so often whether a rule holds.
INTERVAL = "250ms"


def find_port() -> int:
    """A port that nobody has on the loopback address."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def fetch(port: int, page: str = "/metrics", timeout: float = 20.0) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def read_series(port: int) -> Series:
    """All that is on the page, by name and labels."""
    status, text = fetch(port)
    assert status == 200, text
    found: Series = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = _LINE.fullmatch(line)
            assert match, line
            key = match[1], frozenset(_LABEL.findall(match[2] or ""))
            assert key not in found, f"twice: {line}"
            found[key] = float(match[3])
    return found


def add_up(series: Series, name: str) -> float:
    """Over all labels."""
    return sum(value for (each, _), value in series.items() if each == name)


def by_label(series: Series, name: str, label: str) -> dict[str, float]:
    """Those that are not 0."""
    return {dict(labels)[label]: value for (each, labels), value in series.items() if each == name and value}


@dataclass
class Prometheus:
    """A running one."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, query: str) -> list[dict[str, Any]]:
        """What an instant query returns. Raises AssertionError for one that is not valid."""
        address = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                document = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        assert document["status"] == "success", document
        return list(document["data"]["result"])

    def read(self, query: str) -> float:
        """The value of a query with one result; NaN if it has none."""
        found = self.ask(query)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else float("nan")

    def count_evaluations(self) -> int:
        """How often all rules were looked at, by the least of what Prometheus says of itself."""
        text = fetch(self.port)[1]
        found = re.findall(r"^prometheus_rule_group_iterations_total\{.*\} (\S+)$", text, re.M)
        return int(min(map(float, found), default=0))

    def list_firing(self) -> set[str]:
        return {each["metric"]["alertname"] for each in self.ask('ALERTS{alertstate="firing"}')}


def find_difference(server: Prometheus, status: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Where it is not what `splicer status` has just said, with coverage: both, by query."""
    totals, coverage = status["totals"], status["coverage"]
    both = {
        query: (server.read(query), said)
        for query, said in (
            ("sum(splicer_redirected_bytes_total)", totals["redirected_bytes"]),
            ("sum(splicer_redirected_messages_total)", totals["redirected_messages"]),
            ("sum(splicer_plain_bytes_total)", coverage["plain_bytes"]),
            ("splicer_adoptions_total", totals["spliced"]),
            ("sum(splicer_drains_total)", totals["drained"]),
            ("sum(splicer_refusals_total)", sum(totals["refused"].values())),
            ("sum(splicer_connections)", sum(status["connections"].values())),
        )
    }
    return {query: values for query, values in both.items() if values[0] != values[1]}


@contextmanager
def prometheus(directory: Path, target: int, rules: str) -> Iterator[Prometheus]:
    """Scrapes the port `target`, under the name that examples/grafana/prometheus.yml gives it."""
    directory.mkdir()
    port = find_port()
    (directory / "rules.yml").write_text(rules)
    (directory / "prometheus.yml").write_text(
        f"global: {{scrape_interval: {INTERVAL}, scrape_timeout: {INTERVAL},\n"
        f"  evaluation_interval: {INTERVAL}}}\n"
        "rule_files: [rules.yml]\n"
        "scrape_configs:\n"
        "  - job_name: splicer\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{target}']}}]\n"
    )
    log = directory / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
        )
    made = Prometheus(port, process, log)
    try:
        wait_until("Prometheus is ready", lambda: _is_ready(made), timeout=60.0)
        yield made
    finally:
        process.kill()
        process.wait()


def _is_ready(made: Prometheus) -> bool:
    assert made.process.poll() is None, made.log.read_text()
    try:
        return fetch(made.port, "/-/ready")[0] == 200
    except OSError:
        return False
