# SPDX-License-Identifier: Apache-2.0
"""The table of what many connections cost, and what is promised of it. Nothing is measured here."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import pytest

from splicer.bench import scale
from splicer.bench.progress import Progress
from splicer.bench.scale import MOST_BYTES, MOST_CPU, MOST_STATUS_S, Answering, Scale, Watched, render
from splicer.bench.suite import Options, Workshop

FOUND = Scale(
    connections=100_000,
    spliced=99_000,
    maps_empty=14_000_000,
    maps={"pairs": 46_000_000, "seeds": 2_000_000, "spliced": 18_000_000},
    daemon_empty=30_000_000,
    daemon=33_000_000,
    daemon_own=22_000_000,
    connected_s=2.0,
    talked_s=10.0,
    adopted_s=12.5,
    cpu_empty=0.0,
    cpu_silent=1.7,
    cpu_busy=2.7,
    status=Answering(0.25, 4_000_000, 18_000_000),
    flows=Answering(6.5, 10_000_000, 20_000_000),
    explain=Answering(0.15, 1_000_000, 18_000_000),
    verdict_ns=300.0,
    register_ns=130.0,
    connect_us=15.0,
    close_us=8.0,
    stopped_s=1.8,
    left=None,
)


def test_a_table_has_a_column_for_each_size() -> None:
    lines = render(
        [dataclasses.replace(FOUND, connections=1000, left=0, watched=Watched(0.7, 42_000_000, 6)), FOUND]
    )
    assert lines[0].split() == ["1,000", "100,000"]
    rows = {line[:28].strip(): line[28:].split() for line in lines[1:]}
    assert rows["maps and daemon"] == ["99.0", "MB", "99.0", "MB"]
    assert rows["left"] == ["0", "?"]
    assert rows["scraped, and with top: CPU"] == ["0.7", "%", "-"]
    assert len({len(line) for line in lines}) == 1
    assert all(len(line) <= 80 for line in lines)


def test_the_document_says_what_the_table_says() -> None:
    document = json.loads(json.dumps(FOUND.to_json()))
    assert document["maps_total"] == sum(document["maps"].values()) == 66_000_000
    assert document["status"] == {"seconds": 0.25, "daemon_more": 4_000_000, "command_most": 18_000_000}


def test_what_is_more_than_promised_is_said() -> None:
    assert FOUND.failures() == []
    worse = dataclasses.replace(
        FOUND,
        daemon=MOST_BYTES,
        cpu_busy=MOST_CPU + 1,
        status=dataclasses.replace(FOUND.status, seconds=2 * MOST_STATUS_S),
    )
    said = worse.failures()
    assert len(said) == 3
    assert all("100000 connections" in line for line in said)


def test_a_host_without_prometheus_client_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    workshop = Workshop(Options(), Progress(io.StringIO()), said.append)
    assert scale._can_be_scraped(workshop)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert not scale._can_be_scraped(workshop)
    assert said == ["not scraped: metrics need the python module prometheus_client, which is not installed"]
