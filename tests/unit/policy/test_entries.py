# SPDX-License-Identifier: Apache-2.0
"""Policy by hand: what is compiled, which hints there are, what changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from splicer.model import Container
from splicer.policy.entries import (
    CGROUP,
    NETNS,
    Compiled,
    Entry,
    Key,
    compile_policy,
    find_changes,
)
from splicer.policy.precedence import RANK_LABELS, RANK_OVERRIDE, RANK_RULES, Host, find_cgroup, is_about
from splicer.policy.rules import Rule

ROOT = "/sys/fs/cgroup"
HOST = Host("adaptive", "on", "refuse")
OFF, ADAPTIVE, EAGER = 0, 1, 2


def container(name: str, number: int, labels: Mapping[str, str] | None = None, **changes: Any) -> Container:
    values: dict[str, Any] = {
        "id": f"{number:064x}",
        "name": name,
        "image": "nginx:1.25",
        "labels": labels or {},
        "pid": 1000 + number,
        "cgroup": f"{ROOT}/docker/{number:064x}",
        "cgroup_id": 100 + number,
        "netns": 5000 + number,
        "network_mode": "bridge",
        "addresses": (f"172.17.0.{number}",),
        "published": (),
    }
    return Container(**(values | changes))


def compiled(
    containers: Sequence[Container] = (),
    rules: Sequence[Rule] = (),
    overrides: Mapping[str, str] | None = None,
    host: Host = HOST,
    cgroup_ids: Mapping[str, int] | None = None,
) -> Compiled:
    return compile_policy(host, rules, containers, overrides or {}, cgroup_ids or {}, root=ROOT)


def test_nothing_said_is_nothing_compiled() -> None:
    assert compiled([container("a", 1)]) == Compiled({}, {}, HOST)


def test_labels_with_ports() -> None:
    web = container("web", 1, {"splicer.ports": "80"})
    assert compiled([web], host=Host("eager", "off", "refuse")).entries == {
        Key(CGROUP, 101, 80): Entry(EAGER, RANK_LABELS, 0, 0),
        Key(CGROUP, 101, 0): Entry(OFF, RANK_LABELS, 0, 0),
        Key(NETNS, 5001, 80): Entry(EAGER, RANK_LABELS, 0, 0),
    }
    quiet = container("quiet", 2, {"splicer.mode": "off", "splicer.ports": "80"})
    assert compiled([quiet]).entries == {Key(CGROUP, 102, 80): Entry(OFF, RANK_LABELS, 0, 0)}


def test_an_override_beats_labels_on_all_ports() -> None:
    web = container("web", 1, {"splicer.ports": "80"})
    policy = compiled([web], overrides={"gone": "eager", "web": "off"})
    assert policy.entries == {
        Key(CGROUP, 101, 80): Entry(ADAPTIVE, RANK_LABELS, 0, 0),
        Key(CGROUP, 101, 0): Entry(OFF, RANK_OVERRIDE, 0, 0),
    }


def test_a_bad_label_leaves_the_container_alone_until_it_is_overridden() -> None:
    web = container("web", 1, {"splicer.enable": "yes", "splicer.ports": "80"})
    assert compiled([web]).entries == {Key(CGROUP, 101, 0): Entry(OFF, RANK_LABELS, 0, 0)}
    assert compiled([web], overrides={"web": "adaptive"}).entries[Key(CGROUP, 101, 0)].mode == ADAPTIVE


def test_each_value_has_the_first_rule_that_says_something_about_it() -> None:
    rules = [
        Rule(container="web", blocking="allow", number=1),
        Rule(image="nginx:*", mode="off", number=2),
        Rule(container="*", mode="eager", blocking="refuse", ports=(80,), number=3),
    ]
    assert compiled([container("web", 1)], rules).entries == {
        Key(CGROUP, 101, 0): Entry(OFF, RANK_RULES + 1, 1, RANK_RULES),
        Key(CGROUP, 101, 80): Entry(EAGER, RANK_RULES + 2, 0, RANK_RULES + 2),
    }


def test_networks_in_networks() -> None:
    rules = [
        Rule(cidr="10.1.0.0/16", mode="eager", ports=(80,), number=1),
        Rule(cidr="10.0.0.0/8", mode="off", number=2),
        Rule(cidr="10.1.2.3", blocking="allow", number=3),
        Rule(cidr="::/0", mode="adaptive", number=4),
    ]
    policy = compiled((), rules)
    names = {str(network): number for network, number in policy.networks.items()}
    assert set(names) == {
        "::ffff:a01:0/112",
        "::ffff:a00:0/104",
        "::ffff:a01:203/128",
        "::/0",
        "::ffff:0:0/96",
    }
    by_number = {
        name: {key.port: entry for key, entry in policy.entries.items() if key.who == number}
        for name, number in names.items()
    }
    assert by_number == {
        "::ffff:a00:0/104": {0: Entry(OFF, RANK_RULES + 1, 0, 0)},
        "::ffff:a01:0/112": {0: Entry(OFF, RANK_RULES + 1, 0, 0), 80: Entry(EAGER, RANK_RULES, 0, 0)},
        "::ffff:a01:203/128": {
            0: Entry(OFF, RANK_RULES + 1, 1, RANK_RULES + 2),
            80: Entry(EAGER, RANK_RULES, 0, 0),
        },
        "::/0": {0: Entry(ADAPTIVE, RANK_RULES + 3, 0, 0)},
        "::ffff:0:0/96": {},
    }


def test_containers_that_cannot_be_reached_and_cgroups_that_are_not_there() -> None:
    lost = container("lost", 1, {"splicer.mode": "eager"}, cgroup_id=0, cgroup="")
    rules = [Rule(cgroup="gone.slice", mode="off"), Rule(cgroup="here.slice", mode="off", number=2)]
    assert compiled([lost], rules, {"lost": "off"}, cgroup_ids={"here.slice": 9}).entries == {
        Key(CGROUP, 9, 0): Entry(OFF, RANK_RULES + 1, 0, 0)
    }


class TestEager:
    def hints(
        self, *containers: Container, rules: Sequence[Rule] = (), **keywords: Any
    ) -> set[tuple[int, int]]:
        policy = compiled(containers, rules, **keywords)
        found = {key: entry for key, entry in policy.entries.items() if key.kind == NETNS}
        assert all(entry.mode == EAGER and entry.mode_rank for entry in found.values())
        return {(key.who, key.port) for key in found}

    def test_alone(self) -> None:
        assert self.hints(container("a", 1, {"splicer.mode": "eager"})) == {(5001, 0)}
        assert self.hints(container("a", 1), overrides={"a": "eager"}) == {(5001, 0)}
        assert self.hints(container("a", 1), rules=[Rule(image="nginx:*", mode="eager", ports=(80, 81))]) == {
            (5001, 80),
            (5001, 81),
        }

    def test_by_cgroup_or_address_of_a_container_alone(self) -> None:
        assert self.hints(container("a", 1), rules=[Rule(cgroup="docker", mode="eager")]) == {(5001, 0)}
        assert self.hints(container("a", 1), rules=[Rule(cidr="172.16.0.0/12", mode="eager")]) == {(5001, 0)}

    @pytest.mark.parametrize("changes", [{"network_mode": "host"}, {"network_mode": "ns:/run/netns/x"}, {}])
    def test_a_shared_namespace(self, changes: dict[str, Any]) -> None:
        others = () if changes else (container("b", 2, netns=5001, network_mode="container:1"),)
        assert self.hints(container("a", 1, {"splicer.mode": "eager"}, **changes), *others) == set()
        named = container("a", 1, {"splicer.mode": "eager", "splicer.ports": "80-81"}, **changes)
        assert self.hints(named, *others) == {(5001, 80), (5001, 81)}

    def test_ports_that_are_named_in_vain(self) -> None:
        rules = [
            Rule(container="a", mode="off", ports=(80,), number=1),
            Rule(image="*", mode="eager", ports=(80, 81), number=2),
        ]
        assert self.hints(container("a", 1), rules=rules) == {(5001, 81)}
        assert self.hints(container("a", 1, {"splicer.mode": "adaptive"}), rules=rules) == set()

    def test_who_is_not_there(self) -> None:
        assert self.hints(container("a", 1, {"splicer.mode": "eager"}, netns=0)) == set()
        assert self.hints(container("a", 1, {"splicer.mode": "eager"}, cgroup_id=0)) == set()
        strangers = [container(name, n, {"splicer.mode": "eager"}, netns=0) for n, name in enumerate("ab")]
        assert self.hints(*strangers) == set()

    def test_ports_alone_need_no_hint(self) -> None:
        assert self.hints(container("a", 1), rules=[Rule(ports=(80,), mode="eager")]) == set()

    @pytest.mark.parametrize(
        ("mode", "default", "rule", "eager"),
        [
            ("eager", "on", None, True),
            ("eager", "off", None, False),
            ("adaptive", "on", None, False),
            ("adaptive", "off", "eager", True),
            ("adaptive", "on", "off", False),
        ],
    )
    def test_has_eager(self, mode: str, default: str, rule: str | None, eager: bool) -> None:
        rules = [Rule(ports=(80,), mode=rule)] if rule else []
        assert compiled((), rules, host=Host(mode, default, "refuse")).has_eager is eager


def test_changes() -> None:
    changes = find_changes({"same": 1, "new": 2, "other": 3}, {"same": 1, "other": 4, "old": 5})
    assert changes.put == {"new": 2, "other": 3}
    assert changes.delete == {"old"}
    assert not find_changes({}, {}).put


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("system.slice", "/v2/system.slice"),
        ("system.slice/a.service/", "/v2/system.slice/a.service"),
        ("/docker", "/v2/docker"),
        ("/v2/docker", "/v2/docker"),
        ("/v2x/docker", "/v2/v2x/docker"),
    ],
)
def test_find_cgroup(text: str, path: str) -> None:
    assert find_cgroup(text, "/v2") == path
    assert find_cgroup(text, "/v2/") == path


@pytest.mark.parametrize(
    ("rule", "about"),
    [
        (Rule(container="web"), True),
        (Rule(container="We?"), False),
        (Rule(container="w*", image="redis*"), False),
        (Rule(service="*"), False),
        (Rule(project="*"), False),
        (Rule(cgroup="docker"), True),
        (Rule(cgroup=f"docker/{1:064x}"), True),
        (Rule(cgroup="dock"), False),
        (Rule(cidr="172.17.0.1"), True),
        (Rule(cidr="::/0"), False),
        (Rule(ports=(80,)), True),
    ],
)
def test_is_about(rule: Rule, about: bool) -> None:
    assert is_about(rule, container("web", 1)) is about
