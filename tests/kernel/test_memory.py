# SPDX-License-Identifier: Apache-2.0
"""A spliced sender whose memory cgroup has no memory left for sockets. TCP has always some in reserve; a send
that is to be redirected has not, and nothing would ever tell its sender that there is some again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from support.cgroup import find_v1
from support.daemon import wait_until
from support.host import SERVICES, Host
from support.lab import Lab
from support.memory import Bound, can_bound_sockets
from support.players import HABITS, Pair

# A message is more than a page, since a socket may keep what is left of its last one, and less than the
# smallest send buffer, since what would not fit into that is always granted.
CHUNK, TOTAL = 4_200, 420_000
HELD = 60_000
# The watch looks once a second; then the pair has to be taken out.
PATIENCE = 8.0  # seconds of the machine
# What a peer is given by its own clock, which goes on when the machine stands still.
LONGEST = 20.0  # seconds
PORT = 7171


@pytest.fixture
def memory(host: Host) -> Iterator[Bound]:
    found = find_v1("memory")
    if found is None:
        pytest.skip("no memory controller of cgroup version 1, and no other bounds what sockets take alone")
    mount, home = found
    if not can_bound_sockets(mount):
        pytest.skip("the memory controller does not count what sockets hold on this kernel")
    # Of the same name as the tests' version 2 cgroup, so that support/leftovers.py finds it.
    made = Bound(mount / host.cgroup.path.name, home)
    try:
        yield made
    finally:
        made.remove()


def _hot_pair(host: Host, lab: Lab, memory: Bound, edge: bool) -> Pair:
    """A spliced connection whose client is in the memory cgroup, and looks for EPOLLOUT since long ago."""
    sender = host.peer(lab, "a", program=HABITS)
    memory.add(sender.pid)
    pair = host.connect(sender, host.peer(lab, "b"), lab.address("b"), port=PORT)
    host.make_hot(pair)
    pair.client.watch_room(edge=edge)
    return pair


def _exhaust(host: Host, lab: Lab, memory: Bound) -> None:
    """All that the group's sockets may have is held by another connection of it, whose reader does not read.

    It is at rest when the limit is set: one that wanted more would drop packets and give some back.
    """
    hog = host.peer(lab, "a")
    memory.add(hog.pid)
    pair = host.connect(hog, hog, "127.0.0.1")
    pair.client.send(HELD)
    assert pair.server.wait_fionread(count=HELD) == HELD

    def is_steady() -> bool:
        before = memory.count_used()
        time.sleep(0.2)
        return before == memory.count_used()

    wait_until("the usage is steady", is_steady)
    memory.leave(0)


def _send_until_refused(pair: Pair) -> int:
    """The first bytes of TOTAL, until a send is refused, which plain TCP never does; how many are left."""
    pair.server.begin("recv", count=TOTAL, timeout=2 * LONGEST)
    first = pair.client.send_until_full(chunk=CHUNK, limit=TOTAL)
    assert first["stopped"] == "full", "there was memory enough"
    return int(TOTAL - first["bytes"])


def _begin_the_rest(pair: Pair, left: int) -> None:
    print(f"{left} bytes left")
    pair.client.begin("push", count=left, chunk=CHUNK, timeout=LONGEST)


def _finish_the_rest(pair: Pair) -> None:
    print(f"{pair.client.finish()} times refused")
    assert pair.server.finish() == TOTAL


def _send_the_rest(pair: Pair, left: int) -> None:
    _begin_the_rest(pair, left)
    _finish_the_rest(pair)


def _check_whole(host: Host, memory: Bound, pair: Pair) -> None:
    """With memory the connection is as any other."""
    memory.free()
    host.make_hot(pair, timeout=10.0)
    pair.verify()


EDGES = pytest.mark.parametrize("edge", [False, True], ids=["level", "edge"])


@EDGES
def test_sender_without_memory(host: Host, lab: Lab, memory: Bound, edge: bool) -> None:
    """The connection goes back to plain TCP, and its sender is woken although nothing was on its way."""
    pair = _hot_pair(host, lab, memory, edge)
    _exhaust(host, lab, memory)
    left = _send_until_refused(pair)
    _begin_the_rest(pair, left)
    local = f"{pair.client.local[0]}:{pair.client.local[1]}"

    def is_plain() -> bool:
        rows = [(each["local"], each["state"], each["reason"]) for each in host.daemon.flows()]
        return (local, "paired", "memory") in rows

    # It may be spliced again two seconds later.
    wait_until("it is plain for want of memory", is_plain, timeout=PATIENCE)
    _finish_the_rest(pair)
    _check_whole(host, memory, pair)


@EDGES
def test_drained_without_memory(host: Host, lab: Lab, memory: Bound, edge: bool) -> None:
    """The operator drains before the watch has seen it. What is taken out at rest has to be woken as well."""
    pair = _hot_pair(host, lab, memory, edge)
    _exhaust(host, lab, memory)
    left = _send_until_refused(pair)
    host.daemon.drain()
    _send_the_rest(pair, left)
    _check_whole(host, memory, pair)


@EDGES
def test_switched_off_without_memory(host: Host, lab: Lab, memory: Bound, edge: bool) -> None:
    """The same for a change of policy."""
    pair = _hot_pair(host, lab, memory, edge)
    _exhaust(host, lab, memory)
    left = _send_until_refused(pair)
    try:
        host.reload(f'{SERVICES}\n[[policy]]\nports = {PORT}\nmode = "off"\n')
        _send_the_rest(pair, left)
        flow = host.wait_flow(pair, "paired")
        assert flow["reason"] in ("policy_off", "memory")
    finally:
        host.reload(SERVICES)
    _check_whole(host, memory, pair)
