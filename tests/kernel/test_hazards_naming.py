# SPDX-License-Identifier: Apache-2.0
"""Hazards of recognising a connection: who may take an end for another, one or a few tests for each row of
HAZARDS.md that is named."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.hostile import Hostile, Name, dial, make_seed, occupied, read_map, read_name, read_seeds
from support.lab import Lab
from support.meddler import callbacks_forgotten
from support.players import HABITS, Pair, Peer

from splicer.kernel import libbpf

ROUNDS, SIZE = 30, 10


@pytest.fixture
def host(host: Host) -> Iterator[Host]:
    """The host without connections of earlier tests."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows() and not host.count_spliced())
    return host


# row 2


def test_invented_hint_and_the_server_speaks_first(host: Host, lab: Lab) -> None:
    """Somebody pretends that a listener on this host answers a client that talks to another machine, under
    eager: the client is in the SOCKHASH. It sends nothing, and gets what the server says all the same, though
    it sleeps in epoll until an edge comes and reads what FIONREAD tells; then it is out."""
    client = host.peer(lab, "a", program=HABITS)
    remote = host.peer(lab, "far", inside=False)
    hostile = Hostile(host, [lab.address("a")])
    for number in range(3):
        source = (lab.address("a"), 22_301 + number)
        hostile.call("answer_syns", clients=[source[0]], ports=[source[1], source[1] + 1], service=EAGER)
        pair = host.connect(client, remote, lab.address("far"), port=EAGER, source=source)
        # The daemon looks once a second, and may have done so just now.
        if host.count_spliced():
            break
    else:
        raise AssertionError("the attack has become impossible; adapt this test")
    client.begin("recv_told", conns=[pair.client.conn], count=1000, edge=True, patience=10.0)
    pair.server.send(1000, chunk=100)
    client.finish()
    wait_until("it is out of the SOCKHASH", lambda: host.count_spliced() == 0, timeout=2.0)
    pair.pingpong(40)
    pair.verify()
    assert host.find_flow(pair) is None


# row 5


def _forge_client_in_time(host: Host, lab: Lab) -> tuple[Hostile, Pair]:
    """Somebody who knows both numbers takes a client's name after it has connected and before its server has
    come, with another name in the same place of the rendezvous in between. The forger, and the connection."""
    pair, name = dial(host, lab, host.peer(lab, "a"), host.peer(lab, "b"))
    local, remote = pair.client.local, pair.client.remote
    hostile = Hostile(host, [lab.address("a"), lab.address("b")])
    hostile.call("claim", address=local[0])
    other = Name(name.client_seq ^ 2048, name.server_seq)
    assert other.slot == name.slot
    hostile.call("shake_hands", conn="other", local=[local[0], 20_001], remote=remote, seqs=other.as_client)
    hostile.call("shake_hands", conn="forged", local=local, remote=remote, seqs=name.as_client)
    pair.client.send(SIZE)
    host.accept(pair)
    pair.server.recv(SIZE)
    return hostile, pair


@pytest.mark.parametrize("reads", [False, True], ids=["never-reads", "reads-once"])
def test_forged_client_after_another_one(host: Host, lab: Lab, reads: bool) -> None:
    """A known difference: the forger, who also follows every byte count, becomes the client's end as long as
    the true client only sends; then it is given what the server says. One read by the true client, of however
    little, and the connection is plain."""
    hostile, pair = _forge_client_in_time(host, lab)
    pair.server.send(SIZE)
    for _ in range(ROUNDS - 1):
        pair.client.send(SIZE)
        assert pair.server.recv(SIZE) == SIZE
        pair.server.send(SIZE)
    if reads:
        assert pair.client.recv(1) == 1
    # The forger is to be where the client is.
    hostile.call("say", conn="forged", text="x" * ROUNDS * SIZE)
    assert hostile.call("confirm", conn="forged") == ROUNDS * SIZE
    hostile.call("be_told", conn="forged", count=SIZE, times=ROUNDS)
    if reads:
        wait_until("it is known to be forged", lambda: host.daemon.flows()[0]["reason"] == "forged")
    else:
        wait_until("it is spliced with the forger", lambda: host.daemon.flows()[0]["state"] == "spliced")
    pair.server.send(500)
    if reads:
        assert hostile.attempt("hear_once", conn="forged", count=1000) == "EAGAIN"
        assert pair.client.recv(ROUNDS * SIZE + 499) == ROUNDS * SIZE + 499
        pair.pingpong(20)
        pair.verify()
        assert host.count_spliced() == 0
    else:
        assert len(hostile.call("hear", conn="forged", count=500)) == 500
        assert pair.client.recv(ROUNDS * SIZE) == ROUNDS * SIZE
        assert pair.client.attempt("recv_once", count=1) == "EAGAIN"
        assert pair.client.report()["first_wrong"] is None


# row 6

COOKIE = 16  # among the fields of layout.PAIR: the client's


def _set_cookie(host: Host, cookie: int) -> int:
    """Another cookie for the client of the only pair there is; returns the one it had."""
    found: list[int] = []

    def change(fields: list[Any]) -> None:
        found.append(fields[COOKIE])
        fields[COOKIE] = cookie

    host.edit_pairs(change)
    (before,) = found
    return before


def test_another_socket_in_the_memory_of_an_end(host: Host, lab: Lab) -> None:
    """The record names the address of a socket and the cookie of an earlier one: the socket sends under a
    name that is not its own, and nothing is redirected for it, or to it."""
    pair = host.hot_pair(lab)
    cookie = _set_cookie(host, 1)
    before = host.flow(pair)
    pair.pingpong(40)
    after = host.flow(pair)
    assert after["redirected_messages"] == before["redirected_messages"]
    _set_cookie(host, cookie)
    pair.pingpong(40)
    pair.verify()
    last = host.flow(pair)
    assert last["redirected_messages"] > after["redirected_messages"]


# row 8


def test_spliced_through_masquerading(host: Host, second_lab: Lab) -> None:
    """A connection whose source netfilter rewrites is recognised and spliced, and all of it redirected."""
    second_lab.masquerade("router", "br0")
    pair = host.connect(host.peer(second_lab, "far"), host.peer(second_lab, "b"), second_lab.address("b"))
    assert pair.server.remote[0] == "10.77.0.254"
    before = host.make_hot(pair)
    before = host.find_flow(pair) or before
    pair.pingpong(100)
    after = host.flow(pair)
    assert after["redirected_messages"] - before["redirected_messages"] == 200
    assert after["passed_messages"] == before["passed_messages"]
    pair.verify()


# row 12

LIMIT = 16
SHARE = LIMIT - LIMIT // 8  # what one tenant may have of it
CONNECTIONS = SHARE + 6


def _talk_and_leave(host: Host, lab: Lab, client: Peer, server: Peer) -> bool:
    """A short connection; was there a row of it, with who its ends are?"""
    pair = host.connect(client, server, lab.address("b"))
    pair.pingpong(20)
    pair.verify()
    seen = host.find_flow(pair) is not None
    pair.close()
    return seen


def test_program_that_takes_the_callbacks(lab: Lab) -> None:
    """Another SOCK_OPS program sets the callback flags of each connection to 0. In a cgroup below it runs
    first and does no harm. On the same cgroup, attached later, it is a known difference: connections work and
    stay plain, nobody notices when they close, and when the records left behind fill the table, later
    connections are refused, also those made when the other program has gone."""
    with Host("--max-connections", str(LIMIT)) as host:
        tenant = host.cgroup.child("tenant")
        client, server = host.peer(lab, "a", cgroup=tenant), host.peer(lab, "b", cgroup=tenant)
        with callbacks_forgotten(tenant.path):
            pair = host.connect(client, server, lab.address("b"))
            host.make_hot(pair)
            pair.verify()
            pair.close()
            assert all(_talk_and_leave(host, lab, client, server) for _ in range(CONNECTIONS))
            wait_until("their records are gone", lambda: not host.daemon.flows())
        assert host.daemon.totals()["refused"].get("map_full", 0) == 0
        spliced = host.daemon.totals()["spliced"]
        with callbacks_forgotten(host.cgroup.path):
            assert not any(_talk_and_leave(host, lab, client, server) for _ in range(CONNECTIONS))
        left = host.daemon.flows()
        assert {(flow["state"], flow["reason"]) for flow in left} == {("paired", "cold")}
        assert len(left) == SHARE
        assert host.daemon.totals()["refused"]["map_full"] == CONNECTIONS - SHARE
        assert not _talk_and_leave(host, lab, client, server)
        assert host.daemon.totals()["refused"]["map_full"] == CONNECTIONS - SHARE + 1
        assert host.daemon.totals()["spliced"] == spliced
        assert host.count_spliced() == 0


# row 104


@pytest.mark.parametrize("whose", ["another", "the-same"])
def test_place_of_a_young_connection_is_taken(host: Host, lab: Lab, whose: str) -> None:
    """The place among the young has somebody else already. A newcomer is known and spliced like any
    other, and the first one stays; but one with the very name of the first is refused."""
    pair, name = dial(host, lab, host.peer(lab, "a"), host.peer(lab, "b"))
    holder = name if whose == "the-same" else Name(name.client_seq ^ 2048, name.server_seq)
    refused = host.daemon.totals()["refused"].get("map_full", 0)
    with occupied(host, name, holder):
        pair.client.send(SIZE)
        host.accept(pair)
        pair.server.recv(SIZE)
        if whose == "another":
            assert read_name(host, pair) == name
            host.make_hot(pair)
        else:
            pair.pingpong(60)
            assert not read_map(host, "pairs")
            assert not read_map(host, "seeds")
        pair.verify()
        pair.close()
        wait_until("its records are gone", lambda: not read_map(host, "pairs") and len(read_seeds(host)) == 1)
    assert host.daemon.totals()["refused"].get("map_full", 0) - refused == (whose == "the-same")


# row 105


def test_seed_with_a_name_that_is_taken_does_not_grow(host: Host, lab: Lab) -> None:
    """The name of a young connection is in the table, which is somebody else's then. It gets no pair, takes
    nothing of the other one's away, and works."""
    pair = host.pair(lab)
    pair.pingpong(1)
    name = read_name(host, pair)
    assert not read_map(host, "seeds"), "it has grown"
    key = struct.pack("=2I", name.client_seq, name.server_seq)
    seeds = libbpf.Map.open(str(host.pin_dir / "maps" / "seeds"))
    try:
        seeds.set(key, make_seed(name))
        pair.pingpong(60)
        pair.verify()
        assert not read_map(host, "pairs")
        pair.close()
        wait_until("its place is free", lambda: len(read_seeds(host)) == 1)
        assert seeds.get(key) == make_seed(name)
    finally:
        seeds.delete(key)
        seeds.close()
