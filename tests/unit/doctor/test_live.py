# SPDX-License-Identifier: Apache-2.0
"""`splicer doctor --live` where something goes wrong: with a daemon and a talker that are made up."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from splicer.daemon import control
from splicer.daemon.instance import Holder
from splicer.doctor import check, live
from splicer.doctor.check import Result, State, Verdict
from splicer.doctor.talk import ROUNDS, Talk
from splicer.errors import FAILURE, OK
from splicer.host import cgroups
from splicer.host.cgroups import Cgroup

from .conftest import World

CAN = Verdict(True, "This host can run splicer", OK)
FLOW: dict[str, Any] = {
    "netns": 9,
    "local": "127.0.0.1:4711",
    "state": "paired",
    "reason": "policy",
    "redirected_bytes": 0,
}
WHERE = {"netns": 9, "port": 4711}


@pytest.fixture
def stage(world: World, tmp_path: Path) -> World:
    """A directory stands in for the cgroup, and nothing but it may have anything in it afterwards."""
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "tmp").mkdir()
    world.patch(tempfile, "tempdir", str(tmp_path / "tmp"))
    world.patch(cgroups, "find", lambda requested: Cgroup(str(tmp_path / "cgroup"), requested, 1))
    return world


def run_as(world: World, script: str) -> None:
    """What is run in the place of Python."""
    file = world.place / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    world.patch(sys, "executable", str(file))


def look(world: World) -> Result:
    """The last result; nothing is left."""
    results = live.examine(world.surroundings, CAN)
    assert os.listdir(world.place / "cgroup") == os.listdir(world.place / "tmp") == []
    assert live.judge(CAN, results).exit_code == FAILURE
    return results[-1]


def test_a_daemon_that_does_not_start(stage: World) -> None:
    run_as(stage, "echo 'splicer: the kernel refused it' >&2; echo 'hint: another' >&2; exit 4")
    found = look(stage)
    assert found.name == "live_start"
    assert found.outcome == check.fail("splicer run ended with 4: the kernel refused it")


def test_a_daemon_that_is_never_ready(stage: World) -> None:
    run_as(stage, "exec sleep 60")
    stage.patch(live, "_START_TIMEOUT_S", 0.1)
    found = look(stage)
    assert (found.name, found.outcome.text) == ("live_start", "splicer run was not ready within 0.1 s")


READY = 'for each; do case "$each" in --ready-file=*) ready="${each#*=}";; esac; done\n'


def test_who_was_to_talk_has_ended(stage: World) -> None:
    run_as(stage, READY + '[ "$ready" ] || { echo no network >&2; exit 1; }\n: > "$ready"\nexec sleep 60')
    found = look(stage)
    assert (found.name, found.outcome.state) == ("live_bytes", State.FAIL)
    assert found.outcome.text == "what was to talk has ended (no network)"


def test_a_daemon_that_does_not_end_well(stage: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as(
        stage,
        READY
        + '[ "$ready" ] || exec sleep 60\n'
        + "trap 'echo splicer: torn >&2; exit 3' TERM\n"
        + ': > "$ready"\nwhile :; do sleep 0.02; done',
    )
    monkeypatch.setattr(live, "_talk", lambda *_: iter(()))
    found = look(stage)
    assert (found.name, found.outcome.text) == ("live_stop", "the daemon ended with 3: torn")


def test_a_cgroup_that_cannot_be_made(stage: World) -> None:
    stage.surroundings.daemon = Holder(1, str(stage.place / "gone"), "/run/x", "run")
    found = look(stage)
    assert found.name == "live" and "No such file or directory" in found.outcome.text


def test_what_an_earlier_one_left_that_was_killed(stage: World) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    (stage.place / f"cgroup/splicer-doctor-{gone.pid}").mkdir()
    run_as(stage, "exit 1")
    assert look(stage).name == "live_start"


@pytest.mark.parametrize(
    ("flows", "said"),
    [
        ([FLOW], "the connection stays plain (paired, policy)"),
        ([FLOW | {"reason": "blocking_reader"}], "the connection stays plain (paired, blocking_reader)"),
        ([FLOW | {"netns": 8}, FLOW | {"local": "[::1]:711"}], "the daemon does not know of the connection"),
    ],
)
def test_a_connection_that_stays_plain(
    monkeypatch: pytest.MonkeyPatch, flows: list[dict[str, Any]], said: str
) -> None:
    monkeypatch.setattr(control, "request", lambda *_: {"flows": flows})
    monkeypatch.setattr(live, "_SPLICE_TIMEOUT_S", 0.05)
    with pytest.raises(live._Trouble) as caught:
        live._wait_spliced(live._Stage("/v2/x", "/run/x"), WHERE)
    assert (caught.value.result.name, caught.value.result.outcome.text) == ("live_splice", said)


def test_a_connection_that_is_spliced(monkeypatch: pytest.MonkeyPatch) -> None:
    flows = iter([[], [FLOW | {"reason": ""}], [FLOW | {"state": "spliced"}]])
    monkeypatch.setattr(control, "request", lambda *_: {"flows": next(flows)})
    live._wait_spliced(live._Stage("/v2/x", "/run/x"), WHERE)


def test_what_is_said_arrives() -> None:
    with contextlib.ExitStack() as stack:
        measured = Talk(stack, plain=True).measure()
    assert (measured["there"], measured["back"]) == (100 * ROUNDS, 300 * ROUNDS)
    assert measured["through_tcp"] == 400 * ROUNDS  # as nobody splices it here
    assert measured["microseconds"] > 0


def test_other_bytes_than_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        talk = Talk(stack, plain=True)
        talk.client.send(b"stray")
        with pytest.raises(RuntimeError, match="other bytes arrived"):
            talk.play()
        monkeypatch.setattr("splicer.doctor.talk._PATIENCE_S", 0.01)
        talk = Talk(stack, plain=True)
        monkeypatch.setattr(talk, "client", stack.enter_context(contextlib.closing(_Deaf())))
        with pytest.raises(RuntimeError, match="0 of 100 bytes arrived"):
            talk.play()


class _Deaf:
    """A socket whose bytes go nowhere."""

    def send(self, message: bytes) -> int:
        return len(message)

    def close(self) -> None:
        pass
