# SPDX-License-Identifier: Apache-2.0
"""Hazards of readers and of socket options, one or a few tests for each row of HAZARDS.md that is named."""

from __future__ import annotations

import socket
import statistics
import struct
from collections.abc import Iterator

import pytest
from support.daemon import wait_until
from support.host import ALLOW, Host
from support.hostile import read_map
from support.lab import Lab
from support.meddler import in_foreign_sockhash
from support.pauses import Stopwatch
from support.players import QUIRKS, Pair, Peer
from support.wire import Wire

from splicer.kernel import libbpf
from splicer.policy.reconciler import QUEUE_BYTES

HOT_READS = 16
TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE = 19, -1
SO_ATTACH_FILTER, TCP_CONGESTION, NO_OPTION = 26, 13, 200


@pytest.fixture
def host(host: Host) -> Iterator[Host]:
    """The host without connections of earlier tests."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    return host


def _read_at_server(pair: Pair, messages: int) -> None:
    """So many reads by the server while the client reads nothing: the connection is not hot."""
    for _ in range(messages):
        pair.client.send(64)
        assert pair.server.recv(64) == 64


# row 34


def test_fewer_reads_than_needed(host: Host, lab: Lab) -> None:
    """Fifteen reads at each end leave a connection cold, though others become hot meanwhile; five more do
    not."""
    pair = host.pair(lab)
    pair.pingpong(HOT_READS - 1)
    host.hot_pair(lab)
    flow = host.flow(pair)
    assert (flow["state"], flow["reason"]) == ("paired", "cold")
    host.talk_until(pair, "spliced", rounds=5)
    pair.verify()


# row 19


def test_wait_all_after_adoption_under_allow(wire: Wire) -> None:
    """A known difference: with blocking = "allow", MSG_WAITALL on a connection that is spliced already gets
    what is there. Plain TCP waits for all."""
    pair = wire.hot_pair(port=ALLOW, blocking=(False, True))
    pair.server.begin("recv_once", count=900, flags=socket.MSG_WAITALL)
    pair.client.send(300)
    if wire.spliced:
        assert pair.server.finish() == 300
        pair.client.send(600)
        assert pair.server.recv(600) == 600
    else:
        assert pair.server.peer.is_waiting(0.2)
        pair.client.send(600)
        assert pair.server.finish() == 900
    pair.verify()


# row 20


def test_splice_after_the_first_reads(host: Host, lab: Lab) -> None:
    """A reader that has done all the reads that make an end hot, and then one splice(2) while its connection
    is still plain, is not spliced when the other end has become hot, too."""
    pair = host.pair(lab)
    _read_at_server(pair, 2 * HOT_READS)
    pair.client.send(64)
    assert pair.server.splice_in(count=64) == 64
    host.watch_cold(pair, "splice_reader")
    assert host.count_spliced() == 0
    pair.verify()


@pytest.mark.parametrize("how", ["drained", "option"])
def test_splice_after_the_way_back(host: Host, lab: Lab, how: str) -> None:
    """The same for a connection that was spliced and is plain again: after `splicer drain`, and in the
    cool-down after an option was asked for."""
    pair = host.hot_pair(lab)
    if how == "drained":
        host.daemon.drain()
        host.wait_flow(pair, "paired")
    else:
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        host.wait_flow(pair, "paired", "rcvlowat")
    pair.client.send(64)
    assert pair.server.splice_in(count=64) == 64
    # The cool-down is a second.
    host.watch_cold(pair, "splice_reader", seconds=0.6 if how == "drained" else 1.5)
    assert host.count_spliced() == 0
    pair.verify()


# row 21


def test_pid_of_a_process_that_spliced(host: Host, lab: Lab) -> None:
    """What is remembered of a process does not hold for one that was born at another time and has its pid."""
    # Without Nagle, or the server would get fewer segments than messages.
    options: tuple[list[list[int]], list[list[int]]] = ([[socket.IPPROTO_TCP, socket.TCP_NODELAY, 1]], [])
    server = host.peer(lab, "b")
    pair = host.connect(host.peer(lab, "a"), server, lab.address("b"), options=options)
    pair.client.send(300, chunk=100)
    assert pair.server.splice_in(count=300) == 300
    pid = struct.pack("=I", server.pid)
    wait_until("it was seen", lambda: pid in read_map(host, "splicers"))
    splicers = libbpf.Map.open(str(host.pin_dir / "maps" / "splicers"))
    try:
        born = splicers.get(pid)
        assert born is not None
        splicers.set(pid, struct.pack("=I", struct.unpack_from("=I", born)[0] - 1) + born[4:])
        later = host.connect(host.peer(lab, "a"), server, lab.address("b"))
        host.make_hot(later)
    finally:
        splicers.delete(pid)
        splicers.close()
    later.verify()


# row 23


def _hot_pairs(host: Host, lab: Lab, client: Peer, count: int) -> list[Pair]:
    """Spliced connections between a client and a process that has not spliced so far."""
    server = host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(count)]
    for pair in pairs:
        host.make_hot(pair)
    return pairs


def _read_with_splice(pairs: list[Pair]) -> None:
    for pair in pairs:
        pair.client.send(1000)
        assert pair.server.splice_in(count=1000) == 1000
        pair.verify()


def test_splice_on_several_connections_at_once(host: Host, lab: Lab) -> None:
    """A known difference: on each connection on which a process splices before the watch has come,
    redirected bytes that wait stay unseen until recv(2) gets them. What comes afterwards is seen."""
    pairs = _hot_pairs(host, lab, host.peer(lab, "a"), 4)
    _leave_unseen(host, pairs)
    for pair in pairs:
        assert pair.server.attempt("splice_nothing") == "EAGAIN"
        assert pair.server.recv(1000) == 1000
    for pair in pairs:
        host.wait_flow(pair, "paired", "splice_reader")
    _read_with_splice(pairs)


def test_what_follows_a_splice_waits_its_turn(host: Host, lab: Lab) -> None:
    """Guaranteed: what is sent after a splice(2) that came too late does not overtake the redirected bytes
    that it did not see. It waits behind them, whoever splices meanwhile, and recv(2) gets all in order."""
    pairs = _hot_pairs(host, lab, host.peer(lab, "a"), 3)
    _leave_unseen(host, pairs)
    for pair in pairs:
        # Long ones too: of several elements, each with a verdict of its own.
        for size in (1000, 100_000, 1):
            pair.client.send(size)
            assert pair.server.attempt("splice_nothing") == "EAGAIN"
        assert pair.server.recv(102_001) == 102_001
        host.wait_flow(pair, "paired", "splice_reader")
    _read_with_splice(pairs)


def test_too_much_for_one_who_does_not_see_it(host: Host, lab: Lab) -> None:
    """A known difference: where more follows than may wait redirected, the sender is told EACCES. TCP bytes
    would be read before those that wait, and a wrong byte is worse than a broken connection."""
    (pair,) = _hot_pairs(host, lab, host.peer(lab, "a"), 1)
    _leave_unseen(host, [pair])
    sent = 1000
    while (answer := pair.client.attempt("send", count=100_000)) == 100_000:
        sent += 100_000
        assert sent <= QUEUE_BYTES
    assert answer == "EACCES"
    assert pair.server.attempt("splice_nothing") == "EAGAIN"
    # Of the last one some elements went.
    waiting = pair.server.wait_fionread(count=sent)
    assert pair.server.recv(waiting) == waiting
    assert pair.server.report()["first_wrong"] is None
    host.wait_flow(pair, "paired", "splice_reader")


def _leave_unseen(host: Host, pairs: list[Pair]) -> None:
    """Redirected bytes wait at the servers, which have spliced and not seen them."""
    for pair in pairs:
        pair.client.send(1000)
        assert pair.server.wait_fionread(count=1000) == 1000
    for pair in pairs:
        assert pair.server.attempt("splice_nothing") == "EAGAIN"
    for pair in pairs:
        host.wait_flow(pair, "draining", "splice_reader")


def test_others_of_a_process_that_begins_to_splice(host: Host, lab: Lab) -> None:
    """Its other connections go back at once, and not when the daemon looks at them anyway, once a second:
    of seven processes most have theirs back after half as long as that would take."""
    client, waited = host.peer(lab, "a"), []
    for _ in range(7):
        first, other = _hot_pairs(host, lab, client, 2)
        with Stopwatch() as watch:
            assert first.server.attempt("splice_nothing") == "EAGAIN"
            host.wait_flow(other, "paired", "splice_reader")
        waited.append(watch.seconds)
        _read_with_splice([first, other])
    assert statistics.median(waited) < 0.25, waited


# row 26


def test_socket_filter(host: Host, lab: Lab) -> None:
    """A socket with a filter of its own stays plain."""
    pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b", program=QUIRKS), lab.address("b"))
    pair.server.attach_filter()
    host.watch_cold(pair, "socket_filter")
    assert host.count_spliced() == 0
    pair.verify()


def test_under_repair(host: Host, lab: Lab) -> None:
    """An end that is under repair when its connection becomes hot is not spliced before it is repaired."""
    # Without Nagle, or the client would get a few large segments and not be looked at.
    options: tuple[list[list[int]], list[list[int]]] = ([], [[socket.IPPROTO_TCP, socket.TCP_NODELAY, 1]])
    pair = host.pair(lab, options=options)
    messages = 2 * HOT_READS
    _read_at_server(pair, messages)
    pair.server.send(64 * messages, chunk=64)
    assert pair.client.wait_fionread(count=64 * messages) == 64 * messages
    pair.server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    assert pair.client.recv(64 * messages, at_most=64) == 64 * messages
    host.wait_flow(pair, "paired", "repair")
    assert host.count_spliced() == 0
    pair.server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
    host.make_hot(pair)
    pair.verify()


def test_read_by_a_kernel_worker(host: Host, lab: Lab) -> None:
    """A connection that a kernel worker of io_uring reads stays plain."""
    server = host.peer(lab, "b", program=QUIRKS)
    if server.attempt("open_ring") in ("ENOSYS", "EPERM"):
        pytest.skip("there is no io_uring, or it is switched off")
    pair = host.connect(host.peer(lab, "a"), server, lab.address("b"))
    for _ in range(3):
        pair.server.begin("echo_by_worker", rounds=HOT_READS, size=64)
        pair.client.pingpong(rounds=HOT_READS)
        assert pair.server.finish() == HOT_READS
        flow = host.flow(pair)
        assert flow["state"] == "paired", flow
    host.wait_flow(pair, "paired", "kernel_socket")
    assert host.count_spliced() == 0
    pair.verify()


@pytest.mark.parametrize("at", ["client", "server"])
def test_foreign_psock(host: Host, lab: Lab, at: str) -> None:
    """A socket that is in somebody else's SOCKHASH is not spliced while it is, and works; then it is. Nor
    does the other end stay in ours, where FIONREAD may not count what it gets."""
    pair = host.connect(
        host.peer(lab, "a", program=QUIRKS), host.peer(lab, "b", program=QUIRKS), lab.address("b")
    )
    taken = pair.client if at == "client" else pair.server
    with in_foreign_sockhash(taken.peer.pid, taken.fileno()):

        def is_refused() -> bool:
            pair.pingpong(40)
            flow = host.flow(pair)
            assert flow["redirected_messages"] == 0
            return (flow["state"], flow["reason"]) == ("paired", "foreign_psock")

        # The other end may go in first, and out again.
        wait_until("it is refused", is_refused)
        assert host.count_spliced() == 0
        pair.verify()
    host.make_hot(pair)
    pair.verify()


def test_tls_before(host: Host, lab: Lab) -> None:
    """A socket with TLS in the kernel stays plain."""
    pair = host.pair(lab)
    if pair.client.attempt("set_ulp", name="tls") == "ENOENT":
        pytest.skip("this kernel has no TLS")
    host.watch_cold(pair, "ulp")
    assert host.count_spliced() == 0
    pair.verify()


# row 30

BAD_ADDRESS = 1
SIZES = (0, 4, 100, 4096, 4097, 70_000)
QUESTIONS = [
    (level, option, size, address)
    for level, option in (
        (socket.IPPROTO_TCP, NO_OPTION),
        (socket.IPPROTO_TCP, TCP_CONGESTION),
        (socket.IPPROTO_TCP, TCP_REPAIR),
        (socket.IPPROTO_IP, NO_OPTION),
        (socket.SOL_SOCKET, SO_ATTACH_FILTER),
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT),
    )
    for size in SIZES
    for address in (None, BAD_ADDRESS)
]


def test_answers_of_setsockopt(host: Host, lab: Lab) -> None:
    """setsockopt(2) below the cgroup fails as it does elsewhere, or does not, whatever the size. A known
    difference: the kernel copies the value for the programs of the cgroup first, so a bad address is EFAULT
    where an option that nobody knows would have been refused without a look at it."""
    answers = []
    for inside in (False, True):
        client, server = (
            host.peer(lab, "a", inside=inside),
            host.peer(lab, "b", inside=inside, program=QUIRKS),
        )
        pair = host.connect(client, server, lab.address("b"))
        answers.append(
            {
                each: pair.server.ask(level=each[0], option=each[1], size=each[2], address=each[3])
                for each in QUESTIONS
            }
        )
        pair.verify()
    outside, inside_it = answers
    assert {"OK", "EINVAL", "EFAULT", "ENOPROTOOPT"} <= set(outside.values())
    differing = {each for each in QUESTIONS if outside[each] != inside_it[each]}
    assert differing == {each for each in QUESTIONS if each[0] == socket.IPPROTO_IP and each[2] and each[3]}
    assert {inside_it[each] for each in differing} == {"EFAULT"}
