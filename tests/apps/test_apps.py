# SPDX-License-Identifier: Apache-2.0
"""The runner, on those programs that the other tests need anyway. `make test-apps` runs all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("run")
# Always there; the others of CHEAP are tried where they are installed.
NEEDED = ("wrk", "python-asyncio")
CHEAP = (*NEEDED, "nginx-http1", "cpython-test_httplib", "cpython-test_socketserver")


def _call(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([RUN, *arguments], capture_output=True, text=True, check=False, timeout=280)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def report(_prerequisites: None) -> dict[str, Any]:
    """What the runner says about the cheap programs."""
    code, stdout, stderr = _call("--seconds=1", "--json", *(f"--only={name}" for name in CHEAP))
    told: dict[str, Any] = json.loads(stdout or "{}")
    assert told, stderr
    return {**told, "code": code, "log": stderr, "by_name": {each["name"]: each for each in told["programs"]}}


@pytest.mark.parametrize("name", CHEAP)
def test_program_does_the_same(report: dict[str, Any], name: str) -> None:
    trial = report["by_name"][name]
    if name not in NEEDED and trial["verdict"] == "not installed":
        pytest.skip(f"{name}: {', '.join(trial['notes'])} (make test-apps installs it)")
    errors = [trial[run]["error"] for run in ("plain", "spliced") if trial[run]]
    assert trial["verdict"] == "same", f"{trial['verdict']}: {'; '.join([*trial['notes'], *errors])}"


def test_needed_programs_were_spliced(report: dict[str, Any]) -> None:
    for name in NEEDED:
        assert report["by_name"][name]["spliced"]["splicing"]["redirected_messages"] > 100, name


def test_exit_code_agrees(report: dict[str, Any]) -> None:
    assert report["code"] == 0, report["log"]
    assert report["agree"] is True


def test_unknown_program(_prerequisites: None) -> None:
    code, stdout, stderr = _call("--only=no-such-program")
    assert (code, stdout) == (2, "")
    assert "no-such-program" in stderr
