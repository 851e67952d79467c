# SPDX-License-Identifier: Apache-2.0
"""What `splicer policy` says about a container."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import pytest

from splicer.model import Container
from splicer.policy.explanation import Explanation, explain
from splicer.policy.precedence import Host
from splicer.policy.rules import Rule

from .test_entries import HOST, ROOT, container


def explain_it(
    which: Container,
    rules: Sequence[Rule] = (),
    overrides: Mapping[str, str] | None = None,
    host: Host = HOST,
    others: Sequence[Container] = (),
) -> Explanation:
    return explain(which, host, rules, overrides or {}, [which, *others], root=ROOT)


def parts(told: Explanation) -> list[tuple[str, str, bool]]:
    return [(part.source, part.says, part.used) for part in told.parts]


def test_nothing_said() -> None:
    told = explain_it(container("web", 1))
    assert (told.mode, told.mode_source, told.blocking, told.blocking_source) == (
        "adaptive",
        "default",
        "refuse",
        "default",
    )
    assert parts(told) == [("default", "mode adaptive, blocking refuse, tcp_inq allow", True)]
    assert (told.ports, told.problems, told.notes) == ((), (), ())


def test_everything_in_order_of_precedence() -> None:
    rules = [
        Rule(ports=(5432,), mode="off", number=1, file="/etc/splicer.toml"),
        Rule(cidr="172.16.0.0/12", blocking="allow", number=2, file="/etc/splicer.toml"),
        Rule(container="other", mode="off", number=3, file="/etc/splicer.toml"),
        Rule(container="w*", mode="eager", ports=(80, 81), number=4, file="/etc/splicer.toml"),
        Rule(ports=(82,), tcp_inq="refuse", number=5, file="/etc/splicer.toml"),
    ]
    web = container("web", 1, {"splicer.ports": "8080"}, addresses=("172.17.0.1", "10.0.0.1"))
    told = explain_it(web, rules, {"web": "eager"}, Host("adaptive", "off", "refuse"))
    assert (told.mode, told.mode_source) == ("eager", "override")
    assert (told.blocking, told.blocking_source) == ("allow", "/etc/splicer.toml [[policy]] 2")
    assert (told.tcp_inq, told.tcp_inq_source) == ("allow", "default")
    assert [(port.port, port.tcp_inq, port.tcp_inq_source) for port in told.ports] == [
        (82, "refuse", "/etc/splicer.toml [[policy]] 5")
    ]
    assert parts(told) == [
        ("override", "mode eager", True),
        ("labels", "mode adaptive on port 8080, mode off on all others", False),
        ("/etc/splicer.toml [[policy]] 1", "mode off on port 5432, as a server", False),
        ("/etc/splicer.toml [[policy]] 2", "blocking allow, at address 172.17.0.1 only", True),
        ("/etc/splicer.toml [[policy]] 4", "mode eager on ports 80-81", False),
        ("/etc/splicer.toml [[policy]] 5", "tcp_inq refuse on port 82, as a server", True),
        ("default", "mode off (--default off), blocking refuse, tcp_inq allow", True),
    ]
    rules = rules[:-1]
    told = explain_it(web, rules)
    assert (told.mode, told.mode_source) == ("off", "label splicer.ports")
    assert [(port.port, port.mode, port.source) for port in told.ports] == [
        (8080, "adaptive", "label splicer.ports")
    ]
    told = explain_it(dataclasses.replace(web, labels={}), rules)
    assert [(port.port, port.mode, port.source) for port in told.ports] == [
        (80, "eager", "/etc/splicer.toml [[policy]] 4"),
        (81, "eager", "/etc/splicer.toml [[policy]] 4"),
        (5432, "off", "/etc/splicer.toml [[policy]] 1"),
    ]


@pytest.mark.parametrize(
    ("labels", "mode", "source"),
    [
        ({"splicer.enable": "true"}, "adaptive", "label splicer.enable"),
        ({"splicer.enable": "true", "splicer.mode": "adaptive"}, "adaptive", "label splicer.mode"),
        ({"splicer.enable": "false", "splicer.mode": "adaptive"}, "off", "label splicer.enable"),
        ({"splicer.mode": "Off"}, "off", "label splicer.mode (bad value)"),
        ({"splicer.mode": "eager", "splicer.ports": "http"}, "off", "label splicer.ports (bad value)"),
        ({"splicer.moed": "off"}, "adaptive", "default"),
    ],
)
def test_which_label(labels: dict[str, str], mode: str, source: str) -> None:
    told = explain_it(container("web", 1, labels))
    assert (told.mode, told.mode_source) == (mode, source)
    assert bool(told.problems) == ("bad" in source or "splicer.moed" in labels)


@pytest.mark.parametrize(
    ("labels", "annotations", "mode", "source"),
    [
        ({}, {"splicer.mode": "off"}, "off", "annotation splicer.mode"),
        ({"splicer.mode": "off"}, {"splicer.mode": "eager"}, "eager", "annotation splicer.mode"),
        ({"splicer.enable": "true"}, {"splicer.mode": "eager"}, "eager", "annotation splicer.mode"),
        ({"splicer.mode": "eager"}, {"splicer.enable": "false"}, "off", "annotation splicer.enable"),
        ({"splicer.enable": "false"}, {"splicer.mode": "eager"}, "off", "label splicer.enable"),
        ({"splicer.mode": "eager"}, {"splicer.ports": "http"}, "off", "annotation splicer.ports (bad value)"),
        ({"splicer.mode": "no"}, {"splicer.mode": "off", "io.x": "y"}, "off", "annotation splicer.mode"),
    ],
)
def test_annotations_say_what_labels_say(
    labels: dict[str, str], annotations: dict[str, str], mode: str, source: str
) -> None:
    """Of the two with one name the annotation counts."""
    told = explain_it(container("web", 1, labels, annotations=annotations))
    assert (told.mode, told.mode_source) == (mode, source)
    assert bool(told.problems) == ("bad" in source)


def test_eager_in_a_shared_namespace() -> None:
    pod = container("pod", 9, netns=5001)
    web = container("web", 1, {"splicer.mode": "eager"}, network_mode="container:9")
    (note,) = explain_it(web, others=[pod]).notes
    assert note.startswith("Eager acts as adaptive: it shares its network namespace with pod; name its ports")
    assert explain_it(web).notes == ()
    on_host = dataclasses.replace(web, network_mode="host")
    (note,) = explain_it(on_host, [Rule(container="web", mode="eager", ports=(80,))]).notes
    assert "uses the host's network" in note
    (note,) = explain_it(dataclasses.replace(web, netns=0)).notes
    assert note == "Eager acts as adaptive: its network namespace was not found."
    named = container("web", 1, {"splicer.mode": "eager", "splicer.ports": "80"}, network_mode="host")
    assert explain_it(named).notes == ()
    both = explain_it(
        dataclasses.replace(on_host, labels={}),
        [Rule(container="web", mode="eager", ports=(80,)), Rule(container="web", mode="eager", number=2)],
    )
    assert both.notes[0].startswith("Eager acts as adaptive but on 80: ")


def test_other_notes() -> None:
    assert "not running" in explain_it(container("web", 1, pid=0)).notes[0]
    assert "cgroup was not found" in explain_it(container("web", 1, cgroup_id=0)).notes[0]


def test_json() -> None:
    web = container("web", 1, {"splicer.enable": "x", "com.docker.compose.service": "www"})
    document = json.loads(json.dumps(explain_it(web).to_json()))
    assert {key: document[key] for key in ("name", "service", "mode", "addresses", "notes")} == {
        "name": "web",
        "service": "www",
        "mode": "off",
        "addresses": ["172.17.0.1"],
        "notes": [],
    }
    problem = {"label": "splicer.enable", "value": "x", "accepted": "true or false", "meant": ""}
    assert document["problems"] == [problem]
    assert document["parts"][0] == {"source": "labels", "says": "mode off", "used": True}
