# SPDX-License-Identifier: Apache-2.0
"""A network that is taken away stops what is spliced, as it stops plain TCP; hazard 80."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from support import pauses
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab
from support.players import End, Pair
from support.tiers import spread

from splicer.doctor.prerequisites import CAPABILITIES

GONE = "network_gone"
QUIET = 0.5  # seconds in which nothing arrives
BACK = 30.0  # seconds until TCP has sent again what was lost


@pytest.fixture
def torn(_prerequisites: None) -> Iterator[Lab]:
    """A lab to be taken apart."""
    made = Lab()
    yield made
    made.remove()


def ip(lab: Lab, where: str, *words: str) -> str:
    command = ["ip", "-n", lab.namespace(where), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def is_seen(host: Host, pair: Pair) -> bool:
    flow = host.flow(pair)
    return {flow["netns"], flow["peer_netns"]} <= set(host.daemon.status()["networks"]["namespaces"])


def make_hot(host: Host, *pairs: Pair) -> None:
    """Splice them, and wait until the daemon knows what their networks look like."""
    for pair in pairs:
        host.make_hot(pair)
        wait_until(f"the networks of {pair.label} are seen", lambda pair=pair: is_seen(host, pair))


def read_counts(host: Host, pair: Pair) -> tuple[str, int]:
    flow = host.flow(pair)
    return flow["state"], flow["redirected_messages"]


def check_untouched(host: Host, *pairs: Pair) -> None:
    """They go on, and every message is redirected."""
    for pair in pairs:
        state, before = read_counts(host, pair)
        assert state == "spliced", pair.label
        pair.pingpong(25)
        assert read_counts(host, pair) == ("spliced", before + 50), pair.label
        pair.verify()


class Stalled:
    """A message each way that does not arrive, or does not at the end that is named: who has lost his address
    may still be heard, as with plain TCP."""

    def __init__(self, host: Host, pair: Pair, *ends: End) -> None:
        self._pair = pair
        host.wait_flow(pair, "paired", GONE)
        self._redirected = read_counts(host, pair)[1]
        self._host = host
        self._ends = (pair.client, pair.server)
        for end, text in zip(self._ends, ("question", "answer!!"), strict=True):
            end.say(text)
        for end in self._ends:
            end.begin("hear", count=8, timeout=BACK)
        pauses.sleep(QUIET)
        assert all(end.peer.is_waiting() for end in ends or self._ends), "it does not stall"

    def go_on(self) -> None:
        """Now both arrive, through TCP; and after a while it is spliced again."""
        assert [end.finish(timeout=2 * BACK) for end in self._ends] == ["answer!!", "question"]
        assert read_counts(self._host, self._pair)[1] == self._redirected
        self._pair.verify()
        self._host.make_hot(self._pair, timeout=BACK)
        self._pair.verify()


def begin(host: Host, lab: Lab, family: int = 4, **arguments: Any) -> Pair:
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    return host.connect(client, server, lab.address("b", family), client_family=kind, **arguments)


# Who sets which link down: the end itself, or the host that the other half of its link is in.
LINKS = {"client": ("a", "eth0"), "server": ("b", "eth0"), "client's carrier": ("router", "to-a")}


@pytest.mark.parametrize("whose", spread(LINKS, list(LINKS)[:1], "the same of another link"))
def test_link_down(host: Host, torn: Lab, whose: str) -> None:
    """Nothing arrives until it is up again, then every byte does."""
    where, link = LINKS[whose]
    pair = begin(host, torn)
    make_hot(host, pair)
    ip(torn, where, "link", "set", link, "down")
    stalled = Stalled(host, pair)
    ip(torn, where, "link", "set", link, "up")
    stalled.go_on()


def test_link_down_under_ping_pong(host: Host, torn: Lab) -> None:
    pair = begin(host, torn)
    make_hot(host, pair)
    flow = host.flow(pair)

    def read_flow() -> dict[str, Any]:
        keys = ("local", "remote", "netns")
        [found] = [each for each in host.daemon.flows() if all(each[key] == flow[key] for key in keys)]
        return found

    pair.server.begin("echo", rounds=50_000, timeout=2 * BACK)
    pair.client.begin("pingpong", rounds=50_000, timeout=2 * BACK)
    ip(torn, "a", "link", "set", "eth0", "down")
    wait_until("it is plain", lambda: (read_flow()["state"], read_flow()["reason"]) == ("paired", GONE))
    seen = read_flow()
    pauses.sleep(QUIET)
    assert pair.client.peer.is_waiting() and pair.server.peer.is_waiting()
    now = read_flow()
    assert now["redirected_messages"] == seen["redirected_messages"]
    assert now["passed_messages"] <= seen["passed_messages"] + 1
    ip(torn, "a", "link", "set", "eth0", "up")
    for end in (pair.client, pair.server):
        end.finish(timeout=2 * BACK)
    pair.verify()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("whose", spread(["a", "b"], ["a"], "the same at the other end"))
def test_address_deleted(host: Host, torn: Lab, whose: str, family: int) -> None:
    pair = begin(host, torn, family)
    make_hot(host, pair)
    address = f"{torn.address(whose, family)}/{24 if family == 4 else 64}"
    ip(torn, whose, "addr", "del", address, "dev", "eth0")
    stalled = Stalled(host, pair, pair.client if whose == "a" else pair.server)
    ip(torn, whose, "addr", "add", address, "dev", "eth0", *(["nodad"] if family == 6 else []))
    stalled.go_on()


def test_another_address_deleted(host: Host, torn: Lab) -> None:
    ip(torn, "a", "addr", "add", "10.99.0.1/24", "dev", "eth0")
    pair = begin(host, torn)
    make_hot(host, pair)
    other = begin(host, torn, source=("10.77.0.1", 0))
    make_hot(host, other)
    drained = host.daemon.totals()["drained"]
    ip(torn, "a", "addr", "del", "10.99.0.1/24", "dev", "eth0")
    # What comes later has been seen: so has this.
    ip(torn, "b", "addr", "del", torn.address("b", 6) + "/64", "dev", "eth0")
    pauses.sleep(QUIET)
    check_untouched(host, pair, other)
    assert host.daemon.totals()["drained"] == drained


def test_interface_deleted(host: Host, torn: Lab) -> None:
    """As a container that is disconnected from its network: it comes back with another interface."""
    pair = begin(host, torn)
    make_hot(host, pair)
    mac = json.loads(ip(torn, "a", "-json", "link", "show", "eth0"))[0]["address"]
    ip(torn, "router", "link", "del", "to-a")
    stalled = Stalled(host, pair)
    peer = ["peer", "name", "eth0", "netns", torn.namespace("a"), "address", mac]
    ip(torn, "router", "link", "add", "to-a", "type", "veth", *peer)
    ip(torn, "router", "link", "set", "to-a", "master", "br0", "up")
    ip(torn, "a", "link", "set", "eth0", "up")
    ip(torn, "a", "addr", "add", f"{torn.address('a')}/24", "dev", "eth0")
    stalled.go_on()


def test_whom_it_does_not_concern(host: Host, torn: Lab) -> None:
    """Other namespaces, and what is within one: that goes over its loopback device, also where the address is
    the link's."""
    client, server = host.peer(torn, "a"), host.peer(torn, "b")
    pair = host.connect(client, server, torn.address("b"))
    elsewhere = host.connect(host.peer(torn, "far"), server, torn.address("b"))
    inside = [host.connect(client, host.peer(torn, "a"), each) for each in ("127.0.0.1", torn.address("a"))]
    make_hot(host, pair, elsewhere, *inside)
    drained = host.daemon.totals()["drained"]
    ip(torn, "a", "link", "set", "eth0", "down")
    host.wait_flow(pair, "paired", GONE)
    check_untouched(host, elsewhere, *inside)
    pauses.sleep(QUIET)  # it is done once more
    check_untouched(host, elsewhere, *inside)
    assert host.daemon.totals()["drained"] == drained + 1
    # It has been noticed that the address went as well, and with it only the connection that has it.
    ip(torn, "a", "addr", "del", f"{torn.address('a')}/24", "dev", "eth0")
    host.wait_flow(inside[1], "paired", GONE)
    check_untouched(host, elsewhere, inside[0])


def test_loopback_device_down(host: Host, torn: Lab) -> None:
    inside = host.connect(host.peer(torn, "a"), host.peer(torn, "a"), "127.0.0.1")
    pair = begin(host, torn)
    make_hot(host, inside, pair)
    ip(torn, "a", "link", "set", "lo", "down")
    stalled = Stalled(host, inside)
    check_untouched(host, pair)
    ip(torn, "a", "link", "set", "lo", "up")
    stalled.go_on()


def test_nobody_speaks(host: Host, torn: Lab) -> None:
    """It goes back all the same, and stays plain until TCP has carried something."""
    pair = begin(host, torn)
    make_hot(host, pair)
    ip(torn, "b", "link", "set", "eth0", "down")
    host.wait_flow(pair, "paired", GONE)
    wait_until("both are out", lambda: host.count_spliced() == 0)
    pauses.sleep(2 * QUIET)
    assert host.flow(pair)["reason"] == GONE
    ip(torn, "b", "link", "set", "eth0", "up")
    pair.pingpong(4)
    pair.verify()
    host.make_hot(pair, timeout=BACK)
    pair.verify()


def test_bytes_unread(host: Host, torn: Lab) -> None:
    """What was redirected before is there."""
    pair = begin(host, torn)
    make_hot(host, pair)
    pair.client.send(5000)
    wait_until("they are there", lambda: pair.server.fionread() == 5000)
    ip(torn, "a", "link", "set", "eth0", "down")
    host.wait_flow(pair, "draining", GONE)
    pair.server.recv(5000)
    host.wait_flow(pair, "paired", GONE)
    pair.verify()


def test_spliced_from_the_first_byte(host: Host, torn: Lab) -> None:
    """No program tells of these; a round finds them."""
    pair = begin(host, torn, port=EAGER)
    pair.pingpong(4)
    assert host.flow(pair)["state"] == "spliced"
    wait_until("its networks are seen", lambda: is_seen(host, pair))
    ip(torn, "a", "link", "set", "eth0", "down")
    host.wait_flow(pair, "paired", GONE)


def test_after_a_crash_of_the_daemon(torn: Lab) -> None:
    """The next one finds out about the networks of what is spliced."""
    with Host(services="") as host:
        pair = host.hot_pair(torn)
        host.daemon.kill()
        host.start()
        wait_until("its networks are seen", lambda: is_seen(host, pair))
        ip(torn, "a", "link", "set", "eth0", "down")
        host.wait_flow(pair, "paired", GONE)


def test_with_the_three_capabilities(torn: Lab) -> None:
    """Nothing is heard of other namespaces without a fourth one, CAP_NET_BROADCAST. So they are looked at."""
    names = [f"+{name.removeprefix('CAP_').lower()}" for name in CAPABILITIES]
    with Host(services="", start=False) as host:
        host.prefix = ("setpriv", f"--bounding-set={','.join(['-all', *names])}", "--inh-caps=-all")
        host.start()
        pair = begin(host, torn)
        make_hot(host, pair)
        assert host.daemon.status()["networks"]["state"] == "asks"
        ip(torn, "a", "link", "set", "eth0", "down")
        stalled = Stalled(host, pair)
        ip(torn, "a", "link", "set", "eth0", "up")
        stalled.go_on()


def test_namespaces_go_away(host: Host, torn: Lab) -> None:
    """Nothing of ours keeps one: it goes with its last process, and its links with it."""
    assert host.daemon.status()["networks"]["state"] == "hears"
    pair = begin(host, torn)
    make_hot(host, pair)
    host.stop_peers()
    ip(torn, "router", "link", "show", "to-a")
    subprocess.run(["ip", "netns", "del", torn.namespace("a")], check=True)
    subprocess.run(
        ["ip", "netns", "add", torn.namespace("a")], check=True
    )  # another one, for the lab to delete
    links = ["ip", "-n", torn.namespace("router"), "link", "show", "to-a"]
    wait_until(
        "its link has gone", lambda: subprocess.run(links, capture_output=True, check=False).returncode
    )
