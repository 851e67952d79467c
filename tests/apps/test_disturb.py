# SPDX-License-Identifier: Apache-2.0
"""`tests/apps/run --disturb`: that it shows a difference where there is one, and none where there is none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.tiers import thorough

from apps.disturb import ANSWERED, DISTURBANCES

RUN = Path(__file__).with_name("run")
RUN_TIMEOUT = 300  # seconds
BROKEN_OFF = "BlockingIOError"


@pytest.fixture(scope="module")
def told(_prerequisites: None) -> dict[str, dict[str, Any]]:
    """What it says of a program that sleeps in a read, and of one that waits in select."""
    command = [RUN, "--disturb", "--json", "--only=python-recv", "--only=socat"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT)
    assert done.returncode == 0, done.stderr
    return {each["name"]: each for each in json.loads(done.stdout)["programs"]}


@thorough("it takes half a minute, and is about the table, not about splicer")
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_sleeper_sees_what_plain_tcp_hides(told: dict[str, dict[str, Any]], disturbance: str) -> None:
    """What KNOWN_ISSUES.md says that an operator accepts with `blocking = "allow"`: EAGAIN in a read that
    blocks, at all that wakes it without bytes."""
    sleeper = told["python-recv"]
    plain, spliced = sleeper["plain"][disturbance], sleeper["spliced"][disturbance]
    assert (plain["asleep"], spliced["asleep"]) == ("recvfrom", "recvfrom")
    assert plain["result"] == ANSWERED or disturbance == "reset"
    assert spliced["result"].startswith(BROKEN_OFF)


@thorough("as above")
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_who_waits_elsewhere_sees_nothing(told: dict[str, dict[str, Any]], disturbance: str) -> None:
    assert told["socat"]["plain"][disturbance] == told["socat"]["spliced"][disturbance]
