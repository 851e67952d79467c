# SPDX-License-Identifier: Apache-2.0
"""Somebody without privileges claims to be an end of another connection, as well as can be: root tells it the
victim's sequence numbers. It gets nothing, injects nothing and disturbs nobody (promise 5 of HAZARDS.md)."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.hostile import Hostile, Name, dial, read_name
from support.lab import Lab
from support.load import Load
from support.pauses import Stopwatch
from support.players import Pair
from support.tiers import thorough

SIDES = ("client", "server")
# Source ports that tests fix: below the ephemeral ones.
USED_AGAIN = 22_101


def _victim(host: Host, lab: Lab, port: int = 0) -> Pair:
    return host.hot_pair(lab, port=port)


def _attacker(host: Host, lab: Lab) -> Hostile:
    return Hostile(host, [lab.address("a"), lab.address("b")])


def _claim(hostile: Hostile, pair: Pair, side: str) -> tuple[list[Any], list[Any]]:
    """Have the address of one end of the victim; its local and remote address and port."""
    end = pair.client if side == "client" else pair.server
    hostile.call("claim", address=end.local[0])
    return list(end.local), list(end.remote)


def _seqs(name: Name, side: str) -> list[int]:
    return name.as_client if side == "client" else name.as_server


def _check_unharmed(host: Host, pair: Pair, before: dict[str, Any]) -> None:
    """The connection is still spliced, has been without a break, and only its own messages were counted."""
    rounds = 50
    pair.pingpong(rounds)
    after = host.flow(pair)
    assert after["state"] == "spliced"
    assert after["redirected_messages"] - before["redirected_messages"] == 2 * rounds
    assert after["passed_messages"] == before["passed_messages"], "somebody else's messages were counted"
    assert after["client"]["pid"] == before["client"]["pid"]
    assert after["server"]["pid"] == before["server"]["pid"]
    pair.verify()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("how", ["repaired", "under-repair", "handshake"])
def test_forged_end_of_a_spliced_connection(host: Host, lab: Lab, side: str, how: str) -> None:
    """The name of a spliced connection, claimed from another namespace: whatever the forged end does,
    reading, sending, setting options, resetting, it does to itself."""
    pair = _victim(host, lab)
    name = read_name(host, pair)
    hostile = _attacker(host, lab)
    local, remote = _claim(hostile, pair, side)
    drained = host.daemon.totals()["drained"]
    pair.client.send(1000, chunk=100)
    before = host.flow(pair)
    # That the server has not read these yet is seen by what it reads afterwards.
    for number in range(3):
        forged = f"forged-{number}"
        where: dict[str, Any] = {"conn": forged, "local": local, "remote": remote}
        if how == "handshake":
            hostile.call("shake_hands", **where, seqs=_seqs(name, side))
            hostile.call("be_told", conn=forged, count=1, times=60)
            hostile.call("say", conn=forged, text="evil" * 100)
            assert hostile.call("confirm", conn=forged) == 400, "it went elsewhere"
        else:
            kept = how == "under-repair"
            hostile.call("forge", **where, seqs=_seqs(name, side), keep_repair=kept)
            if not kept:
                hostile.call("read_many", conn=forged, times=60)
            hostile.call("say", conn=forged, text="evil" * 100)
        hostile.call("setsockopt", conn=forged, level=socket.SOL_SOCKET, option=socket.SO_RCVLOWAT, value=1)
        assert hostile.attempt("hear_once", conn=forged, count=65536) in ("EAGAIN", "EPERM")
        hostile.call("close" if number == 2 else "reset", conn=forged)
    assert pair.server.recv(1000) == 1000
    assert host.daemon.totals()["drained"] == drained, "the forger had something drained"
    _check_unharmed(host, pair, before)


def test_forged_end_stays_while_its_victim_is_drained_and_adopted(host: Host, lab: Lab) -> None:
    """Sweeps that visit the forged socket too, in its namespace and beside its victim, do not mistake it."""
    pair = _victim(host, lab)
    name = read_name(host, pair)
    hostile = _attacker(host, lab)
    local, remote = _claim(hostile, pair, "client")
    hostile.call("shake_hands", conn="forged", local=local, remote=remote, seqs=name.as_client)
    # A pair of the attacker's own, so that its namespace is swept.
    hostile.call("listen", name="own", family=socket.AF_INET, host="127.0.0.1", port=7400)
    hostile.call("connect", conn="one", family=socket.AF_INET, host="127.0.0.1", port=7400)
    hostile.call("accept", listener="own", conn="other")
    for _ in range(3):
        host.daemon.drain()
        for _ in range(25):
            hostile.call("send", conn="one", count=10)
            hostile.call("recv", conn="other", count=10)
            hostile.call("send", conn="other", count=10)
            hostile.call("recv", conn="one", count=10)
        host.wait_flow(pair, "paired")
        host.make_hot(pair)
        hostile.call("be_told", conn="forged", count=10, times=5)
        pair.pingpong(20)
        assert hostile.attempt("hear_once", conn="forged", count=65536) == "EAGAIN"
    host.make_hot(pair)
    wait_until("whole pairs are spliced", lambda: host.count_spliced() in (2, 4))
    pair.verify()


@pytest.mark.parametrize("side", SIDES)
def test_forged_reads_do_not_count(host: Host, lab: Lab, side: str) -> None:
    """A connection that is not hot yet: reads by a forged end do not make it so, and it is never spliced with
    the forger. It may stay plain, if somebody claims to be an end of it."""
    pair = host.pair(lab)
    pair.pingpong(5)
    hostile = _attacker(host, lab)
    local, remote = _claim(hostile, pair, side)
    hostile.call(
        "shake_hands", conn="forged", local=local, remote=remote, seqs=_seqs(read_name(host, pair), side)
    )
    hostile.call("be_told", conn="forged", count=1, times=100)
    time.sleep(0.2)
    flow = host.find_flow(pair) or host.daemon.flows()[0]
    assert flow["state"] == "paired", flow
    for _ in range(10):
        pair.pingpong(30)
        time.sleep(0.02)

    def find_settled() -> dict[str, Any] | None:
        pair.pingpong(30)
        flow = host.find_flow(pair)
        settled = flow and (flow["state"], flow["reason"]) in (("spliced", ""), ("paired", "forged"))
        return flow if settled else None

    flow = wait_until("it is spliced or known to be forged", find_settled)
    assert flow["client"]["pid"] == pair.client.peer.pid
    assert hostile.attempt("hear_once", conn="forged", count=65536) == "EAGAIN"
    pair.verify()


def test_forged_end_in_the_sockhash_injects_nothing(host: Host, lab: Lab) -> None:
    """Under eager a socket is in the SOCKHASH from its handshake on, under the name it has. One with the name
    of another connection does not reach that connection's ends."""
    pair = _victim(host, lab, port=EAGER)
    name = read_name(host, pair)
    hostile = _attacker(host, lab)
    spliced = host.count_spliced()
    hostile.call(
        "answer_syns",
        clients=[pair.client.local[0]],
        ports=[pair.client.local[1], pair.client.local[1] + 1],
        service=EAGER,
    )
    local, remote = _claim(hostile, pair, "client")
    before = host.flow(pair)
    # Another client at the same place of the rendezvous, so that nothing there reminds of the victim.
    other = Name(name.client_seq ^ 2048, name.server_seq)
    hostile.call("shake_hands", conn="other", local=[local[0], 20_001], remote=remote, seqs=other.as_client)
    hostile.call("shake_hands", conn="forged", local=local, remote=remote, seqs=name.as_client)
    assert host.count_spliced() == spliced + 1, "the attack has become impossible earlier; adapt this test"
    # All numbers of bytes that the victim's client may have sent through TCP are tried.
    for _ in range(40):
        hostile.call("say", conn="forged", text="EVIL EVIL EVIL!!")
        hostile.call("confirm", conn="forged")
    assert pair.server.fionread() == 0, "foreign bytes wait at the victim's server"
    assert pair.client.fionread() == 0
    _check_unharmed(host, pair, before)


def test_forged_client_before_its_server_steals_nothing(host: Host, lab: Lab) -> None:
    """The server learns who its client is when the handshake ends. Somebody who takes the client's name just
    before, and then follows every byte count, is not given what the server says."""
    pair, name = dial(host, lab, host.peer(lab, "a"), host.peer(lab, "b"))
    local, remote = pair.client.local, pair.client.remote
    hostile = _attacker(host, lab)
    hostile.call("claim", address=local[0])
    hostile.call("shake_hands", conn="forged", local=local, remote=remote, seqs=name.as_client)
    pair.client.send(10)
    host.accept(pair)
    pair.server.recv(10)
    pair.pingpong(30, size=10, answer=10)
    # The forger is where the client is now: 310 bytes sent, 300 read.
    hostile.call("say", conn="forged", text="x" * 310)
    hostile.call("confirm", conn="forged")
    hostile.call("be_told", conn="forged", count=10, times=30)
    for _ in range(4):
        hostile.call("say", conn="forged", text="x")
        hostile.call("confirm", conn="forged")
        pair.client.send(1)
        pair.server.recv(1)
        hostile.call("be_told", conn="forged", count=1)
        pair.server.send(1)
        pair.client.recv(1)
        time.sleep(0.15)
    pair.server.send(500)
    assert hostile.attempt("hear_once", conn="forged", count=1000) == "EAGAIN", "the forger got a message"
    assert pair.client.attempt("recv", count=500, timeout=2.0) == 500
    for _ in range(10):
        pair.pingpong(20)
    pair.verify()


def test_same_slot_at_the_rendezvous(host: Host, lab: Lab) -> None:
    """A client whose place at the rendezvous is taken by another one's before its server comes stays plain,
    and works; so does the other one."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    hostile = _attacker(host, lab)
    hostile.call("claim", address="10.66.0.2")
    for number in range(3):
        pair, name = dial(host, lab, client, server)
        other = Name(name.client_seq ^ 2048, name.server_seq)
        assert other.slot == name.slot
        hostile.call(
            "shake_hands",
            conn=f"forged-{number}",
            local=["10.66.0.2", 20_000 + number],
            remote=pair.client.remote,
            seqs=other.as_client,
        )
        pair.client.send(64)
        host.accept(pair)
        pair.server.recv(64)
        pair.pingpong(60)
        flow = host.find_flow(pair)
        assert flow is None, flow
        pair.verify()


ENDINGS = ("reset-unread", "server-first", "reset-both")
LONGEST = 40.0  # seconds for all the connections of a test


@pytest.mark.parametrize(
    "port",
    [
        pytest.param(0, id="adaptive"),
        pytest.param(EAGER, id="eager", marks=thorough("the name is compared in the same place")),
    ],
)
def test_four_tuple_used_again_at_once_under_load(host: Host, lab: Lab, port: int) -> None:
    """The same addresses and ports hundreds of times in a row, while other connections work: no byte of an
    old connection, redirected or not, comes out of a new one, and each can be spliced."""
    connections = 200 if port else 100
    load = Load(host, lab)
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    source = (lab.address("a"), USED_AGAIN)
    spliced = host.daemon.totals()["spliced"]
    with Stopwatch() as watch:
        for number in range(connections):
            pair = host.connect(
                client, server, lab.address("b"), port=port or 7402, source=source, seed=100_000 + number
            )
            # A client that starts with what its predecessor had unread would read wrong bytes here.
            pair.pingpong(4)
            if not port and number % 4 == 0:
                host.make_hot(pair)
            ending = ENDINGS[number % len(ENDINGS)]
            if ending == "server-first":
                pair.verify()
                pair.server.close()
                assert pair.client.expect_eof()
                pair.client.close()
            else:
                # Bytes on both sides that nobody reads: some redirected, some not.
                pair.client.send(300, chunk=100)
                pair.server.send(300, chunk=100)
                if ending == "reset-both":
                    pair.server.reset()
                pair.client.reset()
                if ending == "reset-unread":
                    pair.server.wait_events(events=["HUP"])
                    pair.server.close()
            assert watch.seconds < LONGEST, f"only {number} connections in {LONGEST} s"
    assert host.daemon.totals()["spliced"] - spliced >= connections // 4
    load.finish()
    wait_until("all records of them are gone", lambda: len(host.daemon.flows()) <= len(load.pairs))
