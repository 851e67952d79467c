# SPDX-License-Identifier: Apache-2.0
"""Every reason has an answer to what would change it, and what is to be pasted can be read."""

from __future__ import annotations

import tomllib

import pytest

from splicer.model import REASON_NAMES, Coverage, Owner, PlainTraffic
from splicer.policy import advice
from splicer.policy.advice import REMEDIES, Facts
from splicer.policy.config import VALUE_TYPES
from splicer.policy.rules import read_rules

FACTS = Facts(default="on", tcp_inq="allow", max_connections=65536, hot_reads=16)
DB = Owner(container="shop-db-1", service="db", project="shop", cgroup="/docker/1")
APP = Owner(container="app", cgroup="/docker/2")
REDIS = Owner(process="redis-server", cgroup='/system.slice/re"dis\\x2d.service')


def cover(*rows: tuple[Owner, Owner, str, int], redirected: int = 0) -> Coverage:
    plain = sum(size for *_, size in rows)
    everything = plain + redirected
    return Coverage(
        0.0,
        redirected,
        plain,
        tuple(PlainTraffic(*parties, 1, size, size / everything) for *parties, size in rows),  # type: ignore[arg-type]
    )


def test_every_reason_has_a_remedy() -> None:
    assert set(REMEDIES) == set(REASON_NAMES)
    assert all(0 < len(remedy.hint) <= 26 for remedy in REMEDIES.values()), "it has to fit a column"


@pytest.mark.parametrize("default", ["on", "off"])
@pytest.mark.parametrize(
    "server", [DB, APP, REDIS, Owner()], ids=["service", "container", "cgroup", "unknown"]
)
@pytest.mark.parametrize("reason", REASON_NAMES)
def test_what_is_pasted_can_be_read(reason: str, server: Owner, default: str) -> None:
    """And is about this server."""
    facts = Facts(default, "refuse", 65536, 16)
    for found in advice.find(cover((APP, server, reason, 1000)), facts):
        assert (found.client, found.server, found.reason) == (APP, server, reason)
        assert found.what.endswith(".") and (found.risk or not found.toml)
        said = tomllib.loads(found.toml)
        assert set(said) <= {"policy", *VALUE_TYPES}
        for rule in read_rules(said.get("policy", []), "x"):
            wanted = {"service": server.service} if server.service else {"container": server.container}
            wanted = wanted if any(wanted.values()) else {"cgroup": server.cgroup.strip("/")}
            assert rule.selectors == wanted


def test_a_reader_that_blocks() -> None:
    (found,) = advice.find(cover((APP, DB, "blocking_reader", 1000)), FACTS)
    assert found.toml == '[[policy]]\nservice = "db"\nblocking = "allow"'
    assert "EAGAIN" in found.risk


def test_what_is_off_by_default_is_switched_on() -> None:
    facts = Facts("off", "allow", 65536, 16)
    (found,) = advice.find(cover((APP, DB, "policy_off", 1000)), facts)
    assert found.toml == '[[policy]]\nservice = "db"\nmode = "adaptive"'
    assert found.compose == 'services:\n  db:\n    labels:\n      splicer.enable: "true"'
    assert not found.command


def test_what_somebody_has_switched_off() -> None:
    """Who has, knows why."""
    (found,) = advice.find(cover((APP, DB, "policy_off", 1000)), FACTS)
    assert (found.command, found.toml, found.compose) == ("splicer policy shop-db-1", "", "")


@pytest.mark.parametrize("reason", ["", "stream", "spinning_reader", "pending", "closing", "from_the_future"])
def test_nothing_is_to_be_gained(reason: str) -> None:
    assert advice.find(cover((APP, DB, reason, 1000)), FACTS) == []


def test_little_is_not_worth_a_word() -> None:
    coverage = cover((APP, DB, "blocking_reader", 99), (APP, APP, "blocking_reader", 101), redirected=9800)
    assert [found.server for found in advice.find(coverage, FACTS)] == [APP]


def test_bounds() -> None:
    full = cover((APP, DB, "map_full", 1000))
    assert advice.find(full, FACTS)[0].toml == "max_connections = 131072"
    assert advice.find(full, Facts("on", "allow", 1_000_000, 16))[0].toml == "max_connections = 1048576"
    assert not advice.find(full, Facts("on", "allow", 1_048_576, 16))[0].toml
    cold = cover((APP, DB, "cold", 1000))
    assert advice.find(cold, FACTS)[0].toml == "hot_reads = 4"
    assert not advice.find(cold, Facts("on", "allow", 65536, 4))[0].toml


@pytest.mark.parametrize("service", ["x" * 1000, "a\nb: c", "\x1b[2J", "a b"])
def test_names_that_nobody_wants_to_paste(service: str) -> None:
    """Whoever starts a container may write anything into its labels."""
    server = Owner(container="web-1", service=service, cgroup="/docker/1")
    (found,) = advice.find(cover((APP, server, "policy_off", 1000)), Facts("off", "allow", 65536, 16))
    assert found.compose == ""
    wanted = f'service = "{service}"' if service == "a b" else 'container = "web-1"'
    assert wanted in found.toml.splitlines()
