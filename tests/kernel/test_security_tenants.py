# SPDX-License-Identifier: Apache-2.0
"""A hostile tenant fills every table there is. What others had keeps working and stays spliced, what they
make meanwhile works, too, and afterwards everything is as before."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.bpf import read_counter
from support.daemon import wait_until
from support.host import EAGER, Host
from support.hostile import Hostile, dial
from support.lab import Lab
from support.players import Pair, Peer
from support.tiers import thorough

from splicer.kernel import libbpf
from splicer.model import REASON_NAMES

SPLICE = REASON_NAMES.index("splice_reader")
LIMIT = 64
EXCESS = 50
# As in bpf/maps.h.
SPLICERS, SLOTS, EVENT_BYTES = 4096, 2048, 65536


@pytest.fixture(scope="module")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    with Host("--max-connections", str(LIMIT)) as made:
        yield made


@pytest.fixture
def victims(host: Host, lab: Lab) -> list[Pair]:
    """Connections of others, spliced before the tenant comes."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b"), port=port) for port in (0, 0, EAGER)]
    for pair in pairs:
        host.make_hot(pair)
    return pairs


def _check_spliced(host: Host, pairs: list[Pair]) -> None:
    """All are spliced, and each of their messages is redirected."""
    for pair in pairs:
        before = host.flow(pair)
        assert before["state"] == "spliced", before
        pair.pingpong(10)
        after = host.flow(pair)
        assert after["redirected_messages"] - before["redirected_messages"] == 20
        pair.verify()


def _share(others: int) -> int:
    """How many connections a tenant may have while others have so many: has_room() in bpf/register.c."""
    left = LIMIT - others
    return left - left // 8


def _fill(host: Host, lab: Lab, others: int, port: int) -> tuple[Peer, list[Pair]]:
    """A tenant makes more connections than there is room for. If it happens to share a slot of the books with
    the others, as one in 256 does, it is another's turn."""
    for name in ("tenant", "tenant-2", "tenant-3"):
        tenant = host.peer(lab, "a", cgroup=host.cgroup.child(name))
        taken = [host.connect(tenant, tenant, "127.0.0.1", port=port) for _ in range(LIMIT + EXCESS)]
        if len(host.daemon.flows()) != _share(0):
            return tenant, taken
        _leave(host, tenant, others)
    raise AssertionError("three cgroups in one slot")


def _leave(host: Host, tenant: Peer, others: int) -> None:
    tenant.stop()
    host._peers.remove(tenant)
    wait_until("the tenant's connections are gone", lambda: len(host.daemon.flows()) <= others)


@pytest.mark.parametrize(
    "port",
    [
        pytest.param(0, id="adaptive"),
        pytest.param(EAGER, id="eager", marks=thorough("a tenant is counted at the same place")),
    ],
)
def test_tenant_with_more_connections_than_there_is_room_for(
    host: Host, lab: Lab, victims: list[Pair], port: int
) -> None:
    """A tenant gets its share of the table, and what it makes beyond that is plain, works and is counted.
    Others stay spliced, and their new connections are spliced as if the tenant were not there."""
    before = host.daemon.totals()["refused"].get("map_full", 0)
    tenant, taken = _fill(host, lab, len(victims), port)
    assert len(host.daemon.flows()) == len(victims) + _share(len(victims))
    refused = host.daemon.totals()["refused"]["map_full"]
    assert refused - before >= len(taken) - _share(len(victims))
    _check_spliced(host, victims)
    newcomers = [host.pair(lab, port=number) for number in (0, port)]
    for newcomer in newcomers:
        host.make_hot(newcomer)
    _check_spliced(host, [*victims, *newcomers])
    assert host.daemon.totals()["refused"]["map_full"] == refused
    # The tenant's own, with and without a record, work as well.
    for pair in (taken[0], taken[-1]):
        pair.client.send(1000)
        assert pair.server.recv(1000) == 1000
    _leave(host, tenant, len(victims) + len(newcomers))
    for number in (0, port):
        late = host.hot_pair(lab, port=number)
        late.verify()
    _check_spliced(host, victims)


def test_tenants_are_counted_right(host: Host, lab: Lab, victims: list[Pair]) -> None:
    """Whoever comes after a greedy tenant has gone may have as much as that one had, again and again."""
    for _ in range(3):
        tenant, _ = _fill(host, lab, len(victims), 0)
        assert len(host.daemon.flows()) == len(victims) + _share(len(victims))
        _leave(host, tenant, len(victims))
    _check_spliced(host, victims)


def test_tenant_that_comes_and_goes_all_the_time(host: Host, lab: Lab, victims: list[Pair]) -> None:
    """A storm of short connections, more at once than there is room for: no record is left of them."""
    tenant = host.cgroup.child("tenant")
    server, client = host.peer(lab, "b", cgroup=tenant), host.peer(lab, "b", cgroup=tenant)
    port = server.call("listen", name="door", family=socket.AF_INET, host="127.0.0.1")
    where: dict[str, Any] = {"family": socket.AF_INET, "host": "127.0.0.1", "port": port}
    connections = 0
    while connections <= 5 * LIMIT:
        server.begin("serve", listener="door", seconds=4.0)
        client.begin("churn", **where, seconds=3.5, seed=1, together=3 * LIMIT, rounds=10)
        while client.is_waiting(0.2):
            _check_spliced(host, victims)
        done = client.finish()
        assert (done["wrong"], done["broken"]) == (0, 0)
        connections += done["connections"]
        server.finish()
    wait_until("their records are gone", lambda: len(host.daemon.flows()) == len(victims))
    late = host.hot_pair(lab)
    late.verify()


def test_more_events_than_the_ring_buffer_holds(host: Host, lab: Lab, victims: list[Pair]) -> None:
    """Events that nobody reads are lost and counted; what they were about is done all the same."""
    tenant = host.cgroup.child("tenant")
    server, client = host.peer(lab, "b", cgroup=tenant), host.peer(lab, "b", cgroup=tenant)
    port = server.call("listen", name="door", family=socket.AF_INET, host="127.0.0.1", port=EAGER)
    waiting = host.pair(lab)
    lost = read_counter(host.pin_dir, "events_lost")
    os.kill(host.daemon.pid, signal.SIGSTOP)
    try:
        # Each eager connection is worth an event, for its first message goes through TCP.
        where: dict[str, Any] = {"family": socket.AF_INET, "host": "127.0.0.1", "port": port}
        deadline = time.monotonic() + 30
        while read_counter(host.pin_dir, "events_lost") == lost and time.monotonic() < deadline:
            server.begin("serve", listener="door", seconds=2.2)
            client.begin("churn", **where, seconds=2.0, seed=2, together=20, rounds=2, largest=100)
            assert client.finish()["wrong"] == 0
            server.finish()
        assert read_counter(host.pin_dir, "events_lost") > lost
        waiting.pingpong(60)
        # Must drain, and cannot say so.
        victims[0].client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        for pair in victims:
            pair.pingpong(30)
    finally:
        os.kill(host.daemon.pid, signal.SIGCONT)
    host.wait_flow(victims[0], "paired")
    host.make_hot(waiting)
    _check_spliced(host, [*victims[1:], waiting])
    for pair in victims:
        pair.verify()


def test_more_hints_than_are_kept(host: Host, lab: Lab, victims: list[Pair]) -> None:
    """SYNs from tens of thousands of invented clients to an eager port: eager connections of others work, and
    are spliced afterwards as before."""
    hostile = Hostile(host, [f"10.99.0.{number}" for number in range(1, 4)], host.cgroup.child("tenant"))
    hostile.begin(
        "answer_syns",
        clients=[f"10.99.0.{number}" for number in range(1, 4)],
        ports=[1024, 21_024],
        service=EAGER,
        seconds=60,
    )
    made = 0
    while hostile.is_waiting(0.05):
        newcomer = host.pair(lab, port=EAGER)
        newcomer.pingpong(30)
        newcomer.verify()
        newcomer.close()
        made += 1
    assert hostile.finish() == 60_000
    assert made > 1
    _check_spliced(host, victims)
    for _ in range(3):
        late = host.pair(lab, port=EAGER)
        late.pingpong(3)
        flow = host.flow(late)
        if flow["reason"] != "unaccepted":
            break  # else its server was not let run before its first read
    host.wait_flow(late, "spliced")
    late.verify()


def test_invented_hint_for_a_connection_to_another_machine(host: Host, lab: Lab) -> None:
    """Somebody pretends that a listener on this host answers a client that talks to another machine. The
    client may be in the SOCKHASH for a moment; it gets its bytes, FIONREAD counts them, and it is taken
    out."""
    client, remote = host.peer(lab, "a"), host.peer(lab, "far", inside=False)
    hostile = Hostile(host, [lab.address("a")], host.cgroup.child("tenant"))
    source = (lab.address("a"), 22_201)
    hostile.call("answer_syns", clients=[source[0]], ports=[source[1], source[1] + 1], service=EAGER)
    pair = host.connect(client, remote, lab.address("far"), port=EAGER, source=source)
    pair.pingpong(1)
    pair.server.send(100)
    counted = "FIONREAD counts them, or a reader that relies on it would wait for bytes that are there"
    wait_until(counted, lambda: pair.client.fionread() == 100, timeout=0.5)
    assert pair.client.recv(100) == 100
    pair.pingpong(50)
    wait_until("it is out of the SOCKHASH", lambda: host.count_spliced() == 0, timeout=2.0)
    pair.pingpong(50)
    pair.verify()
    assert host.find_flow(pair) is None


def test_every_place_at_the_rendezvous_is_overwritten(host: Host, lab: Lab, victims: list[Pair]) -> None:
    """Between a client's arrival and its server's somebody has taken its place, as thousands of
    connections at once would: the connection is plain and works, and the next one is spliced."""
    pair, _ = dial(host, lab, host.peer(lab, "a"), host.peer(lab, "b"))
    slots = libbpf.Map.open(str(host.pin_dir / "maps" / "rendezvous"))
    for number in range(SLOTS):
        value = slots.get(struct.pack("=I", number))
        assert value is not None
        slots.set(struct.pack("=I", number), struct.pack("=2I", number, 7) + value[8:])
    slots.close()
    known = len(host.daemon.flows())
    pair.client.send(64)
    host.accept(pair)
    assert pair.server.recv(64) == 64
    assert len(host.daemon.flows()) == known
    assert pair.client.report()["sent_sum"] == pair.server.report()["received_sum"]
    late = host.hot_pair(lab)
    late.verify()
    _check_spliced(host, victims)


def test_splicing_readers_are_crowded_out(host: Host, lab: Lab) -> None:
    """Thousands of processes read with splice(2), so that others that do are forgotten: one of these is found
    out again by the way it reads, and loses nothing."""
    pair = host.pair(lab)
    pair.client.send(300, chunk=100)
    assert pair.server.splice_in(count=300) == 300
    splicers = libbpf.Map.open(str(host.pin_dir / "maps" / "splicers"))
    own = struct.pack("=I", pair.server.peer.pid)
    pair.client.send(300, chunk=100)
    assert pair.server.splice_in(count=300) == 300
    wait_until("it was seen", lambda: own in dict(splicers.items()))
    for number in range(4 * SPLICERS):
        splicers.set(struct.pack("=I", 10_000_000 + number), struct.pack("=2I", 1, SPLICE))
    splicers.delete(own)  # the kernel may have kept it all the same
    splicers.close()
    server = pair.server.peer
    again = host.connect(host.peer(lab, "a"), server, lab.address("b"))
    for _ in range(60):
        again.client.send(50)
        assert again.server.splice_in(count=50) == 50
        again.server.send(50)
        assert again.client.recv(50) == 50
    flow = host.flow(again)
    assert (flow["state"], flow["reason"]) == ("paired", "splice_reader")
    again.verify()
