# SPDX-License-Identifier: Apache-2.0
"""Labels are read strictly, and what cannot be read leaves the container alone."""

from __future__ import annotations

import pytest

from splicer.policy.labels import ENABLE, MODE, MOST_PORTS, PORTS, LabelPolicy, Problem, read, read_ports


@pytest.mark.parametrize(
    ("labels", "policy"),
    [
        ({}, None),
        ({"com.docker.compose.service": "web", "other.enable": "x"}, None),
        ({ENABLE: "true"}, LabelPolicy(None)),
        ({ENABLE: "TRUE"}, LabelPolicy(None)),
        ({ENABLE: "False"}, LabelPolicy("off")),
        ({MODE: "adaptive"}, LabelPolicy("adaptive")),
        ({MODE: "eager"}, LabelPolicy("eager")),
        ({MODE: "off"}, LabelPolicy("off")),
        ({ENABLE: "true", MODE: "eager"}, LabelPolicy("eager")),
        ({ENABLE: "true", MODE: "off"}, LabelPolicy("off")),
        ({ENABLE: "false", MODE: "eager"}, LabelPolicy("off")),
        ({PORTS: "8080"}, LabelPolicy(None, (8080,))),
        ({PORTS: "80,443", MODE: "eager"}, LabelPolicy("eager", (80, 443))),
        ({PORTS: "80,443", MODE: "off"}, LabelPolicy("off", (80, 443))),
        ({PORTS: "80", ENABLE: "false"}, LabelPolicy("off", (80,))),
    ],
)
def test_what_labels_ask_for(labels: dict[str, str], policy: LabelPolicy | None) -> None:
    assert read(labels) == (policy, ())


@pytest.mark.parametrize("value", ["", "yes", "1", "on", " true", "true ", "tru\u0435", "TRUE\n"])
def test_enable_is_true_or_false(value: str) -> None:
    policy, problems = read({ENABLE: value, MODE: "eager"})
    assert policy == LabelPolicy("off")
    assert problems == (Problem(ENABLE, value, "true or false"),)


@pytest.mark.parametrize("value", ["", "Eager", "on", "adaptive,eager", "auto"])
def test_a_bad_mode(value: str) -> None:
    policy, problems = read({MODE: value, ENABLE: "true", PORTS: "80"})
    assert policy == LabelPolicy("off"), "all of the container is left alone, not only these ports"
    assert problems == (Problem(MODE, value, "adaptive, eager or off"),)


@pytest.mark.parametrize(
    "value",
    [
        "",
        ",",
        "80,",
        "http",
        "0",
        "65536",
        "-80",
        "80-",
        "90-80",
        "80;443",
        "+80",
        "8_0",
        "\u0668\u0660",
        "1-129",
        "1-65535",
    ],
)
def test_bad_ports(value: str) -> None:
    policy, (problem,) = read({PORTS: value})
    assert policy == LabelPolicy("off")
    assert (problem.label, problem.value) == (PORTS, value)
    assert "8000-8010" in problem.accepted
    assert str(MOST_PORTS) in problem.accepted


def test_every_bad_value_is_reported() -> None:
    _, problems = read({ENABLE: "x", MODE: "y", PORTS: "z"})
    assert [problem.label for problem in problems] == [ENABLE, MODE, PORTS]


def test_an_unknown_label_is_reported_and_changes_nothing() -> None:
    policy, (problem,) = read({"splicer.enabled": "false", MODE: "eager"})
    assert policy == LabelPolicy("eager")
    assert (problem.label, problem.value) == ("splicer.enabled", "false")
    assert ENABLE in problem.accepted
    assert read({"splicer.port": "80"})[0] is None


def test_ports() -> None:
    assert read_ports("443, 80,80", 2) == (80, 443)
    assert read_ports("8000 - 8003,8002", 4) == (8000, 8001, 8002, 8003)
    assert read_ports("1,65535", 2) == (1, 65535)
    assert len(read_ports("1-128", 128)) == 128
    for text in ("1-3", "1,2,3", "1-2,3"):
        with pytest.raises(ValueError, match="more than 2 ports"):
            read_ports(text, 2)


@pytest.mark.parametrize(
    ("label", "value", "meant"),
    [
        ("splicer.enabel", "true", ENABLE),
        ("splicer.prots", "80", PORTS),
        ("splicer.colour", "red", ""),
        ("spliser.mode", "off", MODE),
        ("Splicer.Mode", "off", MODE),
        (MODE, "adaptve", "adaptive"),
        (MODE, "OFF", "off"),
        (ENABLE, "ture", "true"),
        (ENABLE, "maybe", ""),
        (PORTS, "http", ""),
    ],
)
def test_what_was_meant(label: str, value: str, meant: str) -> None:
    [problem] = read({label: value})[1]
    assert (problem.label, problem.meant) == (label, meant)


@pytest.mark.parametrize("label", ["com.docker.compose.service", "slice.mode", "traefik.enable", "s", "spl"])
def test_other_peoples_labels_are_no_slips(label: str) -> None:
    assert read({label: "x"}) == (None, ())
