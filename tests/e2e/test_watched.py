# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus looks on while containers come and go: for a minute, or as many as the variable
SPLICER_TEST_WATCHED says."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import wait_until
from support.docker import Engine
from support.images import DEMO
from support.scraping import Prometheus, fetch, find_difference, find_port, prometheus
from support.stack import Network, Stack
from support.tiers import thorough

MINUTES = float(os.environ.get("SPLICER_TEST_WATCHED", "1"))
PATIENCE = 30.0  # seconds
SERVERS = ("web", "api", "shop")
# docs/metrics.md: so many names are given away, and other, unknown, host and transient.
NAMES = 64 + 4
RESIDENT = 64 << 20  # bytes
_SERIES = 'count({__name__=~"splicer_.*"})'
_PARTIES = "count(count by (client) (splicer_plain_bytes_total or splicer_redirected_bytes_total))"


@pytest.fixture
def stack(engine: Engine) -> Iterator[Stack]:
    made = Stack(engine, SPLICER_METRICS="/run/splicer/metrics.sock")
    try:
        made.up("splicer")
        yield made
    finally:
        made.down()


@pytest.fixture
def port(stack: Stack) -> Iterator[int]:
    """Where Prometheus finds the metrics: it knows no Unix sockets, and the sidecar has no network."""
    found = find_port()
    listens = f"TCP-LISTEN:{found},bind=127.0.0.1,reuseaddr,fork"
    relay = subprocess.Popen(["socat", listens, f"UNIX-CONNECT:{stack.run_dir}/metrics.sock"])
    try:
        wait_until("the relay answers", lambda: _is_served(found), PATIENCE)
        yield found
    finally:
        relay.terminate()
        relay.wait()


def _is_served(port: int) -> bool:
    with contextlib.suppress(OSError):
        return fetch(port)[0] == 200
    return False


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    made = Network(engine, SERVERS[0])
    try:
        for name in SERVERS[1:]:
            made.serve(name)
        yield made
    finally:
        made.remove()


def _ask_status(stack: Stack) -> dict[str, Any]:
    return dict(stack.ask("status", coverage=True))


def _live(network: Network, number: int) -> None:
    """One client's life, with few connections or many to one of the servers."""
    name, url = f"client-{number}", f"http://{SERVERS[number % len(SERVERS)]}:8080/"
    load = ("wrk", "-t1", f"-c{1 + number % 16}", "-d1", "--timeout", "10s", url)
    network.engine.docker("run", "--name", name, "--network", network.name, DEMO, *load)
    network.engine.remove_containers(name)


@pytest.mark.timeout(300 + 90 * MINUTES)
@thorough("it takes a minute; kernel/test_metrics.py has an end of series without an engine")
def test_containers_come_and_go(stack: Stack, network: Network, port: int, tmp_path: Path) -> None:
    """Series have an end, sums agree with `splicer status`, and the daemon stays small."""
    ends = time.monotonic() + 60 * MINUTES
    network.start_client("staying", *SERVERS)
    with prometheus(tmp_path / "prometheus", port, "groups: []") as server:
        series: list[int] = []
        for number in itertools.count():
            _live(network, number)
            series.append(_read_whole(server, _SERIES))
            if time.monotonic() > ends:
                break
        assert _read_whole(server, _PARTIES) <= NAMES
        network.finish_load("staying")
        wait_until(
            "Prometheus and status agree", lambda: not find_difference(server, _ask_status(stack)), PATIENCE
        )
        assert server.read("splicer_adoptions_total") > len(series), "they were spliced"
        assert server.read("process_resident_memory_bytes") < RESIDENT
        middle = series[len(series) // 2]
        if len(series) // 2 > NAMES:
            assert series[-1] == middle, "whoever comes when all names are given away is one of the others"
        print(
            f"{len(series)} containers; series: {series[0]}, {middle} then {series[-1]} at the end; "
            f"{server.read('process_resident_memory_bytes') / (1 << 20):.0f} MiB"
        )


def _read_whole(server: Prometheus, query: str) -> int:
    found = [0.0]

    def is_there() -> bool:
        found[0] = server.read(query)
        return found[0] > 0  # nothing yet is no number

    wait_until("it is scraped", is_there, PATIENCE)
    return int(found[0])
