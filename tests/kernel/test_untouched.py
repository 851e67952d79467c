# SPDX-License-Identifier: Apache-2.0
"""Which connections are left alone, and the reason each of them is given."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from support.daemon import wait_until
from support.host import ALLOW, EAGER, EAGER_ALLOW, OFF, Host
from support.lab import Lab
from support.players import Pair

SO_ZEROCOPY = 60
SO_PEEK_OFF = 42
MSG_ZEROCOPY = 0x4000000
TCP_ULP_TLS = "tls"


@pytest.fixture
def empty_host(host: Host) -> Iterator[Host]:
    """The host with no connection left from earlier tests."""
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    yield host


def _stays_unknown(host: Host, pair: Pair, rounds: int = 400) -> None:
    for _ in range(rounds // 40):
        pair.pingpong(40)
        assert host.find_flow(pair) is None
        assert host.count_spliced() == 0
    time.sleep(0.1)
    assert host.find_flow(pair) is None
    assert host.count_spliced() == 0
    pair.verify()


@pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])
@pytest.mark.parametrize("outside", ["client", "server"])
def test_other_end_outside_the_cgroup(empty_host: Host, lab: Lab, outside: str, port: int) -> None:
    """A connection whose other end is outside the attached cgroup, which is what remote looks like, never
    appears in the SOCKHASH nor in `flows`."""
    client = empty_host.peer(lab, "a", inside=outside != "client")
    server = empty_host.peer(lab, "b", inside=outside != "server")
    before = empty_host.daemon.totals()
    pair = empty_host.connect(client, server, lab.address("b"), port=port)
    _stays_unknown(empty_host, pair)
    after = empty_host.daemon.totals()
    assert after["paired"] == before["paired"]
    assert after["passed_messages"] == before["passed_messages"]
    assert after["redirected_messages"] == before["redirected_messages"]


def test_service_that_is_off(empty_host: Host, lab: Lab) -> None:
    """The policy `off` exempts a service: nothing of it is spliced, however hot it is."""
    client, server = empty_host.peer(lab, "a"), empty_host.peer(lab, "b")
    pair = empty_host.connect(client, server, lab.address("b"), port=OFF)
    for _ in range(10):
        pair.pingpong(40)
        assert empty_host.count_spliced() == 0
    flow = empty_host.find_flow(pair)
    assert flow is None or (flow["state"], flow["reason"]) == ("paired", "policy_off")
    pair.verify()


def test_daemon_whose_mode_is_off(lab: Lab) -> None:
    """`--default off` splices nothing but what a service rule asks for."""
    with Host("--default", "off") as host:
        pair = host.pair(lab)
        for _ in range(10):
            pair.pingpong(40)
            assert host.count_spliced() == 0
        host.hot_pair(lab, port=EAGER)
        assert host.count_spliced() == 2


@pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])
@pytest.mark.parametrize(
    "blocking", [(True, False), (False, True), (True, True)], ids=["client", "server", "both"]
)
def test_blocking_sockets(empty_host: Host, lab: Lab, blocking: tuple[bool, bool], port: int) -> None:
    """A connection with a blocking socket at either end stays plain TCP, with the reason blocking_reader."""
    pair = empty_host.pair(lab, port=port, blocking=blocking)
    if port == EAGER:
        # Seen once it is spliced, so it is drained.
        pair.pingpong(40)
        empty_host.wait_flow(pair, "paired")
    empty_host.watch_cold(pair, "blocking_reader")
    assert empty_host.count_spliced() == 0
    pair.verify()


def test_blocking_socket_that_stops_blocking(host: Host, lab: Lab) -> None:
    """What was refused for being blocking is spliced once O_NONBLOCK is set and it goes on being hot."""
    pair = host.pair(lab, blocking=(False, True))
    host.watch_cold(pair, "blocking_reader")
    pair.server.setblocking(blocking=False)
    host.make_hot(pair)
    pair.verify()


def _splice_rounds(pair: Pair, rounds: int) -> None:
    for _ in range(rounds):
        pair.client.send(64)
        assert pair.server.splice_in(count=64) == 64
        pair.server.send(64)
        assert pair.client.recv(64) == 64


@pytest.mark.parametrize("port", [0, ALLOW], ids=["refuse", "allow"])
def test_splice_reader(empty_host: Host, lab: Lab, port: int) -> None:
    """A connection read by splice(2) stays plain, with the reason splice_reader."""
    pair = empty_host.pair(lab, port=port)
    _splice_rounds(pair, 60)
    empty_host.wait_flow(pair, "paired", "splice_reader")
    _splice_rounds(pair, 20)
    assert empty_host.count_spliced() == 0
    pair.verify()


def test_splice_reader_is_sticky_per_process(empty_host: Host, lab: Lab) -> None:
    """A process seen reading by splice(2) may do so on any connection: its others stay plain as well."""
    client, server = empty_host.peer(lab, "a"), empty_host.peer(lab, "b")
    spliced = empty_host.connect(client, server, lab.address("b"))
    _splice_rounds(spliced, 20)
    ordinary = empty_host.connect(client, server, lab.address("b"))
    empty_host.watch_cold(ordinary, "splice_reader")
    ordinary.verify()


def test_splice_on_a_spliced_end(host: Host, lab: Lab) -> None:
    """The first splice(2) on a spliced end, even one that finds nothing, takes the connection back to TCP;
    the bytes that follow are seen by splice(2)."""
    pair = host.hot_pair(lab)
    assert pair.server.attempt("splice_nothing") == "EAGAIN"
    pair.client.send(5000)
    assert pair.server.splice_in(count=5000) == 5000
    host.wait_flow(pair, "paired", "splice_reader")
    _splice_rounds(pair, 20)
    pair.verify()


OPTIONS = {
    "rcvlowat": [socket.SOL_SOCKET, socket.SO_RCVLOWAT, 40],
    "zerocopy": [socket.SOL_SOCKET, SO_ZEROCOPY, 1],
    "peek_offset": [socket.SOL_SOCKET, SO_PEEK_OFF, 0],
}


@pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])
@pytest.mark.parametrize("at", ["client", "server"])
@pytest.mark.parametrize("reason", OPTIONS)
def test_option_set_before(host: Host, lab: Lab, reason: str, at: str, port: int) -> None:
    """An end with a socket option that a psock cannot serve is not spliced; the reason names the option."""
    option = [OPTIONS[reason]]
    options = (option, []) if at == "client" else ([], option)
    pair = host.pair(lab, port=port, options=options)
    if port == EAGER and at == "server":
        # Set after accept(2): spliced by then, so it is drained.
        pair.pingpong(40)
        host.wait_flow(pair, "paired", reason)
    host.watch_cold(pair, reason)
    pair.verify()


@pytest.mark.parametrize("at", ["client", "server"])
@pytest.mark.parametrize("reason", OPTIONS)
def test_option_set_while_spliced(host: Host, lab: Lab, reason: str, at: str) -> None:
    """An application that asks for such an option on a spliced connection gets plain TCP; no byte is lost."""
    pair = host.hot_pair(lab)
    end, other = (pair.client, pair.server) if at == "client" else (pair.server, pair.client)
    other.send(1000)
    end.setsockopt(*OPTIONS[reason])
    assert end.recv(1000) == 1000
    pair.pingpong(5)
    host.wait_flow(pair, "paired", reason)
    host.watch_cold(pair, reason)
    pair.verify()


def test_rcvlowat_holds_while_spliced(host: Host, lab: Lab) -> None:
    """SO_RCVLOWAT set on a spliced socket means what it says for whatever is sent afterwards."""
    pair = host.hot_pair(lab)
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
    host.wait_flow(pair, "paired", "rcvlowat")
    pair.client.send(400)
    assert "IN" not in pair.server.wait_events(events=["IN"], timeout=0.2)
    pair.client.send(600)
    assert "IN" in pair.server.wait_events(events=["IN"])
    assert pair.server.recv(1000) == 1000
    pair.verify()


def test_zerocopy_completes_while_spliced(host: Host, lab: Lab) -> None:
    """MSG_ZEROCOPY on a socket that was spliced gets its completion message."""
    pair = host.hot_pair(lab)
    pair.client.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    host.wait_flow(pair, "paired", "zerocopy")
    pair.client.send_once(count=20_000, flags=MSG_ZEROCOPY)
    pair.server.recv(20_000)
    assert pair.client.drain_error_queue() == [[0, 0]]
    pair.verify()


def test_tls_on_a_spliced_socket(host: Host, lab: Lab) -> None:
    """TCP_ULP is refused or granted as on plain TCP, and data flows either way."""
    outcomes = []
    for inside in (False, True):
        client, server = host.peer(lab, "a", inside=inside), host.peer(lab, "b", inside=inside)
        pair = host.connect(client, server, lab.address("b"))
        if inside:
            host.make_hot(pair)
        outcomes.append(pair.client.attempt("set_ulp", name=TCP_ULP_TLS))
        pair.pingpong(20)
        pair.verify()
    assert outcomes[0] == outcomes[1]


def test_close_on_eager_allow_leaves_nothing(empty_host: Host, lab: Lab) -> None:
    """Short connections leave nothing in the SOCKHASH, nor in `flows`."""
    client, server = empty_host.peer(lab, "a"), empty_host.peer(lab, "b")
    for _ in range(30):
        pair = empty_host.connect(client, server, lab.address("b"), port=EAGER_ALLOW)
        pair.pingpong(2)
        pair.verify()
        pair.close()
    wait_until("the SOCKHASH is empty", lambda: empty_host.count_spliced() == 0)
    wait_until("closed connections are gone", lambda: not empty_host.daemon.flows())
