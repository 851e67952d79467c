# SPDX-License-Identifier: Apache-2.0
"""A spliced sender whose memory cgroup has no memory left for sockets. TCP has always some in reserve; a send
that is to be redirected has not, and nothing would ever tell its sender that there is some again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak.hierarchy import find_v1
from support.daemon import wait_until
from support.host import SERVICES, Host
from support.lab import Lab
from support.players import HABITS, Pair, Peer

UNLIMITED = 1 << 40
# A message is more than a page, since a socket may keep what is left of its last one, and less than the
# smallest send buffer, since what would not fit into that is always granted.
CHUNK, TOTAL = 4_200, 420_000
HELD = 60_000
# The watch looks once a second; then the pair has to be taken out.
PATIENCE = 8.0  # seconds of the machine
# What a peer is given by its own clock, which goes on when the machine stands still.
LONGEST = 20.0  # seconds
PORT = 7171
LIMIT, USED = "memory.kmem.tcp.limit_in_bytes", "memory.kmem.tcp.usage_in_bytes"


class SocketMemory:
    """A memory cgroup of version 1, which alone can bound the memory of TCP sockets and nothing else."""

    def __init__(self, hierarchy: Path, name: str) -> None:
        self._hierarchy = hierarchy
        self._homes: dict[int, str] = {}
        self.path = hierarchy / name
        self.path.mkdir()

    def open(self) -> None:
        """Without a limit nothing is charged, and never is to sockets that were made before there was one."""
        self.free()

    def add(self, peer: Peer) -> None:
        """Sockets that the peer makes from now on are charged here."""
        groups = Path(f"/proc/{peer.pid}/cgroup").read_text().splitlines()
        [home] = [line.split(":", 2)[2] for line in groups if "memory" in line.split(":")[1].split(",")]
        self._homes[peer.pid] = home.lstrip("/")
        (self.path / "cgroup.procs").write_text(str(peer.pid))

    def is_steady(self) -> bool:
        """Does the usage stay as it is for a moment? It is in bytes."""
        before = self._read_usage()
        time.sleep(0.2)
        return before == self._read_usage()

    def limit(self) -> None:
        """Leave nothing beyond what is used."""
        (self.path / LIMIT).write_text(str(self._read_usage()))

    def _read_usage(self) -> int:
        return int((self.path / USED).read_text())

    def free(self) -> None:
        (self.path / LIMIT).write_text(str(UNLIMITED))

    def remove(self) -> None:
        """Whoever is in it goes home first."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (self._hierarchy / self._homes[int(pid)] / "cgroup.procs").write_text(pid)
        wait_until("the memory cgroup is removed", self._try_remove)

    def _try_remove(self) -> bool:
        with contextlib.suppress(OSError):
            self.path.rmdir()
        return not self.path.exists()


@pytest.fixture
def memory(host: Host) -> Iterator[SocketMemory]:
    hierarchy = find_v1("memory")
    if hierarchy is None:
        pytest.skip("no memory controller of cgroup version 1, and no other bounds what sockets take alone")
    # Of the same name as the tests' version 2 cgroup, so that support/leftovers.py finds it.
    made = SocketMemory(hierarchy, host.cgroup.path.name)
    try:
        if not (made.path / LIMIT).exists():
            pytest.skip(f"the memory controller has no {LIMIT} on this kernel")
        made.open()
        yield made
    finally:
        made.remove()


def _hot_pair(host: Host, lab: Lab, memory: SocketMemory, edge: bool) -> Pair:
    """A spliced connection whose client is in the memory cgroup, and looks for EPOLLOUT since long ago."""
    sender = host.peer(lab, "a", program=HABITS)
    memory.add(sender)
    pair = host.connect(sender, host.peer(lab, "b"), lab.address("b"), port=PORT)
    host.make_hot(pair)
    pair.client.watch_room(edge=edge)
    return pair


def _exhaust(host: Host, lab: Lab, memory: SocketMemory) -> None:
    """All that the group's sockets may have is held by another connection of it, whose reader does not read.

    It is at rest when the limit is set: one that wanted more would drop packets and give some back.
    """
    hog = host.peer(lab, "a")
    memory.add(hog)
    pair = host.connect(hog, hog, "127.0.0.1")
    pair.client.send(HELD)
    assert pair.server.wait_fionread(count=HELD) == HELD
    wait_until("the usage is steady", memory.is_steady)
    memory.limit()


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


def _check_whole(host: Host, memory: SocketMemory, pair: Pair) -> None:
    """With memory the connection is as any other."""
    memory.free()
    host.make_hot(pair, timeout=10.0)
    pair.verify()


EDGES = pytest.mark.parametrize("edge", [False, True], ids=["level", "edge"])


@EDGES
def test_sender_without_memory(host: Host, lab: Lab, memory: SocketMemory, edge: bool) -> None:
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
def test_drained_without_memory(host: Host, lab: Lab, memory: SocketMemory, edge: bool) -> None:
    """The operator drains before the watch has seen it. What is taken out at rest has to be woken as well."""
    pair = _hot_pair(host, lab, memory, edge)
    _exhaust(host, lab, memory)
    left = _send_until_refused(pair)
    host.daemon.drain()
    _send_the_rest(pair, left)
    _check_whole(host, memory, pair)


@EDGES
def test_switched_off_without_memory(host: Host, lab: Lab, memory: SocketMemory, edge: bool) -> None:
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
