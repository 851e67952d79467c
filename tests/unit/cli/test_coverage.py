# SPDX-License-Identifier: Apache-2.0
"""`status` leads with the share that is redirected, and `advise` says what would make it more."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from splicer.cli import advise, coverage, status
from splicer.daemon.control import Server
from splicer.model import Coverage, Owner, PlainTraffic
from splicer.policy import advice
from splicer.policy.advice import Facts
from splicer.text import Palette

from ..conftest import Invoke, Log

GIB = 1 << 30
NOW = time.mktime((2026, 11, 29, 12, 0, 0, 0, 0, -1))
SINCE = time.mktime((2026, 11, 29, 10, 2, 0, 0, 0, -1))
PHP = Owner(container="shop-a-long-name-for-an-application-1", service="php-fpm")
DB = Owner(container="shop-mariadb-1", service="mariadb", project="shop")
LOCAL = Owner(process="redis-server", cgroup="/system.slice/redis.service")


def row(server: Owner, reason: str, share: float) -> PlainTraffic:
    return PlainTraffic(PHP, server, reason, 3, int(share * 30 * GIB), share)


PLAIN = Coverage(
    SINCE,
    24 * GIB,
    6 * GIB,
    (
        row(DB, "blocking_reader", 0.12),
        row(LOCAL, "cold", 0.05),
        row(Owner(), "", 0.004),
        row(DB, "control_messages", 0.001),
    ),
    others_bytes=1 << 20,
)
NOTHING = Coverage(SINCE, 0, 0)
FACTS = Facts("on", "allow", 65536, 16)


@pytest.fixture(autouse=True)
def _one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "describe_time", lambda since: "10:02" if since == SINCE else "?")


def answer(found: Coverage, facts: Facts = FACTS) -> dict[str, Any]:
    return {
        "schema": 1,
        "coverage": found.to_json() | {"plain": [each.to_json() for each in found.plain]},
        "advice": [each.to_json() for each in advice.find(found, facts)],
    }


def test_headline() -> None:
    said = coverage.headline(answer(PLAIN)["coverage"])
    assert said == "80 % of local TCP bytes are redirected (24.0 of 30.0 GiB since 10:02)."
    assert coverage.headline(answer(NOTHING)["coverage"]) == "No local TCP bytes yet (since 10:02)."
    assert coverage.headline({}) == ""
    small = answer(Coverage(SINCE, 1023, 29 * GIB))["coverage"]
    assert (
        coverage.headline(small) == "<1 % of local TCP bytes are redirected (1023 B of 29.0 GiB since 10:02)."
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0 %"), (0.001, "<1 %"), (0.5, "50 %"), (0.994, "99 %"), (0.999, ">99 %"), (1.0, "100 %")],
)
def test_neither_all_nor_nothing_unless_it_is(share: float, words: str) -> None:
    assert coverage.describe_share(share) == words


def test_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert coverage.describe_time(SINCE, NOW) == "10:02"
    assert coverage.describe_time(SINCE, NOW + 86400) == "29 Nov"


def test_what_is_not_counted() -> None:
    assert coverage.list_notes(answer(PLAIN)["coverage"]) == []
    some = Coverage(SINCE, 1, 1, is_complete=False, older_uncounted=2)
    assert coverage.list_notes(answer(some)["coverage"]) == [
        "Plain connections that are open count when they close.",
        "Not counted: 2 connections older than splicer.",
    ]
    unknown = Coverage(SINCE, 1, 1, older_uncounted=None)
    assert coverage.list_notes(answer(unknown)["coverage"]) == [
        "Connections older than splicer are not counted."
    ]


def test_status_leads_with_it() -> None:
    lines = status.render(answer(PLAIN), width=80)
    assert lines[1] == "80 % of local TCP bytes are redirected (24.0 of 30.0 GiB since 10:02)."
    assert [line.split()[:3] for line in lines[3:8]] == [
        ["PLAIN", "CLIENT", "SERVER"],
        ["12", "%", "shop..cation-1"],
        ["5", "%", "shop..cation-1"],
        ["<1", "%", "shop..cation-1"],
        ["<1", "%", "shop..cation-1"],
    ]
    assert lines[4].endswith("shop-mariadb-1  blocking_reader   splicer advise")
    assert lines[6].endswith("?               -                 nothing: spliced by now")
    assert lines[8] == "and 1.00 MiB in smaller rows: splicer status --json"
    assert all(len(line) <= 80 for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert "\x1b[" in status.render(answer(PLAIN), palette=Palette(True))[1]
    wide = status.render(answer(PLAIN), width=None)
    assert wide[4].split()[:5] == ["12", "%", "3.60", "GiB", "shop-a-long-name-for-an-application-1"]


def test_status_of_a_daemon_that_does_not_say() -> None:
    assert status.render({"schema": 1})[1] == ""


@pytest.fixture
def asked(log: Log, run_dir: str) -> Iterator[list[Mapping[str, Any]]]:
    requests: list[Mapping[str, Any]] = []

    def tell(request: Mapping[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return answer(PLAIN)

    with Server(run_dir, {"status": tell, "advise": tell}, log, allowed_uid=os.getuid()):
        yield requests


def test_it_is_measured_when_it_is_shown(
    asked: list[Mapping[str, Any]], invoke: Invoke, run_dir: str
) -> None:
    """And not for a health check."""
    for form in ((), ("--json",), ("--brief",)):
        assert invoke("status", *form, "--run-dir", run_dir).code == 0
    assert [request.get("coverage") for request in asked] == [True, True, None]


@pytest.mark.usefixtures("asked")
def test_advise(invoke: Invoke, run_dir: str) -> None:
    outcome = invoke("advise", "--run-dir", run_dir)
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[:3] == [
        "80 % of local TCP bytes are redirected (24.0 of 30.0 GiB since 10:02).",
        "",
        "12 % (3.60 GiB)  shop-a-long-name-for-an-application-1 -> shop-mariadb-1:",
    ]
    at = lines.index("  # /etc/splicer.toml")
    assert lines[at + 1 : at + 4] == ["  [[policy]]", '  service = "mariadb"', '  blocking = "allow"']
    assert any(line.startswith("  Risk: a blocking recv may return EAGAIN") for line in lines)
    assert all(len(line) <= 80 for line in lines) and "\x1b" not in outcome.stdout
    assert invoke("advise", "--json", "--run-dir", run_dir).json()["advice"] == answer(PLAIN)["advice"]
    coloured = invoke("advise", "--color", "always", "--run-dir", run_dir, environ={"NO_COLOR": "1"})
    assert "\x1b[" in coloured.stdout


def test_nothing_to_advise() -> None:
    assert advise.render(answer(NOTHING))[-1] == "Nothing to advise: nothing was sent yet."
    assert advise.render(answer(Coverage(SINCE, 5, 0)))[-1] == "Nothing to advise: all of it is redirected."
    stream = Coverage(SINCE, 5, 5, (row(DB, "stream", 0.5),))
    assert advise.render(answer(stream))[-1] == "Nothing to advise: no setting would change much."


def test_compose_lines_and_who_says_so() -> None:
    off = Coverage(SINCE, 0, 5, (row(DB, "policy_off", 1.0),))
    lines = advise.render(answer(off, Facts("off", "allow", 65536, 16)))
    at = lines.index("  # docker-compose.yml")
    assert lines[at + 1 :] == [
        "  services:",
        "    mariadb:",
        "      labels:",
        '        splicer.enable: "true"',
    ]
    assert "  Who says so: splicer policy shop-mariadb-1" in advise.render(answer(off))


def test_advise_without_a_daemon(invoke: Invoke, run_dir: str) -> None:
    outcome = invoke("advise", "--run-dir", run_dir)
    assert outcome.code == 3
    assert outcome.stderr.startswith("splicer: not running")
