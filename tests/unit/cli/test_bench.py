# SPDX-License-Identifier: Apache-2.0
"""The command line of `splicer bench`: what it takes, what it refuses before anything is measured, what it
prints, and its exit codes. That it measures is tests/kernel/test_bench.py and test_benchmark.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from splicer.bench import suites, testbed
from splicer.bench.model import Metric
from splicer.bench.results import Row
from splicer.bench.suite import Comparison, Findings, Workshop
from splicer.errors import SplicerError

from ..conftest import Invoke


@pytest.fixture(autouse=True)
def _signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "interrupt_on_signals", lambda: None)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Nothing is measured: what a suite would have been given, and what it hands back."""
    seen: dict[str, Any] = {"findings": Findings("workloads", [])}

    def run(suite: suites.Suite, workshop: Workshop) -> Findings:
        seen.update(suite=suite.name, options=workshop.options)
        workshop.write("a table\nof two lines")
        found = seen["findings"]
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Findings)
        return found

    monkeypatch.setattr(suites.Suite, "run", run)
    return seen


def _better() -> Comparison:
    return Comparison("web", "a service", [Row(Metric("rate", "requests/s"), [100] * 4, [200] * 3)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["matrix", "--url", "http://x/"], "not allowed with argument"),
        (["--url", "http://x/", "--cmd", "echo 1"], "not allowed with argument"),
        (["--matrix", "--streams"], "not allowed with argument"),
        (["--watch", "--refused"], "not allowed with argument"),
        (["--watch", "--only=x"], "--only is not for watch"),
        (["stack", "--baseline"], "--baseline is not for stack"),
        (["--programs", "--baseline"], "--programs is not for --baseline"),
        (["--url", "http://x/", "--only", "close"], "--only is for the suites"),
        (["--cmd", "echo 1", "--splicer", "x"], "--splicer is for the suites"),
        (["--container", "web"], "--container is for --url and --cmd"),
        (["--less-is-better"], "--less-is-better is for --cmd"),
        (["adopt", "--png", "x.png"], "--png is not for adopt, which compares nothing"),
        (["--census", "--html", "x"], "--html is not for census, which compares nothing"),
        (["-n", "0"], "--alternations: must be more than 0"),
        (["-t", "x"], "invalid _positive value"),
    ],
)
def test_mistakes(invoke: Invoke, measured: dict[str, Any], arguments: list[str], message: str) -> None:
    outcome = invoke("bench", *arguments)
    assert outcome.code == 2
    assert message in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "hint: splicer bench --help"
    assert "suite" not in measured and outcome.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "suite"),
    [
        ([], "wrk"),
        (["matrix"], "matrix"),
        (["--refused"], "plain"),
        (["--adoption"], "adopt"),
        (["--connecting"], "connecting"),
        (["--relays"], "relays"),
        (["--only", "close"], "wrk"),
    ],
)
def test_suites_and_the_flags_that_they_were(
    invoke: Invoke, measured: dict[str, Any], arguments: list[str], suite: str
) -> None:
    assert invoke("bench", *arguments).code == 0
    assert measured["suite"] == suite


def test_options_reach_the_suite(invoke: Invoke, measured: dict[str, Any]) -> None:
    given = ["-n7", "-t", "1.5", "--connections=3", "--only=a", "--only=b", "--mode=eager", "--check"]
    assert invoke("bench", *given).code == 0
    options = measured["options"]
    assert (options.pairs, options.seconds, options.connections) == (7, 1.5, 3)
    assert (options.only, options.mode, options.check) == (("a", "b"), "eager", True)
    assert invoke("bench", "--alternations=4").code == 0
    assert measured["options"].pairs == 4


def test_the_table_and_then_the_verdict(invoke: Invoke, measured: dict[str, Any]) -> None:
    measured["findings"] = Findings("workloads", [], [_better()], notes=["and " + "a long note " * 10])
    outcome = invoke("bench")
    lines = outcome.stdout.splitlines()
    assert lines[:4] == ["a table", "of two lines", "", "2.0 times the requests, noise 1 %"]
    assert all(len(line) <= 80 for line in lines)
    assert (outcome.code, outcome.stderr) == (0, "")


def test_json_is_all_that_is_printed(invoke: Invoke, measured: dict[str, Any]) -> None:
    measured["findings"] = Findings("workloads", [{"name": "web"}], [_better()])
    document = invoke("bench", "plain", "--json", "-n3").json()
    assert (document["schema"], document["suite"], document["command"]) == (
        1,
        "plain",
        "splicer bench plain --pairs 3",
    )
    assert document["workloads"] == [{"name": "web"}]
    assert document["verdicts"][0]["words"] == "2.0 times the requests, noise 1 %"


def test_what_failed_is_said_and_is_the_exit_code(invoke: Invoke, measured: dict[str, Any]) -> None:
    measured["findings"] = Findings("workloads", [], failures=["web: errors in the plain legs"])
    outcome = invoke("bench", "--json")
    assert (outcome.code, outcome.stderr) == (1, "splicer: web: errors in the plain legs\n")
    assert outcome.json()["ok"] is False
    measured["findings"] = SplicerError("no wrk", hint="apt-get install wrk")
    outcome = invoke("bench")
    assert (outcome.code, outcome.stderr) == (1, "splicer: no wrk\nhint: apt-get install wrk\n")


def test_an_interrupt_is_said(invoke: Invoke, measured: dict[str, Any]) -> None:
    measured["findings"] = testbed.Interrupted("SIGTERM")
    outcome = invoke("bench")
    assert (outcome.code, outcome.stderr) == (130, "splicer: interrupted (SIGTERM): cleaned up\n")


def test_files_are_written(invoke: Invoke, measured: dict[str, Any], tmp_path: Path) -> None:
    measured["findings"] = Findings("workloads", [], [_better()])
    page, picture = tmp_path / "x.html", tmp_path / "x.png"
    assert invoke("bench", "--html", str(page), "--png", str(picture)).code == 0
    assert "<svg" in page.read_text() and picture.read_bytes().startswith(b"\x89PNG")


def test_where_files_cannot_be_written_nothing_is_measured(
    invoke: Invoke, measured: dict[str, Any], tmp_path: Path
) -> None:
    outcome = invoke("bench", "--png", str(tmp_path / "no/x.png"))
    assert outcome.code == 1
    assert "no such directory" in outcome.stderr and "hint: mkdir -p" in outcome.stderr
    assert "suite" not in measured


def test_the_list(invoke: Invoke) -> None:
    outcome = invoke("bench", "--list")
    assert outcome.code == 0
    assert outcome.stdout.startswith("wrk:\n  keep-alive ")
    only = invoke("bench", "--list", "--only", "off-*").stdout
    assert [line.split()[0] for line in only.splitlines()] == ["off-1m", "off-small", "off-close"]
    outcome = invoke("bench", "--list", "--only", "nothing")
    assert outcome.code == 1 and "hint: splicer bench --list" in outcome.stderr


def test_without_a_daemon(invoke: Invoke, run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    outcome = invoke("bench", "--cmd", "echo 1", "--run-dir", run_dir)
    assert outcome.code == 3
    assert "not running" in outcome.stderr and "hint: start it with: splicer run" in outcome.stderr


def test_a_suite_without_root(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    outcome = invoke("bench", "connecting")
    assert outcome.code == 1
    assert "need root" in outcome.stderr and outcome.stderr.endswith("splicer bench connecting\n")
