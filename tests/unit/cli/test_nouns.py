# SPDX-License-Identifier: Apache-2.0
"""`status`, `flows` and `unload` against a control server in this process."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from splicer.cli import flows, status
from splicer.daemon.control import Server, socket_path
from splicer.daemon.instance import acquire
from splicer.doctor import prerequisites
from splicer.errors import SplicerError
from splicer.model import Connections, Flow, Neighbour, Neighbourhood, Status, Totals, Unread
from splicer.text import Palette

from ..conftest import Invoke, Log
from .conftest import Answers

STATUS = Status(
    pid=4242,
    version="0.1.0",
    mode="adaptive",
    cgroup="/sys/fs/cgroup/unified",
    connections=Connections(paired=3, spliced=12, draining=1),
    totals=Totals(
        paired=1200,
        spliced=1180,
        drained=1168,
        redirected_bytes=13 * 1024**3,
        redirected_messages=4_500_000,
        passed_messages=1,
        rescued=0,
        refused={"blocking_reader": 2, "splice_reader": 31, "rcvlowat": 0, "from_the_future": 1},
    ),
    uptime_seconds=3725.0,
).to_json()


def flow(
    local: str, remote: str, state: str, reason: str, size: int = 0, peer: str | None = None
) -> dict[str, Any]:
    return Flow(
        local=local,
        remote=remote,
        peer=peer or remote,
        netns=1,
        peer_netns=4026532000,
        state=state,
        reason=reason,
        redirected_bytes=size,
        redirected_messages=size // 100,
        passed_messages=16,
        age_seconds=12.3,
    ).to_json()


FLOWS = [
    flow("10.0.0.1:40000", "10.0.0.2:8080", "paired", "blocking_reader"),
    flow("10.0.0.1:40001", "10.0.0.2:8080", "spliced", "", 1000),
    flow("[2001:db8:1111:2222:3333:4444:5555:6666]:40002", "[::1]:443", "spliced", "", 5 * 1024**2),
    flow("10.0.0.1:40003", "192.0.2.1:80", "draining", "stream", 700, peer="172.17.0.2:8081"),
]


@pytest.fixture
def answers(answers: Answers) -> Answers:
    answers.status, answers.flows = dict(STATUS), {"schema": 1, "flows": FLOWS}
    return answers


class TestStatus:
    @pytest.mark.usefixtures("answers")
    def test_json_is_the_answer(self, invoke: Invoke, run_dir: str) -> None:
        outcome = invoke("status", "--json", "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert outcome.json() == STATUS
        assert outcome.stdout.count("\n") == 1

    @pytest.mark.usefixtures("answers")
    def test_for_people(self, invoke: Invoke, run_dir: str) -> None:
        outcome = invoke("status", environ={"SPLICER_RUN_DIR": run_dir})
        assert outcome.code == 0
        lines = outcome.stdout.splitlines()
        assert lines[0] == "Running: 12 connections spliced (3 local but not spliced, 1 going back to TCP)."
        text = outcome.stdout
        assert "cgroup   /sys/fs/cgroup/unified" in text
        assert "uptime   1h02m" in text
        assert "redirected  13.0 GiB in 4.50 M messages" in text
        assert "passed      1 message through TCP" in text
        refused = text[text.index("REFUSED") :].splitlines()
        assert [line.split()[0] for line in refused] == [
            "REFUSED",
            "splice_reader",
            "blocking_reader",
            "from_the_future",
        ]
        assert "splice(2)" in refused[1]

    @pytest.mark.parametrize(
        ("mode", "connections", "verdict"),
        [
            ("adaptive", (0, 0, 0), "Running: no local connections right now."),
            ("adaptive", (1, 0, 0), "Running: 1 local connection, none spliced now; splicer flows says why."),
            (
                "adaptive",
                (1, 0, 2),
                "Running: 3 local connections, none spliced now; splicer flows says why.",
            ),
            ("eager", (0, 1, 0), "Running: 1 connection spliced."),
        ],
    )
    def test_verdicts(self, mode: str, connections: tuple[int, int, int], verdict: str) -> None:
        counts = dict(zip(("paired", "spliced", "draining"), connections, strict=True))
        assert status.verdict({"mode": mode, "connections": counts}) == verdict
        assert "\x1b[" in status.verdict({"mode": mode, "connections": counts}, Palette(True))

    def test_neighbours(self, answers: Answers, invoke: Invoke, run_dir: str) -> None:
        """Each with its program, where it is, and what that means; what is not known is said."""
        place = "/sys/fs/cgroup/unified/shop.slice/web.service"
        found = Neighbourhood(
            (
                Neighbour("sock_ops", "tcp_tune", 61, "cgroup", place, 7),
                Neighbour("sk_msg", "verdict", 62, "map", "spliced", 19, is_splicer=True),
                Neighbour("sockmap", "", 0, "map", "agent", 23),
            ),
            ("BPF links: Operation not permitted",),
        )
        answers.status["neighbours"] = found.to_json()
        told = invoke("status", "--run-dir", run_dir).stdout
        rows = [re.split("  +", line) for line in told[told.index("HOOK") :].splitlines()]
        assert rows[1:4] == [
            ["sock_ops", "tcp_tune", "61", place, "runs beside ours, as if alone"],
            ["sk_msg", "verdict", "62", "spliced (19)", "another splicer, or left by one"],
            ["sockmap", "-", "-", "agent (23)", "no program; its sockets stay as they are"],
        ]
        assert told.endswith("\nNot known of neighbours: BPF links: Operation not permitted\n")
        assert invoke("status", "--json", "--run-dir", run_dir).json()["neighbours"] == found.to_json()
        assert all(len(line) <= 80 for line in status.render(answers.status, width=80))

    def test_many_neighbours(self) -> None:
        found = Neighbourhood(
            tuple(Neighbour("sk_lookup", "x", i, "netns", f"net:[{i}]", i) for i in range(12))
        )
        lines = status.render({"neighbours": found.to_json()})
        assert sum(line.startswith("sk_lookup") for line in lines) == 10
        assert lines[-1] == "and 2 more rows: splicer status --json"

    def test_neighbours_are_looked_for_when_they_are_shown(
        self, log: Log, invoke: Invoke, run_dir: str
    ) -> None:
        """And not for a health check."""
        asked: list[object] = []

        def answer(request: Mapping[str, Any]) -> dict[str, Any]:
            asked.append(request.get("neighbours"))
            return dict(STATUS)

        with Server(run_dir, {"status": answer}, log, allowed_uid=os.getuid()):
            for form in ((), ("--json",), ("--brief",)):
                assert invoke("status", *form, "--run-dir", run_dir).code == 0
        assert asked == [True, True, None]

    @pytest.mark.parametrize(
        ("containers", "what"), [(None, "everything"), (["web-1", "db-\x1b1"], "web-1, db-?1")]
    )
    def test_what_a_measurement_holds_is_the_first_line(
        self, containers: list[str] | None, what: str
    ) -> None:
        hold = {"holder": "splicer bench 1", "seconds": 12.4, "containers": containers}
        line = status.verdict({**STATUS, "hold": hold})
        assert line == f"Running: a measurement keeps {what} plain, for 12s at most."

    def test_an_answer_without_most_keys_can_be_shown(self) -> None:
        assert status.render({"schema": 1, "totals": {"refused": None}})[0].startswith("Running")

    def test_not_running(self, invoke: Invoke, run_dir: str) -> None:
        arguments = ("--run-dir", run_dir)
        outcome = invoke("status", *arguments, environ={"SPLICER_PIN_DIR": run_dir + "/none"})
        assert (outcome.code, outcome.stdout) == (3, "")
        assert outcome.stderr.splitlines()[0] == f"splicer: not running (run directory {run_dir})"
        assert "splicer run" in outcome.stderr.splitlines()[1]
        outcome = invoke("status", "--json", *arguments, environ={"SPLICER_PIN_DIR": run_dir + "/none"})
        assert (outcome.code, outcome.stderr) == (3, "")
        assert outcome.stdout == '{"schema":1,"running":false,"loaded":false}\n'

    def test_not_running_but_still_loaded(self, invoke: Invoke, run_dir: str, tmp_path: Path) -> None:
        (tmp_path / "register").touch()
        environ = {"SPLICER_PIN_DIR": str(tmp_path)}
        for command in (
            ["status"],
            ["flows"],
            ["flows", "--json"],
            ["policy"],
            ["explain", "1"],
            ["set", "web", "off"],
            ["unset", "web"],
            ["drain"],
            ["pause"],
            ["resume"],
        ):
            outcome = invoke(*command, "--run-dir", run_dir, environ=environ)
            assert (outcome.code, outcome.stdout) == (3, ""), command
            assert f"programs of an earlier run are still loaded ({tmp_path})" in outcome.stderr, command
            assert "splicer unload" in outcome.stderr, command
        brief = invoke("status", "--brief", "--run-dir", run_dir, environ=environ)
        assert (brief.code, brief.stderr) == (3, "")
        assert "still loaded" in brief.stdout
        document = invoke("status", "--json", "--run-dir", run_dir, environ=environ).json()
        assert document == {"schema": 1, "running": False, "loaded": True}

    @pytest.mark.parametrize("command", ["status", "flows"])
    def test_starting_or_stopping(self, invoke: Invoke, run_dir: str, command: str) -> None:
        with acquire(run_dir, "/x"):
            outcome = invoke(command, "--run-dir", run_dir)
        assert outcome.code == 3
        assert f"not serving: starting, stopping or unloading (pid {os.getpid()}" in outcome.stderr
        assert f"splicer {command} --run-dir {run_dir}" in outcome.stderr

    @pytest.mark.parametrize("command", ["status", "flows"])
    def test_a_daemon_of_another_schema(
        self, invoke: Invoke, run_dir: str, answers: Answers, command: str
    ) -> None:
        answers.status = answers.flows = {"schema": 2}
        outcome = invoke(command, "--json", "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout) == (1, "")
        assert "another schema (2 and not 1)" in outcome.stderr

    def test_a_bad_setting_it_has_no_use_for(self, invoke: Invoke, run_dir: str) -> None:
        assert invoke("status", "--run-dir", run_dir, environ={"SPLICER_MODE": "bad"}).code == 3


@pytest.mark.usefixtures("answers")
class TestFlows:
    def test_json_is_the_answer(self, invoke: Invoke, run_dir: str) -> None:
        outcome = invoke("flows", "--json", "--run-dir", run_dir)
        assert outcome.code == 0
        assert outcome.json() == {"schema": 1, "flows": FLOWS}

    def test_for_people(self, invoke: Invoke, run_dir: str) -> None:
        lines = invoke("flows", "--run-dir", run_dir).stdout.splitlines()
        assert lines[0].split() == ["LOCAL", "REMOTE", "STATE", "REASON", "MESSAGES", "BYTES", "AGE"]
        assert [line.split()[0].rpartition(":")[2] for line in lines[1:]] == [
            "40002",
            "40001",
            "40003",
            "40000",
        ]
        assert lines[1].split()[2:] == ["spliced", "52428", "5.00", "MiB", "12s"]
        assert lines[4].split()[2:] == ["paired", "blocking_reader", "0", "0", "B", "12s"]

    @pytest.mark.parametrize("width", [80, 100])
    def test_it_fits_a_terminal(self, width: int) -> None:
        lines = flows.render(FLOWS, width=width)
        assert max(map(len, lines)) <= width
        assert any(":40002" in line for line in lines)

    def test_ordinary_rows_fit_100_columns(self) -> None:
        widest = flow("255.255.255.255:65535", "255.255.255.255:65535", "draining", "blocking_reader", 2**40)
        assert max(map(len, flows.render([widest]))) <= 100

    @pytest.mark.parametrize(
        ("filters", "ports"),
        [
            (["--state", "spliced"], [40001, 40002]),
            (["--state", "spliced", "--state", "draining"], [40001, 40002, 40003]),
            (["--port", "8080"], [40000, 40001]),
            (["--port", "443", "--port", "40000"], [40000, 40002]),
            (["--port", "8081"], [40003]),
            (["--port", "80"], [40003]),
            (["--port", "8080", "--state", "spliced"], [40001]),
            (["--port", "1"], []),
        ],
    )
    def test_filters(self, invoke: Invoke, run_dir: str, filters: list[str], ports: list[int]) -> None:
        chosen = invoke("flows", "--json", "--run-dir", run_dir, *filters).json()["flows"]
        assert [int(entry["local"].rpartition(":")[2]) for entry in chosen] == ports

    def test_nothing_matches(self, invoke: Invoke, run_dir: str) -> None:
        outcome = invoke("flows", "--port", "1", "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout) == (0, "No flow matches (4 flows without the filters).\n")

    def test_nothing_there(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.flows = {"schema": 1, "flows": []}
        outcome = invoke("flows", "--run-dir", run_dir)
        assert outcome.code == 0
        assert outcome.stdout.startswith("No local connections.")
        assert invoke("flows", "--json", "--run-dir", run_dir).json() == {"schema": 1, "flows": []}

    def test_colours(self, invoke: Invoke, run_dir: str) -> None:
        text = invoke("flows", "--color", "always", "--run-dir", run_dir).stdout
        assert "\x1b[32mspliced\x1b[0m" in text
        assert "\x1b" not in invoke("flows", "--color", "always", "--json", "--run-dir", run_dir).stdout

    def test_a_row_of_nonsense_does_no_harm(self) -> None:
        odd = {"local": 5, "remote": "x\x1b[2J", "redirected_bytes": "many", "state": "new"}
        assert "\x1b" not in "\n".join(flows.render([odd]))
        assert flows.select([odd], (), {80}) == []


def test_what_waits_unread(log: Log, invoke: Invoke, run_dir: str) -> None:
    """Shown with --wide and in JSON; nobody else asks for it."""
    asked: list[object] = []
    rows = [dict(each) for each in FLOWS]
    for row, at_client, at_server in (
        (rows[1], (0, 0), (2048, 0)),
        (rows[3], (0, 5), (1, 512)),
    ):
        row["client_unread"] = asdict(Unread(*at_client))
        row["server_unread"] = asdict(Unread(*at_server))

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(request.get("unread"))
        return {"schema": 1, "flows": rows}

    with Server(run_dir, {"flows": answer}, log, allowed_uid=os.getuid()):
        wide = invoke("flows", "--wide", "--run-dir", run_dir).stdout.splitlines()
        assert invoke("flows", "--json", "--run-dir", run_dir).json()["flows"] == rows
        assert "UNREAD" not in invoke("flows", "--run-dir", run_dir).stdout
    assert asked == [True, True, False]
    assert [re.split("  +", line)[-2:] for line in wide] == [
        ["CLIENT-UNREAD", "SERVER-UNREAD"],
        ["-", "-"],
        ["0 B", "2.00 KiB"],
        ["5 B TCP", "1 B + 512 B TCP"],
        ["-", "-"],
    ]


def test_flows_without_a_daemon(invoke: Invoke, run_dir: str) -> None:
    outcome = invoke("flows", "--json", "--run-dir", run_dir)
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "not running" in outcome.stderr


class TestUnload:
    @pytest.fixture(autouse=True)
    def generation(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, float]]:
        """A generation module that reports what was asked of it."""
        self.removed: list[str] = []
        calls: list[tuple[str, str, float]] = []

        def unload(pin_dir: str, run_dir: str, timeout: float) -> list[str]:
            assert (Path(run_dir) / "lock").exists()
            calls.append((pin_dir, run_dir, timeout))
            return self.removed

        module = types.ModuleType("splicer.kernel.generation")
        vars(module)["unload"] = unload
        monkeypatch.setitem(sys.modules, "splicer.kernel.generation", module)
        monkeypatch.setattr(prerequisites, "require_privileges", lambda command: None)
        return calls

    def test_it_says_what_it_removed(
        self, invoke: Invoke, run_dir: str, generation: list[tuple[str, str, float]]
    ) -> None:
        self.removed = ["drained 3 connections", "removed 9 pins"]
        outcome = invoke("unload", "--run-dir", run_dir, "--pin-dir", "/p", "--stop-timeout", "1.5")
        assert (outcome.code, outcome.stdout) == (0, "drained 3 connections\nremoved 9 pins\n")
        assert generation == [("/p", run_dir, 1.5)]
        assert os.listdir(run_dir) == []

    def test_nothing_to_unload_leaves_nothing(self, invoke: Invoke, tmp_path: Path) -> None:
        for _ in range(2):
            outcome = invoke("unload", "--run-dir", str(tmp_path / "none"))
            assert (outcome.code, outcome.stdout) == (0, "Nothing to unload.\n")
            assert not (tmp_path / "none").exists()

    def test_a_stale_socket_goes_too(self, invoke: Invoke, run_dir: str) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(socket_path(run_dir))
        outcome = invoke("unload", "--run-dir", run_dir)
        assert outcome.stdout == f"removed control socket {socket_path(run_dir)}\n"
        assert os.listdir(run_dir) == []

    def test_a_live_daemon_is_left_alone(
        self, invoke: Invoke, run_dir: str, generation: list[tuple[str, str, float]]
    ) -> None:
        with acquire(run_dir, "/c"):
            outcome = invoke("unload", "--run-dir", run_dir)
        assert outcome.code == 1
        first, second = outcome.stderr.splitlines()
        assert first == (
            "splicer: a daemon is alive and in charge "
            f"(pid {os.getpid()}, cgroup /c, run directory {run_dir})"
        )
        assert second.endswith(f"kill {os.getpid()}")
        assert generation == []

    def test_another_unload_is_named_as_such(self, invoke: Invoke, run_dir: str) -> None:
        with acquire(run_dir, "", purpose="unload"):
            assert "splicer unload is at work" in invoke("unload", "--run-dir", run_dir).stderr

    def test_privileges_come_first(
        self, invoke: Invoke, run_dir: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(command: str) -> None:
            raise SplicerError(f"not enough privileges for {command}")

        monkeypatch.setattr(prerequisites, "require_privileges", refuse)
        assert "privileges for unload" in invoke("unload", "--run-dir", run_dir).stderr


def test_the_status_document_has_the_keys_of_the_contract() -> None:
    assert {"schema", "running", "pid", "version", "mode", "cgroup", "connections", "totals"} <= set(STATUS)
    assert set(STATUS["totals"]) == {
        "paired",
        "spliced",
        "drained",
        "redirected_bytes",
        "redirected_messages",
        "passed_messages",
        "rescued",
        "refused",
    }
    assert json.loads(json.dumps(STATUS)) == STATUS
