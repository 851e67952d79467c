# SPDX-License-Identifier: Apache-2.0
"""What holds for one connection, and who says so."""

from __future__ import annotations

from typing import Any

import pytest

from splicer.policy.decision import PAUSE, Book, Party
from splicer.policy.precedence import Host
from splicer.policy.rules import Rule

from .test_entries import container

WEB = container("web", 1, {"splicer.mode": "off"}, cgroup="/sys/fs/cgroup/docker/web")
APP = container("app", 2, cgroup="/sys/fs/cgroup/docker/app")
IN_WEB, IN_APP = Party("/sys/fs/cgroup/docker/web/sub", "10.0.0.2", 20), Party(APP.cgroup, "10.0.0.1", 10)
ON_HOST = Party("/sys/fs/cgroup/system.slice/redis.service", "127.0.0.1", 30)


def book(rules: tuple[Rule, ...] = (), overrides: dict[str, str] | None = None, **changes: Any) -> Book:
    host = changes.pop("host", Host("adaptive", "on", "refuse"))
    return Book(
        host,
        rules,
        overrides or {},
        [WEB, APP],
        {"redis*": frozenset({30}), "nobody": frozenset()},
        **changes,
    )


@pytest.mark.parametrize(
    ("client", "server", "rules", "overrides", "mode", "source"),
    [
        (IN_APP, ON_HOST, (), {}, "adaptive", "default"),
        (IN_APP, IN_WEB, (), {}, "off", "label splicer.mode, of the server"),
        (IN_WEB, IN_APP, (), {}, "off", "label splicer.mode, of the client"),
        (IN_WEB, IN_APP, (), {"web": "eager"}, "eager", "override, of the client"),
        (IN_APP, ON_HOST, (), {"process=redis*": "off"}, "off", "override of process redis*, of the server"),
        (IN_APP, ON_HOST, (), {"process=nobody": "off"}, "adaptive", "default"),
        (IN_APP, ON_HOST, (), {"port=80": "off"}, "off", "override of port 80, of the server"),
        (IN_APP, ON_HOST, (), {"port=81": "off"}, "adaptive", "default"),
        (
            IN_APP,
            ON_HOST,
            (),
            {"address=10.0.0.0/8": "off"},
            "off",
            "override of address 10.0.0.0/8, of the client",
        ),
        (
            IN_APP,
            ON_HOST,
            (),
            {"cgroup=system.slice": "off"},
            "off",
            "override of cgroup system.slice, of the server",
        ),
        (
            IN_APP,
            ON_HOST,
            (),
            {"port=80": "off", "cgroup=system.slice": "eager"},
            "eager",
            "override of cgroup",
        ),
        (
            IN_APP,
            ON_HOST,
            (),
            {"cgroup=system.slice": "eager", "port=80": "off"},
            "off",
            "override of port 80",
        ),
        (IN_APP, ON_HOST, (Rule(ports=(80,), mode="off"),), {}, "off", "[[policy]] 1, of the server"),
        (IN_APP, ON_HOST, (Rule(container="app", mode="off"),), {}, "off", "[[policy]] 1, of the client"),
        (
            IN_APP,
            ON_HOST,
            (Rule(cidr="10.0.0.0/8", mode="off"),),
            {"port=80": "adaptive"},
            "off",
            "of the client",
        ),
        (IN_APP, ON_HOST, (Rule(cidr="::/0", mode="off"),), {}, "adaptive", "default"),
    ],
)
def test_who_decides(
    client: Party,
    server: Party,
    rules: tuple[Rule, ...],
    overrides: dict[str, str],
    mode: str,
    source: str,
) -> None:
    decision = book(rules, overrides).decide(client, server, 80)
    assert decision.mode == mode
    assert source in decision.mode_source


def test_what_is_paused_is_off() -> None:
    decision = book(overrides={"port=80": "eager"}, off_because=PAUSE).decide(IN_APP, ON_HOST, 80)
    assert (decision.mode, decision.mode_source) == ("off", "splicer pause")


def test_each_value_by_itself() -> None:
    rules = (Rule(ports=(80,), blocking="allow", number=1), Rule(container="app", tcp_inq="refuse", number=2))
    decision = book(rules, host=Host("adaptive", "off", "refuse")).decide(IN_APP, ON_HOST, 80)
    assert (decision.mode, decision.blocking, decision.tcp_inq) == ("off", "allow", "refuse")
    assert decision.mode_source == "default"
    assert decision.tcp_inq_source == "[[policy]] 2, of the client"


def test_a_container_in_a_container() -> None:
    inner = container("inner", 3, cgroup="/sys/fs/cgroup/docker/app/docker/inner")
    told = Book(Host("adaptive", "on", "refuse"), (), {}, [APP, inner], {})
    found = told.find_container("/sys/fs/cgroup/docker/app/docker/inner/x")
    assert found is not None
    assert found.name == "inner"
    assert told.find_container("/sys/fs/cgroup/docker/application") is None
