# SPDX-License-Identifier: Apache-2.0
"""Policy from the configuration file, on living connections: by cgroup, address and port, at run time."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import pauses
from support.cgroup import find_v2_root
from support.daemon import wait_until
from support.host import Host
from support.lab import Lab
from support.load import Load
from support.pauses import Stopwatch
from support.players import Pair

FLIP = 2.0  # seconds that a change of policy may take to reach a living connection
_ports = itertools.count(7300)


@pytest.fixture(scope="module")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    with Host(services="") as made:
        yield made


@pytest.fixture
def host(host: Host) -> Iterator[Host]:
    yield host
    host.reload("")


def table(**entries: Any) -> str:
    """A `[[policy]]` table; text is quoted as JSON, which is TOML here."""
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in entries.items()]
    return "\n".join(["[[policy]]", *lines]) + "\n"


def below_root(host: Host, *names: str) -> str:
    """The path of a cgroup below the test's own, as the configuration names it."""
    root = find_v2_root()
    assert root is not None
    return str(host.cgroup.path.joinpath(*names).relative_to(root))


def stays(host: Host, pair: Pair, state: str, reason: str | None = None, seconds: float = 0.5) -> None:
    with Stopwatch() as watch:
        while watch.seconds < seconds:
            pair.pingpong(40)
            flow = host.flow(pair)
            assert flow["state"] == state, flow
            assert reason in (None, flow["reason"]), flow


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("depth", [(), ("inner",), ("inner", "most")], ids=["itself", "child", "grandchild"])
def test_a_cgroup_is_switched_off_and_on(host: Host, lab: Lab, end: str, depth: tuple[str, ...]) -> None:
    """Off drains the living connections of the cgroup, at whichever end and however deep below it, and no
    other; on adopts them again. Both within two seconds, with no byte lost."""
    web = host.cgroup.child("web")
    inside = web
    for name in depth:
        inside = inside.child(name)
    other = host.cgroup.child("other")
    ours = (inside, other) if end == "client" else (other, inside)
    client, server = (host.peer(lab, name, cgroup=cgroup) for name, cgroup in zip("ab", ours, strict=True))
    pair = host.connect(client, server, lab.address("b"))
    bystander = host.connect(
        host.peer(lab, "a", cgroup=other), host.peer(lab, "b", cgroup=other), lab.address("b")
    )
    host.make_hot(pair)
    host.make_hot(bystander)
    drained = host.daemon.totals()["drained"]
    seen = host.flow(bystander)

    host.reload(table(cgroup=below_root(host, "web"), mode="off"))
    flow = host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    messages = flow["redirected_messages"]
    stays(host, pair, "paired", "policy_off")
    after = host.flow(pair)
    assert after["redirected_messages"] == messages, "something was redirected while it was off"
    bystander.pingpong(50)
    now = host.flow(bystander)
    assert now["state"] == "spliced"
    assert now["redirected_messages"] - seen["redirected_messages"] == 100, "the bystander was touched"
    assert host.daemon.totals()["drained"] == drained + 1

    host.reload("")
    host.talk_until(pair, "spliced", timeout=FLIP)
    pair.verify()
    bystander.verify()


def test_a_new_connection_of_a_cgroup_that_is_off(host: Host, lab: Lab) -> None:
    """A connection made while its cgroup is off is known, has the reason, and is never in the SOCKHASH; it
    is adopted when the cgroup is switched on."""
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    host.reload(table(cgroup=below_root(host, "web"), mode="off"))
    web = host.cgroup.child("web")
    pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b", cgroup=web), lab.address("b"))
    for _ in range(10):
        pair.pingpong(40)
        assert host.count_spliced() == 0
    stays(host, pair, "paired", "policy_off", 0.2)
    host.reload("")
    host.talk_until(pair, "spliced", timeout=FLIP)
    pair.verify()


def test_a_cgroup_that_is_made_later_and_anew(host: Host, lab: Lab) -> None:
    """A rule may name a cgroup that is not there yet, or is removed and made again, as a service's is."""
    host.reload(table(cgroup=below_root(host, "late"), mode="off"))
    for _ in range(2):
        late = host.cgroup.child("late")
        pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b", cgroup=late), lab.address("b"))
        pauses.sleep(1.5)  # the daemon looks once a second
        pair.pingpong(100)
        stays(host, pair, "paired", "policy_off")
        pair.verify()
        host.stop_peers()
        late.remove()


@pytest.mark.parametrize(
    ("family", "cidr", "state"),
    [
        (4, "10.77.0.2", "paired"),
        (4, "10.77.0.0/24", "paired"),
        (4, "10.78.0.0/16", "spliced"),
        (4, "0.0.0.0/0", "paired"),
        (4, "::/0", "spliced"),
        (6, "fd77::/64", "paired"),
        (6, "fd77::2/128", "paired"),
        (6, "fd78::/64", "spliced"),
        (6, "0.0.0.0/0", "spliced"),
    ],
)
def test_a_network_is_switched_off_and_on(host: Host, lab: Lab, family: int, cidr: str, state: str) -> None:
    """A rule by address, for either protocol and either end, reaches living connections and those only."""
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    pair = host.connect(
        host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b", family), client_family=kind
    )
    host.make_hot(pair)
    host.reload(table(cidr=cidr, mode="off"))
    if state == "paired":
        host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
        host.reload("")
        host.talk_until(pair, "spliced", timeout=FLIP)
    else:
        stays(host, pair, "spliced")
    pair.verify()


def test_a_network_within_a_network(host: Host, lab: Lab) -> None:
    """The first rule that matches wins, whichever network is the larger one."""
    pair = host.hot_pair(lab)
    wide, narrow = "10.0.0.0/8", "10.77.0.0/16"
    host.reload(table(cidr=wide, mode="off") + table(cidr=narrow, mode="adaptive"))
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    host.reload(table(cidr=narrow, mode="adaptive") + table(cidr=wide, mode="off"))
    host.talk_until(pair, "spliced", timeout=FLIP)
    pair.verify()


def test_a_port_is_switched_off_and_on(host: Host, lab: Lab) -> None:
    """A rule by port is about the server's own port, and no other."""
    port, other_port = next(_ports), next(_ports)
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pair, other = (host.connect(client, server, lab.address("b"), port=each) for each in (port, other_port))
    host.make_hot(pair)
    host.make_hot(other)
    host.reload(table(ports=port, mode="off"))
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    stays(host, other, "spliced", seconds=0.2)
    client_port = other.client.local[1]
    host.reload(table(ports=client_port, mode="off"))
    host.talk_until(pair, "spliced", timeout=FLIP)
    stays(host, other, "spliced")
    for each in (pair, other):
        each.verify()


def test_off_wins_over_the_other_end(host: Host, lab: Lab) -> None:
    """An end that is off keeps a connection plain, although the other end's rule comes first and says yes."""
    web, app = host.cgroup.child("web"), host.cgroup.child("app")
    pair = host.connect(host.peer(lab, "a", cgroup=app), host.peer(lab, "b", cgroup=web), lab.address("b"))
    host.make_hot(pair)
    web_on = table(cgroup=below_root(host, "web"), mode="adaptive")
    app_off = table(cgroup=below_root(host, "app"), mode="off")
    for rules in (web_on + app_off, app_off + web_on):
        host.reload(rules)
        host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
        host.reload("")
        host.talk_until(pair, "spliced", timeout=FLIP)
    pair.verify()


@pytest.mark.parametrize("end", ["client", "server"])
def test_only_what_is_switched_on(host: Host, lab: Lab, end: str) -> None:
    """With `default = "off"` a rule for either end splices its connections, living ones too, and no other."""
    web = host.cgroup.child("web")
    inside = [web if end == "client" else None, web if end == "server" else None]
    client, server = (host.peer(lab, name, cgroup=cgroup) for name, cgroup in zip("ab", inside, strict=True))
    pair = host.connect(client, server, lab.address("b"))
    other = host.hot_pair(lab)
    host.reload('default = "off"\n')
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    host.talk_until(other, "paired", "policy_off", timeout=FLIP)
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    assert host.daemon.status()["default"] == "off"
    host.reload('default = "off"\n' + table(cgroup=below_root(host, "web"), mode="adaptive"))
    host.talk_until(pair, "spliced", timeout=FLIP)
    stays(host, other, "paired", "policy_off", 0.3)
    assert host.count_spliced() == 2
    host.reload("")
    host.talk_until(other, "spliced", timeout=FLIP)
    for each in (pair, other):
        each.verify()


def test_blocking_readers_are_allowed_and_refused(host: Host, lab: Lab) -> None:
    """`blocking` is a policy of its own: allowed at run time it adopts, refused again it drains."""
    port = next(_ports)
    pair = host.pair(lab, port=port, blocking=(True, True))
    pair.pingpong(100)
    host.wait_flow(pair, "paired", "blocking_reader")
    host.reload(table(ports=port, blocking="allow"))
    host.talk_until(pair, "spliced", timeout=FLIP)
    host.reload("")
    host.talk_until(pair, "paired", "blocking_reader", timeout=FLIP)


def test_eager_at_run_time(host: Host, lab: Lab) -> None:
    """A port that becomes eager has its next connections spliced before they have said anything."""
    port = next(_ports)
    host.reload(table(ports=port, mode="eager"))
    pair = host.pair(lab, port=port)
    assert host.find_flow(pair)["state"] == "spliced"  # type: ignore[index]
    host.reload(table(ports=port, mode="off"))
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    pair.verify()


def test_eager_and_off_at_the_client(host: Host, lab: Lab) -> None:
    """An eager service does not draw in a client that is off: not for a moment."""
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    port, app = next(_ports), host.cgroup.child("app")
    host.reload(table(ports=port, mode="eager") + table(cgroup=below_root(host, "app"), mode="off"))
    pair = host.connect(host.peer(lab, "a", cgroup=app), host.peer(lab, "b"), lab.address("b"), port=port)
    assert host.count_spliced() == 0
    stays(host, pair, "paired", "policy_off", 0.2)
    assert host.count_spliced() == 0
    pair.verify()


def test_switched_to_and_fro_under_load(host: Host, lab: Lab) -> None:
    """Policies that change ten times a second under load lose and reorder nothing."""
    rules = itertools.cycle([table(cidr="10.77.0.0/16", mode="off"), ""])
    load = Load(host, lab)
    for rule in itertools.islice(rules, 30):
        host.reload(rule)
        time.sleep(0.1)
    load.finish()


@pytest.mark.parametrize(
    "wrong",
    ["[[policy]]\nmode = 'off'\n", "[[policy]]\nports = 0\nmode = 'off'\n", "mode = 'sometimes'\n", "= ="],
)
def test_a_mistake_in_the_file_changes_nothing(host: Host, lab: Lab, wrong: str) -> None:
    """What cannot be read is refused with a message in the log; the policy in force stays."""
    port = next(_ports)
    pair = host.pair(lab, port=port)
    host.reload(table(ports=port, mode="off"))
    host.reload(wrong)
    assert "reload_failed" in host.daemon.tail(3)
    stays(host, pair, "paired", "policy_off", 0.3)
    assert host.daemon.alive


def test_a_setting_that_needs_a_restart_is_named(host: Host) -> None:
    """Settings that cannot change while it runs are named in the log and left as they are."""
    host.reload("max_connections = 1000\n")
    assert '"restart_needed"' in host.daemon.tail(3)
    assert "max_connections" in host.daemon.tail(3)


def test_a_taken_over_generation_gets_the_policy_of_its_new_daemon(lab: Lab) -> None:
    """Rules that changed while no daemon ran reach the connections that were spliced all the time."""
    with Host(services="") as host:
        port = next(_ports)
        pair = host.hot_pair(lab, port=port)
        host.daemon.kill()
        host.config.write_text(table(ports=port, mode="off"))
        pair.pingpong(20)
        host.start()
        host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
        pair.verify()
