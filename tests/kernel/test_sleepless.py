# SPDX-License-Identifier: Apache-2.0
"""Readers whose sockets block and whose reads do not sleep: they wait in poll(2) or the like, or ask not to
wait. They are spliced. Who sleeps in a read is not, however seldom."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.hostile import read_map
from support.lab import Lab
from support.players import HABITS, End, Pair, Peer, stopped
from support.tiers import spread
from support.trees import copy_changed

WAYS = ("poll", "select", "epoll", "dontwait")
SIDES = ("server", "client")
PAUSE = 0.002  # seconds, in which a reader gets to where it waits
SYS_PIDFD_GETFD = 438
PATIENCE = 20.0  # seconds; a reader that was not seen waiting often enough is tried again later


def _peers(host: Host, lab: Lab) -> tuple[Peer, Peer]:
    client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
    return client, server


def _connect(
    host: Host, lab: Lab, peers: tuple[Peer, Peer], sides: tuple[str, ...], port: int = 0, **manner: Any
) -> Pair:
    pair = host.connect(*peers, lab.address("b"), port=port)
    for side in sides:
        end: End = getattr(pair, side)
        end.wait_in(**manner)
    return pair


def _heat(host: Host, pair: Pair) -> None:
    """Until it is spliced, and all that is new is redirected."""
    host.make_hot(pair, timeout=PATIENCE)
    before = host.flow(pair)["redirected_messages"]
    pair.pingpong(20)
    assert host.flow(pair)["redirected_messages"] >= before + 30


def _count_redirected(host: Host, pair: Pair) -> int:
    return int(host.flow(pair)["redirected_messages"])


def _exchange(pair: Pair, rounds: int, side: str) -> None:
    """So many messages each way. This side is where it waits, or asleep in its read, when one comes for it:
    with pauses instead it would be late now and then, and find what has come before."""
    reader, writer = (pair.server, pair.client) if side == "server" else (pair.client, pair.server)
    for _ in range(rounds):
        reader.begin("recv", count=64)
        wait_until(f"the {side} waits", reader.peer.is_asleep_for_data, pause=0.0002)
        writer.send(64)
        assert reader.finish() == 64
        reader.send(64)
        assert writer.recv(64) == 64


def _stay_refused(host: Host, pair: Pair, side: str, attempts: int = 4) -> None:
    """However often it is tried again, it is refused, and nothing is redirected."""
    before = _count_redirected(host, pair)
    for _ in range(attempts):
        host.forget_cool_downs()
        _exchange(pair, 24, side)
        host.wait_flow(pair, "paired", "blocking_reader")
    assert _count_redirected(host, pair) == before


@pytest.mark.parametrize("side", spread(SIDES, ["server"], "the same from the other end"))
@pytest.mark.parametrize("way", WAYS)
def test_who_waits_elsewhere_is_spliced(host: Host, lab: Lab, way: str, side: str) -> None:
    pair = _connect(host, lab, _peers(host, lab), (side,), way=way)
    _heat(host, pair)
    pair.verify()
    assert getattr(pair, side).report()["spurious"] == 0


def test_both_ends_wait_elsewhere(host: Host, lab: Lab) -> None:
    pair = _connect(host, lab, _peers(host, lab), SIDES, way="poll")
    _heat(host, pair)
    pair.verify()
    assert pair.client.report()["spurious"] == pair.server.report()["spurious"] == 0


def _verify_refused(host: Host, pair: Pair) -> None:
    """It is plain for that reason, and nothing of it was ever redirected."""
    host.wait_flow(pair, "paired", "blocking_reader")
    assert _count_redirected(host, pair) == 0
    pair.verify()


@pytest.mark.parametrize("side", spread(SIDES, ["server"], "the same from the other end"))
@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("way", ["poll", "epoll"])
def test_who_sleeps_in_a_read_is_refused(host: Host, lab: Lab, way: str, every: int, side: str) -> None:
    """One sleep in eight reads is enough. That its socket is in an epoll set as well says nothing."""
    pair = _connect(host, lab, _peers(host, lab), (side,), way=way, sleep_every=every)
    _exchange(pair, 40, side)
    _stay_refused(host, pair, side)
    assert _count_redirected(host, pair) == 0
    pair.verify()
    assert getattr(pair, side).report()["spurious"] == 0


def test_who_sleeps_within_a_request_is_refused(host: Host, lab: Lab) -> None:
    """It polls for the beginning of a message and sleeps for the rest, while its peer only sends: nobody but
    its own reads can tell."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll", sleep_every=2)
    for _ in range(40):
        pair.server.begin("recv", count=200)
        pair.client.send(100)
        pair.server.peer.is_waiting(PAUSE)
        pair.client.send(100)
        assert pair.server.finish() == 200
        pair.server.send(10)
        assert pair.client.recv(10) == 10
    _verify_refused(host, pair)


def test_who_is_never_seen_waiting_is_refused(host: Host, lab: Lab) -> None:
    """Its socket blocks, and all that it reads is there before. What it does where nothing is there, nobody
    knows."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll", sleep_every=1)
    for _ in range(40):
        pair.client.send(64)
        pair.server.wait_fionread(count=64)
        assert pair.server.recv(64) == 64
        pair.server.send(64)
        assert pair.client.recv(64) == 64
    _verify_refused(host, pair)


def test_waiting_for_all_is_refused(host: Host, lab: Lab) -> None:
    """MSG_WAITALL sleeps until all is there, whatever was polled before."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll")
    for _ in range(40):
        pair.server.begin("recv", count=64, flags=socket.MSG_WAITALL)
        pair.client.send(64)
        assert pair.server.finish() == 64
        pair.server.send(64)
        assert pair.client.recv(64) == 64
    _verify_refused(host, pair)


@pytest.mark.parametrize("side", spread(SIDES, ["server"], "the same from the other end"))
@pytest.mark.parametrize("way", ["poll", "epoll", "dontwait"])
def test_who_begins_to_sleep_goes_back(host: Host, lab: Lab, way: str, side: str) -> None:
    """The first message to a spliced end that sleeps finds it asleep. It goes back, no byte is lost, and it
    is not spliced again."""
    peers = _peers(host, lab)
    pair = _connect(host, lab, peers, (side,), way=way)
    _heat(host, pair)
    getattr(pair, side).wait_in(way="poll", sleep_every=1)
    pair.pingpong(3, pause=PAUSE)
    host.wait_flow(pair, "paired", "blocking_reader", rounds=2)
    _stay_refused(host, pair, side)
    pair.verify()
    assert getattr(pair, side).report()["spurious"] == 0


def test_the_process_is_remembered(host: Host, lab: Lab) -> None:
    """Another connection of it is refused, though it polls there; one that asks not to wait is spliced."""
    peers = _peers(host, lab)
    pair = _connect(host, lab, peers, ("server",), way="poll")
    _heat(host, pair)
    pair.server.wait_in(way="poll", sleep_every=1)
    pair.pingpong(3, pause=PAUSE)
    wait_until("it is known", lambda: struct.pack("=I", peers[1].pid) in read_map(host, "sleepers"))
    other = _connect(host, lab, peers, ("server",), way="poll")
    other.pingpong(40)
    _stay_refused(host, other, "server")
    careful = _connect(host, lab, peers, ("server",), way="dontwait")
    _heat(host, careful)
    elsewhere = _connect(host, lab, _peers(host, lab), ("server",), way="poll")
    _heat(host, elsewhere)
    for each in (pair, other, careful, elsewhere):
        each.verify()


def test_who_sleeps_and_is_sent_nothing_goes_back(host: Host, lab: Lab) -> None:
    """The watch finds it. What is sent at last wakes it."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll")
    _heat(host, pair)
    pair.server.wait_in(way="poll", sleep_every=1)
    pair.server.begin("hear", count=5, timeout=20.0)

    def is_on_its_way() -> bool:
        flow = host.flow(pair)
        return flow["state"] != "spliced" and flow["reason"] == "blocking_reader"

    wait_until("the watch has seen it", is_on_its_way)
    pair.client.say("hello")
    assert pair.server.finish() == "hello"
    host.wait_flow(pair, "paired", "blocking_reader", rounds=2)
    pair.verify()
    assert pair.server.report()["spurious"] == 0


def _borrow_socket(pair: Pair) -> socket.socket:
    """The server's socket, with a descriptor in this process: O_NONBLOCK is the same for both."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = pair.server.peer.pid
    handle = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("socket:"):
                continue
            sock = socket.socket(fileno=libc.syscall(SYS_PIDFD_GETFD, handle, int(entry.name), 0))
            if sock.getpeername() == pair.client.local:
                return sock
            sock.close()
    finally:
        os.close(handle)
    raise AssertionError("the server has no such socket")


def test_asleep_since_before_its_flag_was_set(host: Host, lab: Lab) -> None:
    """A thread sleeps in a read, and another one sets O_NONBLOCK meanwhile. The connection becomes hot, stays
    plain, and what is sent wakes the thread."""
    pair = host.pair(lab)
    for _ in range(20):
        pair.client.send(64)
        assert pair.server.recv(64) == 64
    pair.server.setblocking(blocking=True)
    pair.server.begin("hear", count=5)
    with _borrow_socket(pair) as sock:
        assert pair.server.peer.is_waiting(0.1)
        os.set_blocking(sock.fileno(), False)
        for _ in range(40):
            sock.send(b"x")
            assert pair.client.hear(1) == "x"
        host.wait_flow(pair, "paired", "blocking_reader")
        pair.client.say("hello")
        assert pair.server.finish() == "hello"


def _is_seen_asleep(host: Host, pair: Pair) -> bool:
    """Has either end of it been seen asleep in a read? struct end in bpf/types.h."""
    size = struct.calcsize("=4I 4I Q 2I 3Q 2I H 2B 3I")
    for value in read_map(host, "pairs").values():
        if struct.unpack_from("=I", value, 16 + 40)[0] == pair.client.local[1]:
            ends = [struct.unpack_from("=80x H 2B", value, 16 + side * size) for side in (0, 1)]
            assert ends[1][0] > 0, "it has read nothing"
            return any(asleep for _, _, asleep in ends)
    raise AssertionError("there is no such pair")


def test_who_waits_for_room_does_not_sleep_in_a_read(host: Host, lab: Lab) -> None:
    """A blocking sender sleeps in the same queue. It is not taken for a reader, plain or spliced."""
    peers = _peers(host, lab)
    pair = _connect(host, lab, peers, ("server",), way="poll")
    count = 8_000_000
    pair.pingpong(5)
    pair.server.begin("send", count=count, chunk=count, timeout=20.0)
    assert pair.server.peer.is_waiting(0.1), "the sender was not held back"
    for _ in range(12):
        assert pair.client.recv(20_000) == 20_000
    assert pair.client.recv(count - 12 * 20_000, timeout=20.0) == count - 12 * 20_000
    assert pair.server.finish() == count
    assert not _is_seen_asleep(host, pair)
    host.make_hot(pair, timeout=PATIENCE)
    pair.server.begin("send", count=count, chunk=50_000, timeout=20.0)
    assert pair.server.peer.is_waiting(0.1), "the sender was not held back"
    pair.client.send(100)
    assert pair.client.recv(count, timeout=20.0) == count
    assert pair.server.finish() == count
    assert pair.server.recv(100) == 100
    assert struct.pack("=I", peers[1].pid) not in read_map(host, "sleepers")
    pair.verify()


@pytest.mark.parametrize("way", ["poll", "epoll"])
def test_stopped_and_continued(host: Host, lab: Lab, way: str) -> None:
    """SIGSTOP and SIGCONT, as of a debugger, where it waits: it reads what came meanwhile, and stays."""
    peers = _peers(host, lab)
    pair = _connect(host, lab, peers, ("server",), way=way)
    _heat(host, pair)
    for _ in range(5):
        pair.server.begin("echo", rounds=1)
        with stopped(peers[1]):
            pair.client.send(64)
        assert pair.client.recv(64) == 64
        pair.server.finish()
    assert host.flow(pair)["state"] == "spliced"
    pair.verify()
    assert pair.server.report()["spurious"] == 0


@pytest.mark.parametrize("edge", [False, True])
def test_who_believes_fionread(host: Host, lab: Lab, edge: bool) -> None:
    """It polls, asks how much there is, and reads as much, on a socket that blocks: spliced, taken back by an
    operator and spliced again, nothing is left waiting."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll")
    for _ in range(4):
        _heat(host, pair)
        pair.server.peer.begin("recv_told", conns=[pair.server.conn], count=40 * 500, edge=edge)
        for number in range(40):
            pair.client.send(500)
            if number == 20:
                host.daemon.drain()
        pair.server.finish()
        host.forget_cool_downs()
    pair.verify()
    assert pair.server.report()["spurious"] == 0


def test_from_the_first_byte(host: Host, lab: Lab) -> None:
    """Eager: an end that blocks is not spliced before it was seen to read."""
    pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll", port=EAGER)
    host.talk_until(pair, "spliced", timeout=PATIENCE)
    pair.pingpong(20)
    pair.verify()
    assert pair.server.report()["spurious"] == 0


def _is_told(host: Host, told: str) -> bool:
    return bool(host.daemon.status()["blocking_readers"] == told)


def test_kernel_on_which_nobody_can_tell(lab: Lab, tmp_path: Path) -> None:
    """All whose reads could sleep are refused then, and the log and `splicer status` say so. Who asks not to
    wait is spliced."""
    tree = copy_changed(
        tmp_path / "tree",
        "splicer/kernel/probes.py",
        'if platform.machine() != "x86_64":',
        "if platform.machine():",
    )
    with Host(start=False) as host:
        host.prefix = ("env", f"PYTHONPATH={tree}")
        host.start()
        assert '"sleepers_not_told_apart"' in host.daemon.log.read_text()
        assert _is_told(host, "refused")
        pair = _connect(host, lab, _peers(host, lab), ("server",), way="poll")
        pair.pingpong(40)
        _stay_refused(host, pair, "server")
        careful = _connect(host, lab, _peers(host, lab), ("server",), way="dontwait")
        _heat(host, careful)
        for each in (pair, careful):
            each.verify()


def test_kernel_on_which_one_can_tell(host: Host) -> None:
    assert _is_told(host, "told apart")
