# SPDX-License-Identifier: Apache-2.0
"""What `status` and `flows` say about containers: health, engine, labels, and whose connections these are."""

from __future__ import annotations

from typing import Any

import pytest

from splicer.cli import flows, owners, status
from splicer.daemon.instance import acquire

from ..conftest import Invoke
from .conftest import Answers
from .test_nouns import FLOWS, STATUS, flow

WEB = {
    "container": "demo-web-1",
    "service": "web",
    "project": "demo",
    "process": "nginx",
    "pid": 4711,
    "command": "nginx: worker",
    "cgroup": "/docker/0123",
}
LOAD = {"container": "demo-load-1", "service": "load", "process": "wrk", "pid": 12, "cgroup": "/docker/4567"}
REDIS = {"process": "redis-server", "pid": 99, "cgroup": "/system.slice/redis.service"}
POD = {"pod": "0f1e2d3c-aaaa-bbbb-cccc-0123456789ab"}
UNKNOWN: dict[str, Any] = {"container": "", "pid": 0}

NAMED = [
    {**flow("10.0.0.1:40000", "10.0.0.2:80", "spliced", "", 5 * 1024**2), "client": LOAD, "server": WEB},
    {
        **flow("127.0.0.1:40001", "127.0.0.1:6379", "paired", "blocking_reader"),
        "client": WEB,
        "server": REDIS,
    },
    {**flow("10.0.0.1:40002", "10.0.0.3:443", "draining", "stream", 100), "client": UNKNOWN, "server": POD},
]


@pytest.fixture
def answers(answers: Answers) -> Answers:
    answers.status, answers.flows = {**STATUS, "healthy": True}, {"schema": 1, "flows": NAMED}
    return answers


class TestHealth:
    def test_healthy(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        outcome = invoke("status", "--brief", "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert outcome.stdout == (
            "Running: 12 connections spliced (3 local but not spliced, 1 going back to TCP).\n"
        )
        del answers.status["healthy"]
        assert invoke("status", "--brief", "--run-dir", run_dir).code == 0

    def test_not_healthy(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.status |= {"healthy": False, "trouble": "the policy does not fit\x1b"}
        outcome = invoke("status", "--brief", "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (1, "")
        assert outcome.stdout == "Running, but not healthy: the policy does not fit?.\n"
        whole = invoke("status", "--run-dir", run_dir)
        assert (whole.code, whole.stdout.splitlines()[0] + "\n") == (0, outcome.stdout)
        answers.status["trouble"] = ""
        assert "see the daemon's log" in invoke("status", "--brief", "--run-dir", run_dir).stdout

    def test_not_running(self, invoke: Invoke, run_dir: str) -> None:
        outcome = invoke("status", "--brief", "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (3, "")
        assert outcome.stdout == f"not running (run directory {run_dir})\n"
        with acquire(run_dir, "/x"):
            outcome = invoke("status", "--brief", "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout.count("\n")) == (3, 1)
        assert outcome.stdout.startswith("not serving: starting, stopping or unloading")

    def test_a_daemon_of_another_schema(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.status = {"schema": 2}
        outcome = invoke("status", "--brief", "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout.count("\n"), outcome.stderr) == (1, 1, "")


class TestFirstLine:
    """Of `status`, and all of `status --brief`."""

    def say(self, invoke: Invoke, run_dir: str) -> str:
        brief = invoke("status", "--brief", "--run-dir", run_dir)
        assert (brief.code, brief.stderr) == (0, ""), "a health check stays green"
        assert invoke("status", "--run-dir", run_dir).stdout.splitlines()[0] + "\n" == brief.stdout
        return brief.stdout

    def test_paused(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.status["paused"] = {"since_seconds": 185.0}
        assert self.say(invoke, run_dir) == (
            "Paused since 3m05s (13 going back to TCP): nothing is spliced until splicer resume.\n"
        )
        answers.status["connections"] = {"paired": 5}
        assert self.say(invoke, run_dir) == "Paused since 3m05s: nothing is spliced until splicer resume.\n"

    def test_a_reload_that_failed(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.status["reload"] = {"failed": "bad value for mode\x1b", "hint": "", "since_seconds": 60.0}
        assert self.say(invoke, run_dir).startswith(
            "Running on old settings: those before hold, since a reload failed 1m00s ago: "
            "bad value for mode?. Running: 12 connections spliced"
        )

    def test_both(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        answers.status |= {"reload": {"failed": "x"}, "paused": {"since_seconds": 1.0}}
        assert "a reload failed" in self.say(invoke, run_dir)
        assert "Paused since 1.0s" in self.say(invoke, run_dir)


class TestStatus:
    @pytest.mark.parametrize(
        ("docker", "said"),
        [
            (
                {"state": "connected", "endpoint": "unix:///run/docker.sock", "containers": 1},
                "connected (unix:///run/docker.sock), 1 container",
            ),
            ({"state": "absent", "error": ""}, "no container engine found"),
            (
                {"state": "lost", "endpoint": "unix:///s", "since_seconds": 12.3, "error": "refused"},
                "lost 12s ago (unix:///s): refused; what was known of containers holds",
            ),
            ({"state": "off"}, "off (--docker off)"),
            ({"state": "dreaming", "error": "deep"}, "dreaming: deep"),
            ({}, "unknown"),
        ],
    )
    def test_docker(self, docker: dict[str, Any], said: str) -> None:
        assert status.describe_docker(docker) == said
        text = "\n".join(status.render({**STATUS, "docker": docker}))
        assert (f"docker   {said}\n" in text) == bool(docker)

    @pytest.mark.parametrize(
        ("default", "said"),
        [
            ("on", "adaptive, for everything local"),
            ("off", "adaptive, for what is switched on (splicer policy)"),
            ("", "adaptive"),
        ],
    )
    def test_mode(self, default: str, said: str) -> None:
        assert f"mode     {said}\n" in "\n".join(status.render({**STATUS, "default": default}))

    @pytest.mark.parametrize("said", ["refused", "told apart", ""])
    def test_blocking_readers(self, said: str) -> None:
        text = "\n".join(status.render({**STATUS, "blocking_readers": said}))
        assert ("blocking  all refused: no way to tell on this kernel who sleeps" in text) == (
            said == "refused"
        )

    @pytest.mark.parametrize("state", ["unavailable", "hears", "asks", ""])
    def test_networks(self, state: str) -> None:
        text = "\n".join(status.render({**STATUS, "networks": {"state": state, "namespaces": []}}))
        assert ("networks  not watched: " in text) == (state == "unavailable")

    def test_the_verdict_with_default_off(self) -> None:
        line = status.verdict({"mode": "adaptive", "default": "off", "connections": {}})
        assert line.startswith("Running: no local connection of what is switched on")

    def test_problems_and_traffic(self) -> None:
        row = {"connections": 3, "redirected_bytes": 2048, "redirected_messages": 7}
        document = {
            **STATUS,
            "problems": [
                {"container": "demo-bad-1", "label": "splicer.mode", "value": "x\x1b", "accepted": "adaptive"}
            ],
            "traffic": [{"client": LOAD, "server": WEB, **row}, {"client": {}, "server": {}}]
            + [{"client": POD, "server": REDIS, **row}] * 9,
        }
        lines = status.render(document, width=80)
        assert max(map(len, lines)) <= 80 or "BECAUSE" in "".join(lines)
        start = next(number for number, line in enumerate(lines) if line.startswith("CLIENT"))
        assert lines[start].split() == ["CLIENT", "SERVER", "CONNECTIONS", "MESSAGES", "BYTES"]
        assert lines[start + 1].split() == ["demo-load-1", "demo-web-1", "3", "7", "2.00", "KiB"]
        assert lines[start + 2].split() == ["?", "?", "0", "0", "0", "B"]
        assert lines[start + 11] == "and 1 more row: splicer status --json"
        assert lines[-2].split() == ["CONTAINER", "BAD", "LABEL", "VALUE", "ACCEPTED"]
        assert lines[-1].split() == ["demo-bad-1", "splicer.mode", '"x?"', "adaptive"]

    def test_odd_answers(self) -> None:
        assert status.render({"docker": 5, "problems": [{}, 1], "traffic": {"a": 1}, "healthy": "yes"})


class TestParties:
    @pytest.mark.parametrize(
        ("party", "name", "described"),
        [
            (WEB, "demo-web-1", "demo-web-1/nginx[4711]"),
            ({**WEB, "container": ""}, "web", "web/nginx[4711]"),
            (REDIS, "redis.service", "redis.service/redis-server[99]"),
            (
                {**REDIS, "cgroup": "/user.slice/session-3.scope"},
                "session-3.scope/redis-server",
                "session-3.scope/redis-server[99]",
            ),
            ({**REDIS, "cgroup": "/"}, "redis-server", "redis-server[99]"),
            ({"cgroup": "/system.slice/redis.service"}, "redis.service", "redis.service"),
            (POD, f"pod/{POD['pod']}", f"pod/{POD['pod']}"),
            (UNKNOWN, "", ""),
            ({"cgroup": "/", "pid": 7}, "", ""),
            ({}, "", ""),
        ],
    )
    def test_names(self, party: dict[str, Any], name: str, described: str) -> None:
        assert owners.name_owner(party) == name
        assert owners.describe_owner(party) == described


class TestFlows:
    def test_names_stand_before_addresses(self) -> None:
        lines = flows.render(NAMED)
        assert lines[0].split()[:5] == ["CLIENT", "SERVER", "LOCAL", "REMOTE", "STATE"]
        assert lines[1].split()[:5] == [
            "demo-load-1",
            "demo-web-1",
            "10.0.0.1:40000",
            "10.0.0.2:80",
            "spliced",
        ]
        assert lines[3].split()[:3] == ["demo-web-1", "redis.service", "127.0.0.1:40001"]
        assert flows.render(NAMED, width=140)[0] == lines[0]

    def test_names_instead_of_addresses_on_a_narrow_terminal(self) -> None:
        lines = flows.render(NAMED, width=80)
        assert max(map(len, lines)) <= 80
        assert lines[0].split() == ["CLIENT", "SERVER", "STATE", "REASON", "BYTES", "AGE"]
        assert lines[1].split() == ["demo-load-1:40000", "demo-web-1:80", "spliced", "5.00", "MiB", "12s"]
        assert lines[3].split()[1] == "redis.service:6379"
        at_100 = flows.render(NAMED, width=100)
        assert max(map(len, at_100)) <= 100
        assert "MESSAGES" in flows.render(NAMED[:2], width=100)[0]
        assert at_100[1].split()[:2] == ["demo-load-1:40000", "demo-web-1:80"]
        assert at_100[2].split()[0] == "10.0.0.1:40002", "an end that nobody knows keeps its address"

    def test_wide(self, invoke: Invoke, run_dir: str, answers: Answers) -> None:
        lines = invoke("flows", "--wide", "--run-dir", run_dir).stdout.splitlines()
        assert lines[1].split()[:3] == ["demo-load-1/wrk[12]", "demo-web-1/nginx[4711]", "10.0.0.1:40000"]
        assert flows.render(NAMED, width=80, wide=True) == lines

    def test_status_and_flows_name_a_party_alike(self) -> None:
        """What `status` says of a process outside of containers, which it knows by cgroup alone, is how the
        name in `flows` begins."""
        for owner in (WEB, REDIS, POD, {"process": "nc", "cgroup": "/user.slice/session-3.scope"}):
            known = {key: value for key, value in owner.items() if key not in ("process", "pid", "command")}
            assert owners.name_owner(owner).partition("/nc")[0] == owners.name_party(known)

    def test_without_names_as_ever(self) -> None:
        assert flows.render([{**each, "client": UNKNOWN, "server": {}} for each in FLOWS]) == flows.render(
            FLOWS
        )

    @pytest.mark.parametrize(
        ("filters", "ports"),
        [
            (["--container", "demo-web-1"], [40000, 40001]),
            (["--container", "demo-load-*"], [40000]),
            (["--container", "web"], []),
            (["--service", "web", "--service", "load"], [40000, 40001]),
            (["--process", "redis-*"], [40001]),
            (["--container", "demo-web-1", "--process", "wrk"], [40000]),
            (["--process", "nginx", "--state", "paired"], [40001]),
            (["--container", "*"], [40000, 40001]),
        ],
    )
    def test_filters(
        self, invoke: Invoke, run_dir: str, answers: Answers, filters: list[str], ports: list[int]
    ) -> None:
        chosen = invoke("flows", "--json", "--run-dir", run_dir, *filters).json()["flows"]
        assert [int(entry["local"].rpartition(":")[2]) for entry in chosen] == ports
        assert all(entry in NAMED for entry in chosen)

    def test_odd_parties(self) -> None:
        odd = {**NAMED[0], "client": "me", "server": {"container": 5, "process": "x\x1b[2J", "pid": "y"}}
        for keywords in ({}, {"width": 80}, {"wide": True}):
            assert "\x1b" not in "\n".join(flows.render([odd], **keywords))
        assert flows.select([odd], (), frozenset(), {"container": ["*"]}) == []
