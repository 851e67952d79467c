# SPDX-License-Identifier: Apache-2.0
"""Both ends of a pair go into the SOCKHASH at one moment of rest or not at all, found by their names; and
what slips by all the same is seen (promises 1, 4 and 5 of HAZARDS.md).

Most of these run enlist by hand, where no daemon interferes.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpf import counting_runs, read_runs
from support.daemon import wait_until
from support.enlisting import ByHand, by_hand
from support.host import Host
from support.lab import MIXES, PLACES, Lab
from support.players import HABITS, JUGGLER, Pair
from support.tiers import spread
from support.trees import copy_changed

from splicer.host import namespaces
from splicer.kernel import layout, libbpf
from splicer.kernel.enlist import EnlistRequest
from splicer.kernel.layout import EnlistOutcome, EnlistTask

SO_BINDTOIFINDEX = 62  # include/uapi/asm-generic/socket.h
SO_TIMESTAMP = 29  # the same
EVERYWHERE = "test_splicing.py has the daemon do it for every family everywhere"
OTHER_END = "the same from the other end"
MUTED = struct.Struct("=3Q8x")  # struct muted, bpf/types.h: socket cookie, jiffies, splices
FAR_JIFFIES = 1 << 62
SAME_SOURCE = 22_010  # below the ephemeral ports


@pytest.fixture(scope="module")
def dead_host(_prerequisites: None) -> Iterator[tuple[Host, ByHand]]:
    with Host() as host:
        with by_hand(host) as hand:
            yield host, hand
            host.stop_peers()
        host.start()


@pytest.fixture
def host(dead_host: tuple[Host, ByHand]) -> Host:
    return dead_host[0]


@pytest.fixture
def hand(dead_host: tuple[Host, ByHand]) -> ByHand:
    return dead_host[1]


def _announced(host: Host, hand: ByHand, lab: Lab) -> Pair:
    pair = host.pair(lab)
    hand.announce(pair)
    return pair


def _leave_some(pair: Pair) -> None:
    """Their first reads show both to be readers that leave something behind."""
    pair.pingpong(4)  # before that nobody looks
    for sender, receiver in ((pair.client, pair.server), (pair.server, pair.client)):
        sender.send(400)
        assert receiver.wait_fionread(count=400) == 400
        for _ in range(5):
            receiver.recv(80)


def _expect_redirected(hand: ByHand, pair: Pair, rounds: int = 20) -> None:
    before = hand.record(pair)
    pair.pingpong(rounds)
    after = hand.record(pair)
    for way in ("client_sends", "server_sends"):
        old, new = getattr(before, way), getattr(after, way)
        assert new.redirected_messages == old.redirected_messages + rounds
        assert new.passed_messages == old.passed_messages


# -- the moment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", spread(PLACES, ["loopback", "bridge"], EVERYWHERE))
@pytest.mark.parametrize("mix", spread(MIXES, ["v6", "mapped-to-v4"], EVERYWHERE))
def test_both_ends_at_once(host: Host, hand: ByHand, lab: Lab, mix: str, place: str) -> None:
    """Whatever the family, and whichever namespaces they are in: one run puts both in, without a walk, and
    what is sent then is redirected."""
    client_family, server_family, version, prefix = MIXES[mix]
    client_at, server_at, to = PLACES[place]
    pair = host.connect(
        host.peer(lab, client_at),
        host.peer(lab, server_at),
        prefix + lab.address(to, version),
        client_family=client_family,
        server_family=server_family,
    )
    hand.announce(pair)
    spliced = host.count_spliced()
    hand.put_in(pair)
    assert host.count_spliced() == spliced + 2
    assert hand.look(pair, 20) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("spliced", "", [True, True])
    _expect_redirected(hand, pair)
    assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.IN  # asked again, since an answer was lost
    pair.verify()
    host.stop_peers()


@pytest.mark.parametrize("sender", spread(["client", "server"], ["server"], OTHER_END))
@pytest.mark.parametrize("leaves_some", [False, True])
def test_unread_bytes(host: Host, hand: ByHand, lab: Lab, sender: str, leaves_some: bool) -> None:
    """While a byte is unread on either side there is no moment. Later on there is one all the same, for a
    reader that was never seen to leave bytes behind: it gets them, and those redirected after them."""
    pair = host.pair(lab)
    if leaves_some:
        _leave_some(pair)
    hand.announce(pair)
    source = getattr(pair, sender)
    sink = pair.server if sender == "client" else pair.client
    source.send(100)
    assert sink.wait_fionread(count=100) == 100
    assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.LATER
    eased = hand.ask(pair, EnlistTask.TRY_EASED)
    assert eased == (EnlistOutcome.LATER if leaves_some else EnlistOutcome.IN)
    assert hand.describe(pair)[2] == [not leaves_some] * 2
    assert sink.recv(100) == 100
    if leaves_some:
        hand.put_in(pair)
    assert hand.look(pair, 20) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("spliced", "", [True, True])
    _expect_redirected(hand, pair)
    pair.verify()
    host.stop_peers()


def test_system_call_with_the_lock(host: Host, hand: ByHand, lab: Lab) -> None:
    """While one of the two is in a system call that has its lock there is no moment, and enlist does not wait
    for one."""
    reader = host.peer(lab, "b", program=JUGGLER)
    pair = host.connect(host.peer(lab, "a"), reader, lab.address("b"))
    hand.announce(pair)
    pair.client.send(100)
    assert pair.server.wait_fionread(count=100) == 100
    pair.server.hold(count=100)
    for task in (EnlistTask.TRY, EnlistTask.TRY_EASED):
        assert hand.ask(pair, task) == EnlistOutcome.LATER
    assert hand.describe(pair) == ("paired", "pending", [False, False])
    assert pair.server.release() == 100
    hand.put_in(pair)
    pair.verify()
    host.stop_peers()


def test_no_moment_at_all(host: Host, hand: ByHand, lab: Lab) -> None:
    """Whoever gives up says so: it is busy, and is announced again by itself."""
    pair = _announced(host, hand, lab)
    assert hand.ask(pair, EnlistTask.GIVE_UP) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("paired", "busy", [False, False])
    assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.OVER

    def is_pending() -> bool:
        pair.pingpong(20)
        return hand.describe(pair)[1] == "pending"

    wait_until("it is announced again", is_pending)
    hand.put_in(pair)
    host.stop_peers()


# -- what may not go in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [(socket.SO_RCVLOWAT, 2, "rcvlowat"), (SO_TIMESTAMP, 1, "control_messages")],
)
@pytest.mark.parametrize("side", spread(["client", "server"], ["server"], OTHER_END))
def test_option_asked_for_while_it_is_pending(
    host: Host, hand: ByHand, lab: Lab, side: str, option: int, value: int, reason: str
) -> None:
    pair = _announced(host, hand, lab)
    getattr(pair, side).setsockopt(socket.SOL_SOCKET, option, value)
    assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("paired", reason, [False, False])
    pair.verify()
    host.stop_peers()


def test_option_that_guard_did_not_see(host: Host, hand: ByHand, lab: Lab) -> None:
    """Its thread was held up between guard and the option for as long as both went in: the look sees it."""
    pair = _announced(host, hand, lab)
    hand.put_in(pair)
    with hand.passing(pair):
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
    assert hand.look(pair) == EnlistOutcome.OVER
    assert hand.describe(pair)[:2] == ("draining", "rcvlowat")
    host.stop_peers()


def test_unfit_is_told_though_it_never_rests(host: Host, hand: ByHand, lab: Lab) -> None:
    """The first try says why a connection stays plain, whether or not there is a moment."""
    pair = host.pair(lab, blocking=(False, True))
    hand.announce(pair)
    pair.client.send(100)
    assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("paired", "blocking_reader", [False, False])
    host.stop_peers()


def test_names_of_somebody_elses_sockets(host: Host, hand: ByHand, lab: Lab) -> None:
    """The lookup finds another connection's socket under the four-tuple of the record, as if it had been used
    again meanwhile: nobody goes in."""
    first, second = (_announced(host, hand, lab) for _ in range(2))
    other = hand.record(second)
    own = hand.record(first).id
    end = struct.calcsize("=4I 4I Q I I")

    def swap(fields: list[int]) -> None:
        if tuple(fields[:2]) == own:
            raw = layout.PAIR.pack(*fields)
            fields[:] = layout.PAIR.unpack(raw[:16] + keys[0] + raw[16 + end :])

    keys: list[bytes] = []
    host.edit_pairs(
        lambda fields: (
            keys.append(layout.PAIR.pack(*fields)[16 : 16 + end]) if tuple(fields[:2]) == other.id else None
        )
    )
    kept: list[bytes] = []
    host.edit_pairs(
        lambda fields: (
            kept.append(layout.PAIR.pack(*fields)[16 : 16 + end]) if tuple(fields[:2]) == own else None
        )
    )
    spliced, name, ends = host.count_spliced(), hand.record(first), hand.record(second)
    host.edit_pairs(swap)
    request = (name.name, (ends.client.netns, ends.server.netns), (0, 0), EnlistTask.TRY)
    [outcome] = hand.enlister.work([EnlistRequest(*request)])
    assert outcome == EnlistOutcome.WALK  # it lives, and is not found so
    assert host.count_spliced() == spliced
    keys[:] = kept
    host.edit_pairs(swap)
    assert hand.describe(first)[2] == hand.describe(second)[2] == [False, False]
    hand.put_in(second)
    host.stop_peers()


@pytest.mark.parametrize("place", spread(["bridge", "loopback"], ["bridge"], "the same in one namespace"))
def test_four_tuple_used_again_while_it_is_pending(host: Host, hand: ByHand, lab: Lab, place: str) -> None:
    """A connection waits for enlist as it ends, and the next one has its four-tuple: the old name means
    nothing, the new one the new connection."""
    client_at, server_at, to = PLACES[place]
    source = (lab.address("lo" if place == "loopback" else client_at), SAME_SOURCE)
    client, server = host.peer(lab, client_at), host.peer(lab, server_at)
    arguments = {"port": 7310, "source": source}
    old = host.connect(client, server, lab.address(to), **arguments)  # type: ignore[arg-type]
    hand.announce(old)
    ended = hand.record(old)
    old.client.reset()
    old.server.wait_events(events=["HUP"])
    old.server.close()
    new = host.connect(client, server, lab.address(to), **arguments)  # type: ignore[arg-type]
    hand.announce(new)
    spliced = host.count_spliced()
    request = EnlistRequest(ended.name, (ended.client.netns, ended.server.netns), (0, 0), EnlistTask.TRY)
    assert hand.enlister.work([request]) == [EnlistOutcome.OVER]
    assert host.count_spliced() == spliced
    hand.put_in(new)
    new.verify()
    host.stop_peers()


@pytest.mark.parametrize("side", ["client", "server"])
def test_closed_while_it_is_pending(host: Host, hand: ByHand, lab: Lab, side: str) -> None:
    """One end is closed, and the other is not: nobody goes in."""
    pair = _announced(host, hand, lab)
    known, spliced = hand.record(pair), host.count_spliced()
    getattr(pair, side).close()
    request = EnlistRequest(known.name, (known.client.netns, known.server.netns), (0, 0), EnlistTask.TRY)
    assert hand.enlister.work([request]) == [EnlistOutcome.OVER]
    assert host.count_spliced() == spliced
    host.stop_peers()


# -- what slips by -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves_some", [False, True])
def test_a_message_that_slips_by(lab: Lab, leaves_some: bool) -> None:
    """A message goes through TCP to an end that is in, and its reader, who asks FIONREAD, does not see it.
    Two looks are enough where a reader leaves bytes behind, and some more where it does not. Its connection
    goes back, and it is woken."""
    with Host() as host:
        pair = host.pair(lab)
        if leaves_some:
            _leave_some(pair)
        with by_hand(host) as hand:
            hand.announce(pair)
            hand.put_in(pair)
            with hand.passing(pair):
                pair.client.send(100)
            assert hand.look(pair) == EnlistOutcome.LATER
            assert hand.describe(pair)[0] == "spliced"
            assert hand.look(pair, 1 if leaves_some else 30) == EnlistOutcome.OVER
            assert hand.describe(pair)[:2] == ("draining", "busy")
        host.start()
        assert pair.server.wait_fionread(count=100) == 100
        assert pair.server.recv(100) == 100
        assert host.daemon.totals()["rescued"] == 0
        pair.verify()


def test_a_message_that_is_read_meanwhile(host: Host, hand: ByHand, lab: Lab) -> None:
    """It slipped by, and its reader has read it before the second look: nothing is wrong."""
    pair = host.pair(lab)
    _leave_some(pair)
    hand.announce(pair)
    hand.put_in(pair)
    with hand.passing(pair):
        pair.client.send(100)
    assert hand.look(pair) == EnlistOutcome.LATER
    assert pair.server.recv(100) == 100
    assert hand.look(pair, 20) == EnlistOutcome.OVER
    assert hand.describe(pair) == ("spliced", "", [True, True])
    pair.verify()
    host.stop_peers()


def test_each_read_is_looked_at_from_then_on(host: Host, hand: ByHand, lab: Lab) -> None:
    """A plain end whose reads are counted is not looked at for a while. That ends as it goes in, however long
    it was to last: the very first read of a kind that does not see redirected bytes is noticed."""
    pair = _announced(host, hand, lab)
    muted = libbpf.Map.open(str(host.pin_dir / "maps" / "muted"))
    try:
        found = [(slot, MUTED.unpack(value)) for slot, value in muted.items()]
        for slot, (cookie, _, splices) in found:
            muted.set(slot, MUTED.pack(cookie, FAR_JIFFIES, splices))
    finally:
        muted.close()
    assert any(cookie for _, (cookie, _, _) in found), "nobody was muted: this shows nothing"
    hand.put_in(pair)
    with hand.passing(pair):
        pair.client.send(100)
    pair.server.recv_once(count=100, flags=socket.MSG_TRUNC)
    assert hand.describe(pair)[:2] == ("draining", "unknown_reader")
    host.stop_peers()


def test_sender_that_waits_for_the_lock_as_it_is_put_in(lab: Lab, tmp_path: Path) -> None:
    """A send has begun in TCP, and waits for the lock, when both go in: enlist is made blind for that here.
    Its message goes through TCP, comes in order, and its reader sees it once the looks have noticed."""
    tree = copy_changed(tmp_path / "tree", "bpf/enlist.c", "return owned;", "return 0;")
    with Host(start=False) as host:
        host.prefix = ("env", f"PYTHONPATH={tree}")
        host.start()
        sender = host.peer(lab, "b", program=JUGGLER)
        pair = host.connect(host.peer(lab, "a", program=HABITS), sender, lab.address("b"))
        with by_hand(host) as hand:
            hand.announce(pair)
            pair.client.send(100)
            assert pair.server.wait_fionread(count=100) == 100
            pair.server.hold(count=100)
            pair.server.begin_send(count=300)
            pair.server.wait_for_lock()
            assert hand.ask(pair, EnlistTask.TRY_EASED) == EnlistOutcome.IN
            assert pair.server.release() == 100
            assert pair.server.finish_send() == 300
            pair.server.send(50)
            seen = hand.record(pair).server_sends
            assert (seen.redirected_messages, seen.passed_messages) == (0, 1)  # of the second one only
            hand.look(pair, 30)
            assert hand.describe(pair)[:2] == ("draining", "busy")
        host.start()
        assert pair.client.wait_fionread(count=350) == 350
        assert pair.client.recv(350) == 350
        pair.verify()


@pytest.mark.parametrize("size", spread([64, 20_000], [20_000], "the same with small answers"))
def test_many_adoptions_and_no_rescue(lab: Lab, size: int) -> None:
    """Connections are put in again and again while bytes move, and no reader has to be rescued."""
    with Host() as host:
        pairs = [host.pair(lab) for _ in range(2)]
        with counting_runs():
            for _ in range(8):
                for pair in pairs:
                    host.talk_until(pair, "spliced", rounds=10)
                    pair.pingpong(10, size=64, answer=size)
                host.daemon.drain()
                for pair in pairs:
                    host.wait_flow(pair, "paired", rounds=1)
        totals = host.daemon.totals()
        assert totals["spliced"] >= 16
        assert totals["rescued"] == 0
        for pair in pairs:
            pair.verify()


# -- the second one cannot go in ---------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [False, True])
def test_no_room_for_the_second_one(lab: Lab, closes: bool) -> None:
    """The client is in when there is no room for the server. It is taken out again, and sees what came
    through TCP meanwhile; also if the record has gone by then."""
    with Host("--max-connections=16") as host:
        pair = host.pair(lab)
        with by_hand(host) as hand:
            hand.announce(pair)
            spliced = libbpf.Map.open(str(host.pin_dir / "maps" / "spliced"))
            fillers = []
            with socket.create_server(("127.0.0.1", 0)) as listener:
                for number in range(spliced.max_entries - 1):
                    fillers.append(socket.create_connection(listener.getsockname()))
                    key = struct.pack("=I", number).ljust(spliced.key_size, b"\1")
                    spliced.set(key, struct.pack("=Q", fillers[-1].fileno())[: spliced.value_size])
                wait_until("it was tried", lambda: hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.OVER)
                assert hand.describe(pair) == ("draining", "closing", [True, False])
                for each in fillers:
                    each.close()
            spliced.close()
            pair.server.send(100)
            if closes:
                pair.server.close()
        host.start()
        assert pair.client.wait_fionread(count=100) == 100
        assert pair.client.recv(100) == 100
        wait_until("it is out", lambda: host.count_spliced() == 0)
        if closes:
            assert pair.client.expect_eof()
        else:
            host.make_hot(pair, timeout=10.0)
            pair.verify()


# -- by walk, where there is no other way ------------------------------------------------------------------


def _find_interface(lab: Lab, host: str) -> int:
    command = ["ip", "-n", lab.namespace(host), "-o", "link", "show", "eth0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.partition(":")[0])


@pytest.mark.parametrize("side", spread(["client", "server"], ["client"], OTHER_END))
def test_socket_that_is_bound_to_a_device(lab: Lab, side: str) -> None:
    """A lookup from elsewhere does not find it. It is left to adopt, which splices it."""
    with Host() as host:
        bound = [
            [socket.SOL_SOCKET, SO_BINDTOIFINDEX, _find_interface(lab, "a" if side == "client" else "b")]
        ]
        options = (bound, []) if side == "client" else ([], bound)
        pair = host.pair(lab, options=options)
        with by_hand(host) as hand:
            hand.announce(pair)
            spliced = host.count_spliced()
            wait_until("it was tried", lambda: hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.WALK)
            assert hand.record(pair).announced == layout.ANNOUNCED_BY_WALK
            assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.OVER
            assert host.count_spliced() == spliced
        host.start()
        host.make_hot(pair)
        pair.verify()
        fresh = host.pair(lab, options=options)
        host.make_hot(fresh)
        fresh.verify()


def test_kernel_that_refuses_the_program(lab: Lab, tmp_path: Path) -> None:
    """No such type of program: adopt puts all in. The log and `splicer status` say so."""
    kind = "BPF_PROG_TYPE_SCHED_CLS, is_optional"
    tree = copy_changed(
        tmp_path / "tree", "splicer/kernel/programs.py", f"libbpf.{kind}", "9999, is_optional"
    )
    with Host(start=False) as host:
        host.prefix = ("env", f"PYTHONPATH={tree}")
        host.start()
        assert '"program_refused"' in host.daemon.log.read_text()
        assert host.daemon.status()["adoption"] == "walk"
        assert "enlist" not in {each.name for each in (host.pin_dir / "programs").iterdir()}
        pair = host.hot_pair(lab)
        pair.verify()


def test_no_walk_where_there_is_another_way(lab: Lab) -> None:
    with Host() as host, counting_runs():
        assert host.daemon.status()["adoption"] == "name"
        for _ in range(5):
            host.hot_pair(lab).verify()
        assert read_runs(host.pin_dir, "adopt") == 0
        assert read_runs(host.pin_dir, "enlist") > 0


# -- namespaces --------------------------------------------------------------------------------------------


def test_namespaces_that_go_away(host: Host, hand: ByHand, lab: Lab) -> None:
    """A namespace goes away though it has a number, while a pair of it is pending, and others are not
    disturbed. A new one has another number, and the pair another name."""
    kept = _announced(host, hand, lab)
    for _ in range(2):
        other = Lab()
        try:
            pair = _announced(host, hand, other)
            pair.client.send(10)
            assert pair.server.wait_fionread(count=10) == 10
            assert hand.ask(pair, EnlistTask.TRY) == EnlistOutcome.LATER
            known = hand.record(pair)
            for end in (pair.client, pair.server):
                end.peer.kill()
            router = other.namespace("router")
            subprocess.run(["ip", "netns", "del", other.namespace("a")], check=True)
            other._namespaces.remove(other.namespace("a"))

            def has_gone(router: str = router) -> bool:
                shown = subprocess.run(["ip", "-n", router, "link", "show", "to-a"], capture_output=True)
                return shown.returncode != 0

            wait_until("the namespace has gone", has_gone, timeout=10.0)
        finally:
            other.remove()
        request = EnlistRequest(known.name, (known.client.netns, known.server.netns), (0, 0), EnlistTask.TRY)
        assert hand.enlister.work([request]) == [EnlistOutcome.OVER]
    hand.put_in(kept)
    host.stop_peers()


def _list_namespaces(pid: int) -> set[str]:
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("net:["):
            found.add(target)
    return found


def test_the_daemon_holds_no_namespace_but_its_own(lab: Lab) -> None:
    """Three: the one that it came from, and two empty ones, from which it finds sockets and hears of links.
    When it ends, nobody holds those any more."""
    with Host() as host:
        for place in (("a", "b", "b"), ("a", "a", "lo"), ("far", "b", "b")):
            pair = host.connect(host.peer(lab, place[0]), host.peer(lab, place[1]), lab.address(place[2]))
            host.make_hot(pair)
        held = _list_namespaces(host.daemon.pid)
        own = os.readlink(f"/proc/{host.daemon.pid}/ns/net")
        assert len(held - {own}) == 2
        processes = [each for each in os.listdir("/proc") if each.isdigit()]
        host.daemon.kill()
        for pid in processes:
            if os.path.isdir(f"/proc/{pid}/fd"):
                assert not _list_namespaces(int(pid)) & (held - {own})
        host.start()


def test_more_namespaces_than_have_numbers(
    host: Host, hand: ByHand, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty namespace is given up for a new one when most of its numbers must be of the dead."""
    monkeypatch.setattr(namespaces, "ROOM_NAMESPACES", 1)
    pairs = [
        host.connect(host.peer(lab, client), host.peer(lab, server), lab.address(to))
        for client, server, to in PLACES.values()
    ]
    rooms = set()
    for pair in pairs:
        hand.announce(pair)
        hand.put_in(pair)
        [room] = _list_namespaces(os.getpid()) - {os.readlink("/proc/self/ns/net")}
        rooms.add(room)
    assert len(rooms) > 1
    host.stop_peers()
