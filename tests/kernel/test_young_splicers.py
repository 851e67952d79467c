# SPDX-License-Identifier: Apache-2.0
"""A process that reads with splice(2) on connections too young to have a record is remembered all the same:
none of its later connections is spliced, however harmless their first reads look."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemon import wait_until
from support.host import Host
from support.lab import Lab
from support.players import Pair, Peer

RELAY = Path(__file__).parents[1] / "conformance" / "relay.py"
FRONT, BACK = 7611, 7612
REQUEST, BODY = 100, 600_000


@pytest.fixture
def host(host: Host) -> Iterator[Host]:
    """The host without connections of earlier tests."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    return host


def _fetch(pair: Pair, *, spliced: bool) -> None:
    """One request and one large answer, which the client reads with splice(2) or with recv(2)."""
    pair.server.begin("recv", count=REQUEST)
    pair.client.send(REQUEST)
    assert pair.server.finish() == REQUEST
    pair.server.begin("send", count=BODY)
    if spliced:
        assert pair.client.splice_in(count=BODY) == BODY
    else:
        assert pair.client.recv(BODY) == BODY
    pair.server.finish()


def _check_young(host: Host, pair: Pair) -> None:
    """Nothing is known about the connection but that it exists: nobody was seen to read it."""
    local = f"{pair.client.local[0]}:{pair.client.local[1]}"
    [flow] = [each for each in host.daemon.flows() if each["local"] == local]
    assert (flow["state"], flow["reason"]) == ("paired", "cold")
    assert (flow["client"]["process"], flow["server"]["process"]) == ("", "")


def _check_plain(host: Host, pair: Pair) -> None:
    """It reads with recv(2) only, and is refused for what its process did elsewhere."""
    host.watch_cold(pair, "splice_reader")
    pair.pingpong(20, size=3000, answer=9000)
    pair.verify()
    flow = host.flow(pair)
    assert (flow["state"], flow["redirected_messages"]) == ("paired", 0)
    assert host.count_spliced() == 0


@pytest.mark.parametrize("place", ["b", "lo"], ids=["bridge", "loopback"])
def test_first_splice_on_a_young_connection(host: Host, lab: Lab, place: str) -> None:
    """A client fetches one large body, as a proxy does from its backend, and splices it away."""
    client, server = host.peer(lab, "a"), host.peer(lab, "a" if place == "lo" else place)
    young = host.connect(client, server, lab.address(place))
    _fetch(young, spliced=True)
    _check_young(host, young)
    later = host.connect(client, server, lab.address(place))
    _check_plain(host, later)
    young.verify()


def test_first_splice_on_a_connection_to_another_machine(host: Host, lab: Lab) -> None:
    """The same body from a server that is not ours; the later connection is to one that is."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    remote = host.connect(client, host.peer(lab, "far", inside=False), lab.address("far"))
    _fetch(remote, spliced=True)
    assert host.find_flow(remote) is None
    _check_plain(host, host.connect(client, server, lab.address("b")))
    remote.verify()


def test_a_body_that_is_read_plainly(host: Host, lab: Lab) -> None:
    """What makes the difference is splice(2): who receives the same body with recv(2) is spliced later, and
    so is another process beside one that has spliced."""
    client, server, other = host.peer(lab, "a"), host.peer(lab, "b"), host.peer(lab, "a")
    young = host.connect(client, server, lab.address("b"))
    _fetch(young, spliced=False)
    elsewhere = host.connect(other, server, lab.address("b"))
    _fetch(elsewhere, spliced=True)
    _check_young(host, elsewhere)
    later = host.connect(client, server, lab.address("b"))
    host.make_hot(later)
    later.verify()


@contextmanager
def _relay(host: Host, lab: Lab) -> Iterator[None]:
    """A relay on host a that reads the first bytes of each direction with recv(2) and splices the rest."""
    # The shell moves itself before it becomes the program: not one socket is made outside.
    inside = f'echo $$ > {host.cgroup.path}/cgroup.procs && exec "$@"'
    program = [sys.executable, "-I", "-S", str(RELAY), "headers", str(FRONT), lab.address("b"), str(BACK)]
    enter = ["nsenter", f"--net=/run/netns/{lab.namespace('a')}"]
    with subprocess.Popen(
        [*enter, "sh", "-c", inside, "sh", *program], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def _through_relay(host: Host, lab: Lab, client: Peer, server: Peer) -> Pair:
    return host.connect(client, server, lab.address("b"), port=BACK, dial=(lab.address("a"), FRONT))


def test_relay_that_splices_a_body_first(host: Host, lab: Lab) -> None:
    """HAProxy with `option splice-response`: its first answer is large, later ones are small enough for
    recv(2). Neither leg of a later connection is spliced, and nothing of it redirected."""
    client, server = host.peer(lab, "b"), host.peer(lab, "b")
    with _relay(host, lab):
        first = _through_relay(host, lab, client, server)
        _fetch(first, spliced=False)
        assert {flow["reason"] for flow in host.daemon.flows()} == {"cold"}
        second = _through_relay(host, lab, client, server)
        ports = {f":{second.client.local[1]}", f":{second.server.remote[1]}"}

        def legs() -> list[tuple[str, str, int]]:
            return [
                (flow["state"], flow["reason"], flow["redirected_messages"])
                for flow in host.daemon.flows()
                if any(flow["local"].endswith(port) for port in ports)
            ]

        # Less than the relay reads with recv(2), a message at a time, and enough to be spliced.
        for _ in range(60):
            second.pingpong(1, size=32, answer=32, pause=0.01)
            assert {(state, redirected) for state, _, redirected in legs()} == {("paired", 0)}
        refused = [("paired", "splice_reader", 0)] * 2
        wait_until("both legs are refused", lambda: legs() == refused)
        # The rest of the head, and a body behind it.
        _fetch(second, spliced=False)
        wait_until("both legs are refused still", lambda: legs() == refused)
        assert host.count_spliced() == 0
        for pair in (first, second):
            pair.verify()
