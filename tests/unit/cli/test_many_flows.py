# SPDX-License-Identifier: Apache-2.0
"""Thousands of connections: a summary by party and reason, a limit, and an order."""

from __future__ import annotations

from typing import Any

import pytest

from splicer.cli import flows, grouping

from ..conftest import Invoke
from .conftest import Answers
from .test_nouns import flow

WEB = {"container": "shop-web-1", "process": "nginx", "pid": 7, "cgroup": "/docker/1"}
APP = {"container": "shop-app-1", "process": "python3", "pid": 8, "cgroup": "/docker/2"}


def many(count: int) -> list[dict[str, Any]]:
    found = []
    for number in range(count):
        state, reason = (("spliced", ""), ("paired", "blocking_reader"), ("paired", "cold"))[
            min(number % 4, 2)
        ]
        row = flow(f"10.0.0.1:{20000 + number}", "10.0.0.2:80", state, reason, 10 * number)
        found.append({**row, "client": APP, "server": WEB, "age_seconds": float(count - number)})
    return found


@pytest.fixture
def answers(answers: Answers) -> Answers:
    answers.flows = {"schema": 1, "flows": many(3000)}
    return answers


@pytest.mark.usefixtures("answers")
class TestMany:
    def test_a_summary_comes_first_and_rows_are_limited(self, invoke: Invoke, run_dir: str) -> None:
        lines = invoke("flows", "--run-dir", run_dir).stdout.splitlines()
        assert lines[0].split() == ["CLIENT", "SERVER", "STATE", "REASON", "CONNECTIONS", "BYTES"]
        assert [line.split()[:5] for line in (lines[1], lines[3])] == [
            ["shop-app-1", "shop-web-1:80", "paired", "cold", "1500"],
            ["shop-app-1", "shop-web-1:80", "paired", "blocking_reader", "750"],
        ]
        assert lines[2].split()[:4] == ["shop-app-1", "shop-web-1:80", "spliced", "750"]
        assert lines[4] == ""
        assert len(lines) == 5 + 1 + flows.LIMIT + 1
        assert lines[-1].startswith("and 2900 more connections: splicer flows --limit 0")

    def test_all_of_them(self, invoke: Invoke, run_dir: str) -> None:
        lines = invoke("flows", "--limit", "0", "--run-dir", run_dir).stdout.splitlines()
        assert len(lines) == 3001
        assert "CONNECTIONS" not in lines[0]

    def test_nothing_but_the_summary(self, invoke: Invoke, run_dir: str) -> None:
        lines = invoke("flows", "--summary", "--run-dir", run_dir).stdout.splitlines()
        assert len(lines) == 4
        assert max(map(len, lines)) <= 80
        filtered = invoke(
            "flows", "--summary", "--state", "spliced", "--run-dir", run_dir
        ).stdout.splitlines()
        assert len(filtered) == 2

    def test_json_has_all_unless_asked(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        assert invoke("flows", "--json", "--run-dir", run_dir).json() == answers.flows
        asked = ("flows", "--json", "--limit", "2", "--sort", "bytes", "--run-dir", run_dir)
        assert [each["redirected_bytes"] for each in invoke(*asked).json()["flows"]] == [29990, 29980]

    @pytest.mark.parametrize(
        ("key", "first"),
        [
            ("state", "22996"),
            ("bytes", "22999"),
            ("messages", "22990"),
            ("age", "20000"),
            ("reason", "22996"),
            ("client", "22996"),
            ("server", "22996"),
        ],
    )
    def test_sorted(self, invoke: Invoke, run_dir: str, key: str, first: str) -> None:
        lines = invoke("flows", "--sort", key, "--limit", "1", "--run-dir", run_dir).stdout.splitlines()
        assert f":{first} " in lines[-2]

    def test_every_key_is_tried(self) -> None:
        assert set(grouping.SORT_KEYS) == {"state", "bytes", "messages", "age", "reason", "client", "server"}


def test_few_are_listed_as_ever(invoke: Invoke, run_dir: str, answers: Answers) -> None:
    answers.flows = {"schema": 1, "flows": many(flows.LIMIT)}
    lines = invoke("flows", "--run-dir", run_dir).stdout.splitlines()
    assert len(lines) == 1 + flows.LIMIT


def test_a_summary_of_many_kinds_is_cut_as_well() -> None:
    kinds = [flow(f"10.0.0.1:{port}", f"10.0.0.2:{port}", "paired", "cold") for port in range(1, 31)]
    lines = grouping.summarise(kinds)
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "and 10 more rows (10 connections)"
    assert lines[1].split()[:2] == ["10.0.0.1", "10.0.0.2:1"], "without a name it is the address"
