# SPDX-License-Identifier: Apache-2.0
"""What is private is replaced, the same by the same; what a report is about stays."""

from __future__ import annotations

from typing import Any

import pytest

from splicer.doctor.veil import Veil


def test_names_are_replaced_by_the_same_word() -> None:
    veil = Veil()
    covered = veil.cover(
        {
            "flows": [
                {"client": {"container": "shop-web-1", "pid": 7}, "local": "10.0.0.1:80", "state": "spliced"},
                {"client": {"container": "shop-db-1"}, "remote": "10.0.0.1:81", "reason": "cold"},
                {"server": {"service": "shop-web-1", "command": "psql --password=x"}},
            ]
        }
    )
    assert covered == {
        "flows": [
            {"client": {"container": "container-1", "pid": 7}, "local": "address-1:80", "state": "spliced"},
            {"client": {"container": "container-2"}, "remote": "address-1:81", "reason": "cold"},
            {"server": {"service": "container-1", "command": "command-1"}},
        ]
    }


def test_a_key_that_nobody_thought_of_is_replaced() -> None:
    assert Veil().cover({"whatever": "secret", "more_of_it": ["secret", "other"], "n": 3, "x": None}) == {
        "whatever": "whatever-1",
        "more_of_it": ["whatever-1", "more_of_it-1"],
        "n": 3,
        "x": None,
    }


def test_whatever_holds_it() -> None:
    """A tuple is a list in JSON."""
    assert Veil().cover({"more": ("at /home/anna",), "x": [["secret"]]}) == {
        "more": ["at path-1"],
        "x": [["x-1"]],
    }


def test_keys_that_are_somebodys() -> None:
    covered = Veil().cover({"labels": {"com.customer.name": "x", "10": 1}, "com.customer.id": ["y"]})
    assert "customer" not in str(covered)
    assert covered["labels"]["10"] == 1


@pytest.mark.parametrize(
    ("text", "covered"),
    [
        ("10.1.2.3:80 and 10.1.2.3", "address-1:80 and address-1"),
        ("[fd00::1]:80", "[address-1]:80"),
        ("::ffff:10.0.0.1", "::ffff:address-1"),
        ("127.0.0.1:80 [::1]:80 0.0.0.0", "127.0.0.1:80 [::1]:80 0.0.0.0"),
        ("at 10:02:11", "at 10:02:11"),
        ("Linux 6.12.75", "Linux 6.12.75"),
        ("/home/anna/x and /home/anna/x", "path-1 and path-1"),
        (
            "/proc/1/ns /run/splicer/control.sock /sys/fs/cgroup",
            "/proc/1/ns /run/splicer/control.sock /sys/fs/cgroup",
        ),
        ("/sys/fs/cgroup/system.slice/anna.service", "path-1"),
    ],
)
def test_sentences(text: str, covered: str) -> None:
    assert Veil().cover({"text": text}) == {"text": covered}


def test_names_in_sentences() -> None:
    """As soon as they were seen as names, once each, and not within other words."""
    veil = Veil()
    veil.cover({"container": "web", "service": "container", "process": "sh"})
    said: Any = veil.cover({"why": "web of container is not webby, sh"})
    assert said == {"why": "container-1 of service-1 is not webby, sh"}
