# SPDX-License-Identifier: Apache-2.0
"""The runner, on some small and quick programs. `make test-apps` runs all of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.requirements import VARIABLE
from support.tiers import spread

from apps.catalogue import CHEAP

RUN = Path(__file__).with_name("run")
RUN_TIMEOUT = 400  # seconds; on a machine that does nothing else it takes a minute
END_TIMEOUT = 30
# Each reads in a way of its own; nginx asks FIONREAD, haproxy-splice calls splice(2), gRPC asks for TCP_INQ.
FEW = ("curl", "nginx-http1", "haproxy-splice", "redis-benchmark", "grpc-python")
REASON = "each is a minute of its own; test-apps has them too"
SPLICED = (
    *("wrk", "curl", "nginx-http1", "haproxy-default", "redis-benchmark", "python-asyncio"),
    *("grpc-python", "grpc-python-retires", "grpc-python-dies"),
)


def _call(*arguments: str) -> tuple[int, str, str]:
    process = subprocess.Popen([RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = process.communicate(timeout=RUN_TIMEOUT)
    except BaseException:
        process.terminate()  # it has much to take away
        process.communicate(timeout=END_TIMEOUT)
        raise
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> set[str]:
    """The programs that the tests of this run are about."""
    asked = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    return {spec.params["name"] for spec in asked if spec} or set(FEW)


@pytest.fixture(scope="module")
def report(_prerequisites: None, names: set[str]) -> dict[str, Any]:
    """What the runner says about them."""
    code, stdout, stderr = _call("--seconds=1", "--json", *(f"--only={name}" for name in sorted(names)))
    told: dict[str, Any] = json.loads(stdout or "{}")
    assert told, stderr
    return {**told, "code": code, "log": stderr, "by_name": {each["name"]: each for each in told["programs"]}}


def _find_trial(report: dict[str, Any], name: str) -> dict[str, Any]:
    trial: dict[str, Any] = report["by_name"][name]
    if trial["verdict"] == "not installed" and os.environ.get(VARIABLE) != "1":
        pytest.skip(f"{', '.join(trial['notes'])} (scripts/setup.sh e2e installs it)")
    return trial


@pytest.mark.parametrize("name", spread(CHEAP, FEW, REASON))
def test_program_does_the_same(report: dict[str, Any], name: str) -> None:
    trial = _find_trial(report, name)
    errors = [trial[run]["error"] for run in ("plain", "spliced") if trial[run]]
    assert trial["verdict"] == "same", f"{trial['verdict']}: {'; '.join([*trial['notes'], *errors])}"


@pytest.mark.parametrize("name", spread(SPLICED, set(FEW) & set(SPLICED), REASON))
def test_program_was_spliced(report: dict[str, Any], name: str) -> None:
    """Much, not just something, which the runner asks for."""
    trial = _find_trial(report, name)
    assert trial["spliced"] is not None, trial["notes"]
    assert trial["spliced"]["splicing"]["redirected_messages"] > 100


def test_exit_code_agrees(report: dict[str, Any]) -> None:
    assert report["code"] == 0, report["log"]
    assert report["agree"] is True


def test_only_what_was_asked_for_runs(report: dict[str, Any], names: set[str]) -> None:
    """`haproxy-splice` is a case, and none of those whose names begin with it."""
    assert set(report["by_name"]) == names


def test_unknown_program(_prerequisites: None) -> None:
    code, stdout, stderr = _call("--only=no-such-program")
    assert (code, stdout) == (2, "")
    assert "no-such-program" in stderr
