# SPDX-License-Identifier: Apache-2.0
"""`policy`, `set`, `unset` and `drain` against a control server in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from splicer.cli import policy
from splicer.daemon.control import Server
from splicer.errors import SplicerError
from splicer.policy.explanation import explain
from splicer.policy.precedence import Host
from splicer.policy.rules import Rule
from splicer.text import Palette

from ..conftest import Invoke, Log
from ..policy.test_entries import container

HOST = Host("adaptive", "on", "refuse")
FILE = "/etc/splicer.toml"
RULES = [
    Rule(service="web", ports=(80, 8000, 8001), mode="eager", number=1, file=FILE),
    Rule(cgroup="system.slice", mode="eager", number=2, file=FILE),
    Rule(ports=(5432,), blocking="allow", number=3, file=FILE),
]
COMPOSE = {"com.docker.compose.service": "web", "com.docker.compose.project": "demo"}
WEB = container("demo-web-1", 1, COMPOSE, published=("0.0.0.0:8080->80/tcp",))
BAD = container("demo-bad-1", 2, {"splicer.enable": "yes \x1b[2J"})
POD = container("demo-pod-1", 3, {"splicer.mode": "eager"}, network_mode="container:x", netns=5001)
ALL = [WEB, BAD, POD]


def answer(chosen: list[Any], **changes: Any) -> dict[str, Any]:
    rules = [
        {
            "number": rule.number,
            "file": rule.file,
            "selectors": rule.selectors,
            "ports": list(rule.ports),
            "mode": rule.mode,
            "blocking": rule.blocking,
            "tcp_inq": rule.tcp_inq,
            "matches": rule.number,
            "connections": 10 * rule.number,
        }
        for rule in RULES
    ]
    told = [explain(each, HOST, RULES, {"demo-web-1": "off"}, ALL).to_json() for each in chosen]
    return {
        "schema": 1,
        "default": "on",
        "mode": "adaptive",
        "blocking": "refuse",
        "tcp_inq": "allow",
        "docker": {"state": "connected", "endpoint": "unix:///run/docker.sock", "containers": 3},
        "rules": rules,
        "containers": told,
        **changes,
    }


class Daemon:
    """Remembers what it was asked and answers what it was told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {
            "policy": answer(ALL),
            "set": {"schema": 1, "changed": ["demo-web-1"], "unchanged": ["demo-web-2"], "mode": "off"},
            "unset": {"schema": 1, "changed": ["demo-web-1"], "unchanged": ["demo-web-2"]},
            "drain": {"schema": 1, "draining": True, "connections": 3},
            "pause": {"schema": 1, "paused": True, "changed": True, "connections": 3},
            "resume": {"schema": 1, "paused": False, "changed": True},
        }

    def handle(self, request: dict[str, Any]) -> Any:
        self.asked.append(request)
        given = self.answers[request["command"]]
        if isinstance(given, Exception):
            raise given
        return given


@pytest.fixture
def daemon(run_dir: str, log: Log) -> Iterator[Daemon]:
    given = Daemon()
    with Server(run_dir, dict.fromkeys(given.answers, given.handle), log, allowed_uid=os.getuid()):
        yield given


class TestPolicy:
    def test_everybody(self, invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
        outcome = invoke("policy", "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (0, "")
        lines = outcome.stdout.splitlines()
        assert lines[0] == "Everything local is spliced in mode adaptive, where nothing else is said."
        assert lines[1] == "Connections with blocking readers are left alone."
        assert lines[2] == "Connections that ask for TCP_INQ are spliced too."
        assert lines[4:10] == [
            f"Rules of {FILE}",
            "RULE  ABOUT                             SAYS            CONTAINERS  CONNECTIONS",
            "   1  service web, ports 80, 8000-8001  mode eager               1           10",
            "   2  cgroup system.slice               mode eager*              2           20",
            "   3  port 5432                         blocking allow         any           30",
            "* as adaptive for whatever is in no container",
        ]
        heading, web, bad, pod = (" ".join(line.split()) for line in lines[11:])
        assert heading == "CONTAINER SERVICE MODE BECAUSE NOTE"
        assert web == "demo-web-1 web off override 5432: off, blocking allow"
        assert bad.startswith("demo-bad-1 off label splicer.enable (bad value) bad splicer.enable; 5432:")
        assert pod.startswith("demo-pod-1 eager label splicer.mode Eager acts as adaptive; 5432:")
        assert daemon.asked == [{"command": "policy"}]

    def test_json_is_the_answer(self, invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
        assert invoke("policy", "--json", "--run-dir", run_dir).json() == daemon.answers["policy"]
        invoke("policy", "web", "--json", "--run-dir", run_dir)
        assert daemon.asked[1] == {"command": "policy", "container": "web"}

    def test_nothing_but_what_is_switched_on(self) -> None:
        lines = policy.render(answer([], default="off", rules=[], blocking="allow", tcp_inq="refuse"))
        assert lines == [
            "Only what is switched on is spliced (--default off), by itself in mode adaptive.",
            "Connections with blocking readers are spliced too.",
            "Connections that ask for TCP_INQ are left alone.",
            "",
            "No containers are known. Docker: connected (unix:///run/docker.sock), 3 containers.",
        ]

    def test_one(self, invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
        daemon.answers["policy"] = answer([WEB])
        outcome = invoke("policy", "demo-web-1", "--run-dir", run_dir)
        assert outcome.code == 0
        text = outcome.stdout
        lines = text.splitlines()
        assert lines[0] == "demo-web-1: off, but for 1 port (override)."
        assert "  service    web of project demo\n" in text
        assert "  network    bridge (172.17.0.1)\n" in text
        assert "  published  0.0.0.0:8080->80/tcp\n" in text
        assert "  mode       off (override)\n" in text
        table = lines.index("What is said about it, what counts most first") + 1
        assert [line.split("  ")[0] for line in lines[table : table + 5]] == [
            "SOURCE",
            "override",
            f"{FILE} [[policy]] 1",
            f"{FILE} [[policy]] 3",
            "default",
        ]
        assert [line.split()[-1] for line in lines[table : table + 5]] == [
            "DECIDES",
            "yes",
            "no",
            "yes",
            "yes",
        ]
        assert "splicer unset demo-web-1" in text
        assert "splicer set demo-web-1 adaptive" in text

    def test_problems_and_notes_of_one(self) -> None:
        bad, pod = answer([BAD, POD])["containers"]
        text = "\n".join(policy.render_container(bad))
        assert 'Bad label: splicer.enable is "yes ?[2J", accepted: true or false' in text
        assert "mend label where the container is made: splicer.enable (true or false)" in text
        assert "[[policy]] with" not in text, "which come after labels, and would not help"
        assert "Note: Eager acts as adaptive" in "\n".join(policy.render_container(pod))
        assert "splicer unset" not in text

    def test_of_several_bad_labels_all_have_to_be_mended(self) -> None:
        labels = {"splicer.enable": "yes", "splicer.mode": "adaptve", "splicer.prots": "80"}
        bad = container("demo-bad-2", 9, labels)
        told = explain(bad, HOST, RULES, {}, [bad]).to_json()
        assert told["mode_source"] == "label splicer.enable, label splicer.mode (bad values)"
        text = "\n".join(policy.render_container(told))
        assert "splicer.mode=adaptive where" not in text, "with that alone it stays off"
        assert (
            "mend all of these labels where the container is made: splicer.enable (true or false), " in text
        )
        assert 'splicer.mode is "adaptve", accepted: adaptive, eager or off; did you mean adaptive?' in text
        assert "did you mean splicer.ports?" in text

    def test_overrides_and_how_to_take_them_back(self) -> None:
        said = [
            {"kind": "process", "value": "php fpm*", "mode": "off"},
            {"kind": "container", "value": "demo-web-1", "mode": "eager"},
        ]
        lines = policy.render(answer([], overrides=said, paused=True))
        assert lines[0].startswith("Paused: nothing is spliced until splicer resume.")
        start = lines.index("Overrides (splicer set), the newest first")
        assert lines[start + 2].split("  ")[-1].strip() == "splicer unset --process 'php fpm*'"
        assert lines[start + 3].endswith("splicer unset demo-web-1")

    @pytest.mark.parametrize("width", [80, 120])
    def test_it_fits_a_terminal(self, width: int) -> None:
        document = answer(ALL)
        lines = policy.render(document, width=width)
        for told in document["containers"]:
            lines += policy.render_container(told | {"cgroup": "/docker/1"}, width=width)
        assert max(map(len, lines)) <= width

    def test_nothing_drives_the_terminal(self) -> None:
        odd = answer(ALL, mode="\x1b[2J", docker={"state": "\x1b"})
        for told in odd["containers"]:
            told |= {"name": "\x1b[2J", "notes": ["\x1b"], "mode_source": "\x1b", "service": "\x1b"}
            assert "\x1b" not in "\n".join(policy.render_container(told))
        assert "\x1b" not in "\n".join(policy.render(odd))
        assert "\x1b[32m" in "\n".join(policy.render(answer(ALL), palette=Palette(True)))

    def test_an_answer_without_most_keys_can_be_shown(self) -> None:
        assert policy.render({"schema": 1})
        assert policy.render({"rules": [{}, 5], "containers": [{}, None]})
        assert policy.render_container(
            {"ports": [{"port": "x"}], "parts": [{}], "problems": [{}], "notes": [1]}
        )


class TestVerbs:
    @pytest.mark.parametrize(
        ("arguments", "asked", "said"),
        [
            (
                ["set", "web", "off"],
                {"command": "set", "container": "web", "mode": "off"},
                ["demo-web-1: off from now on", "demo-web-2: off already"],
            ),
            (
                ["unset", "web"],
                {"command": "unset", "container": "web"},
                ["demo-web-1: labels and configuration count again", "demo-web-2: nothing was set"],
            ),
            (["set", "--port", "80,81", "off"], {"command": "set", "port": "80-81", "mode": "off"}, None),
            (["set", "--process", "php*", "off"], {"command": "set", "process": "php*", "mode": "off"}, None),
            (["unset", "--cgroup", "a/b"], {"command": "unset", "cgroup": "a/b"}, None),
            (["unset", "--address", "::1"], {"command": "unset", "address": "::1"}, None),
            (
                ["drain"],
                {"command": "drain"},
                ["Draining: 3 spliced connections go back to plain TCP now."],
            ),
            (
                ["pause"],
                {"command": "pause"},
                [
                    "Paused: nothing is spliced until splicer resume; "
                    "3 spliced connections on the way back to plain TCP."
                ],
            ),
            (
                ["resume"],
                {"command": "resume"},
                ["Resumed: what is busy is spliced again, as splicer policy says."],
            ),
        ],
    )
    def test_they_say_what_changed(
        self,
        invoke: Invoke,
        run_dir: str,
        daemon: Daemon,
        arguments: list[str],
        asked: dict[str, str],
        said: list[str] | None,
    ) -> None:
        outcome = invoke(*arguments, "--run-dir", run_dir)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert said is None or outcome.stdout.splitlines() == said
        assert daemon.asked == [asked]
        assert invoke(*arguments, "--json", "--run-dir", run_dir).json() == daemon.answers[arguments[0]]

    @pytest.mark.parametrize(
        ("command", "changes", "said"),
        [
            ("drain", {"connections": 0}, "Nothing to drain: no connection is spliced."),
            ("drain", {"connections": 1}, "Draining: 1 spliced connection goes back to plain TCP now."),
            (
                "pause",
                {"changed": False, "connections": 0},
                "Paused already: nothing is spliced until splicer resume.",
            ),
            ("resume", {"changed": False}, "Nothing to resume: splicing is not paused."),
        ],
    )
    def test_they_are_idempotent_and_say_so(
        self, invoke: Invoke, run_dir: str, daemon: Daemon, command: str, changes: dict[str, Any], said: str
    ) -> None:
        daemon.answers[command] |= changes
        outcome = invoke(command, "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout, outcome.stderr) == (0, said + "\n", "")

    def test_what_else_there_is_to_know(self, invoke: Invoke, run_dir: str, daemon: Daemon) -> None:
        daemon.answers["set"] |= {"changed": ["process x"], "unchanged": [], "note": "nobody\x1b"}
        said = invoke("set", "--process", "x", "off", "--run-dir", run_dir).stdout
        assert said == "process x: off from now on\nNote: nobody?.\n"

    @pytest.mark.parametrize("arguments", [["policy", "x"], ["set", "x", "off"], ["unset", "x"]])
    def test_an_unknown_container(
        self, invoke: Invoke, run_dir: str, daemon: Daemon, arguments: list[str]
    ) -> None:
        daemon.answers[arguments[0]] = SplicerError("no such container (x)", hint='did you mean "y"?')
        outcome = invoke(*arguments, "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout) == (1, "")
        assert outcome.stderr == 'splicer: no such container (x)\nhint: did you mean "y"?\n'

    @pytest.mark.parametrize(
        ("command", "arguments"),
        [("set", ["set", "x", "off"]), ("unset", ["unset", "x"]), ("drain", ["drain"])],
    )
    def test_an_empty_answer(
        self, invoke: Invoke, run_dir: str, daemon: Daemon, command: str, arguments: list[str]
    ) -> None:
        daemon.answers[command] = {"schema": 1}
        assert invoke(*arguments, "--run-dir", run_dir).stdout.startswith("Nothing to ")
        daemon.answers[command] = {"schema": 1, "changed": ["\x1b"], "mode": "\x1b"}
        assert "\x1b" not in invoke(*arguments, "--run-dir", run_dir).stdout

    @pytest.mark.parametrize("arguments", [["policy"], ["set", "x", "off"], ["unset", "x"], ["drain"]])
    def test_without_a_daemon(self, invoke: Invoke, run_dir: str, arguments: list[str]) -> None:
        outcome = invoke(*arguments, "--json", "--run-dir", run_dir)
        assert (outcome.code, outcome.stdout) == (3, "")
        assert "not running" in outcome.stderr
