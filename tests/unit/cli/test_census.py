# SPDX-License-Identifier: Apache-2.0
"""What `splicer status` says of connections that are older than splicer."""

from __future__ import annotations

import pytest

from splicer.cli.status import describe_census, render, verdict


@pytest.mark.parametrize(
    ("census", "said"),
    [
        ({"state": "off"}, "connections older than splicer are left alone (--no-census)"),
        ({"state": "running"}, "connections older than splicer are being looked for"),
        ({"state": "done", "found": 1}, "1 connection older than splicer found"),
        (
            {"state": "done", "found": 1200, "left": {"outside": 2, "ambiguous": 1}},
            "1200 connections older than splicer found; not followed: 2 with an end outside of the cgroup, "
            "1 whose name a third socket has as well",
        ),
        (
            {"state": "done", "found": 0, "held_up": 1},
            "0 connections older than splicer found; 1 namespace could not be visited",
        ),
        (
            {"state": "done", "found": 0, "left": {"novel": 3}},
            "0 connections older than splicer found; not followed: 3 novel",
        ),
        ({"state": "novel"}, "connections older than splicer novel"),
    ],
)
def test_words(census: dict[str, object], said: str) -> None:
    assert describe_census(census) == said


def test_a_daemon_that_says_nothing_of_it_has_no_line() -> None:
    assert not any("older" in line for line in render({}))


@pytest.mark.parametrize(
    ("census", "said"),
    [
        (
            {"state": "off"},
            "no local connections since it runs; connections older than splicer are left alone",
        ),
        (
            {"state": "running"},
            "no local connections since it runs; connections older than splicer are being",
        ),
        ({"state": "failed"}, "no local connections since it runs; connections older than splicer could not"),
        ({"state": "done", "found": 0}, "no local connections right now."),
        ({"state": "earlier"}, "no local connections right now."),
        ({}, "no local connections right now."),
    ],
)
def test_the_first_line_does_not_deny_them(census: dict[str, object], said: str) -> None:
    assert verdict({"mode": "adaptive", "connections": {}, "census": census}).startswith(f"Running: {said}")
