# SPDX-License-Identifier: Apache-2.0
"""Other users of BPF on the same sockets and cgroups: what they do works as without splicer, or the smaller
difference that KNOWN_ISSUES names; hazards 12, 78 and 83."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.bpf import list_pinned
from support.daemon import wait_until
from support.host import EAGER, Host
from support.hostile import read_map
from support.lab import Lab
from support.meddler import (
    GETSOCKOPT,
    answering,
    choosing_listeners,
    in_sockmap,
    joined_in_the_kernel,
    noting_old_states,
    passing_options,
)
from support.players import QUIRKS, Pair, Peer
from support.relayed import ask_through, make_chain, where

from splicer.host import cgroups
from splicer.kernel import libbpf, neighbours
from splicer.model import Neighbour

IPPROTO_MPTCP = 262
# Names of maps of a splicer, at work and at its start.
SPLICERS_MAPS = ("spliced", "probe")
ESTABLISHED, LAST_STATE = 1, 13  # include/net/tcp_states.h


def _count_redirected(host: Host, *pairs: Pair) -> int:
    return sum(int(host.flow(pair)["redirected_messages"]) for pair in pairs)


@pytest.mark.parametrize("port", [0, EAGER])
def test_sockets_joined_in_the_kernel(host: Host, lab: Lab, port: int) -> None:
    """A proxy leaves copying to an sk_skb program: every byte after that arrives, in both directions and in
    order, both connections stay plain, and so does the proxy's next one, which it might hand over as well."""
    proxy, front, back = make_chain(host, lab, port)
    known = read_map(host, "splicers").keys()
    redirected, at_back = _count_redirected(host, front), _count_redirected(host, back)
    with joined_in_the_kernel(where(front.server), where(back.client)):
        ask_through(front, back, 20)
        for pair in (front, back):
            host.wait_flow(pair, "paired", "foreign_psock")
        assert _count_redirected(host, front) == redirected
        # What the program sends may be redirected, until the first answer finds the back taken over.
        assert _count_redirected(host, back) <= at_back + 1
        assert read_map(host, "splicers").keys() - known == {struct.pack("=I", proxy.pid)}
        later = host.connect(front.client.peer, proxy, lab.address("b"))
        later.pingpong(40)
        host.wait_flow(later, "paired", "foreign_psock", rounds=2)
        assert _count_redirected(host, later) == 0
        later.verify()
    # No flow of the two goes on saying that it is on its way.
    assert host.count_spliced() == 0


def test_joined_while_nothing_is_sent(host: Host, lab: Lab) -> None:
    """The watch finds it."""
    _, front, back = make_chain(host, lab, 0)
    with joined_in_the_kernel(where(front.server), where(back.client)):
        for pair in (front, back):
            host.wait_flow(pair, "paired", "foreign_psock", timeout=30.0)


def test_joined_with_bytes_unread(host: Host, lab: Lab) -> None:
    """What was redirected before is the socket's, and no program sees it: that much is known to be lost to
    the other side. The connection gets out of splicer's map all the same, and what follows arrives."""
    _, front, back = make_chain(host, lab, 0)
    front.client.say("lost")
    wait_until("it is there", lambda: front.server.fionread() == len("lost"))
    with joined_in_the_kernel(where(front.server), where(back.client)):
        front.client.say("more")
        assert back.server.hear(4) == "more"
        for pair in (front, back):
            host.wait_flow(pair, "paired", "foreign_psock")
        back.server.say("answer")
        assert front.client.hear(6) == "answer"


@pytest.mark.parametrize("ends", ["both", "client", "server"])
def test_agent_with_a_sockmap(host: Host, lab: Lab, ends: str) -> None:
    """The ends of a spliced connection are in the sockmap of an observability agent, which has no programs:
    it goes on, a drain ends, and it stays plain with that reason until the agent has gone."""
    pair = host.connect(
        host.peer(lab, "a", program=QUIRKS), host.peer(lab, "b", program=QUIRKS), lab.address("b")
    )
    host.make_hot(pair)
    taken = {"both": (pair.client, pair.server), "client": (pair.client,), "server": (pair.server,)}[ends]
    with in_sockmap(*map(where, taken)):
        before = _count_redirected(host, pair)
        pair.pingpong(50)
        assert _count_redirected(host, pair) == before + 100
        host.daemon.drain()
        host.wait_flow(pair, "paired", "foreign_psock", rounds=2)
        assert host.count_spliced() == 0
        pair.pingpong(50)
        assert host.flow(pair)["reason"] == "foreign_psock"
        host.forget_cool_downs()
        host.wait_flow(pair, "paired", "foreign_psock", rounds=2)
        pair.verify()
    host.forget_cool_downs()
    host.make_hot(pair, timeout=20.0)
    pair.verify()


def test_drained_under_load_in_an_agents_sockmap(host: Host, lab: Lab) -> None:
    """Much is on its way in both directions, again and again: nothing is lost, and no drain hangs."""
    pair = host.connect(
        host.peer(lab, "a", program=QUIRKS), host.peer(lab, "b", program=QUIRKS), lab.address("b")
    )
    host.make_hot(pair)
    with in_sockmap(where(pair.client), where(pair.server)):
        pair.server.begin("echo", rounds=3000, size=2000, answer=2000, timeout=30.0)
        pair.client.begin("pingpong", rounds=3000, size=2000, answer=2000, timeout=30.0)
        host.daemon.drain()
        wait_until("both are out", lambda: host.count_spliced() == 0)
        pair.client.finish()
        pair.server.finish()
        pair.verify()


NOBODY = "10.77.0.99"  # on the lab's network
JIFFIES = 12_000


def _hear_answers(host: Host, lab: Lab, client: Peer, server: Peer) -> tuple[int, bool]:
    """With what time-out (us) a SYN is sent, and whether a connection has ECN."""
    pair = host.connect(client, server, lab.address("b"))
    return client.call("dial_in_vain", host=NOBODY, port=9), pair.client.has_ecn()


def test_who_answers_for_a_cgroup_below(lab: Lab) -> None:
    """Another SOCK_OPS program says for its cgroup what time-out a SYN has, and that there is ECN. Ours is
    asked after it, and says nothing."""
    with Host(start=False) as host:
        below = host.cgroup.child("tenant")
        client = host.peer(lab, "a", cgroup=below, program=QUIRKS)
        server = host.peer(lab, "b", cgroup=below)
        usual = _hear_answers(host, lab, client, server)
        with answering(below.path, JIFFIES):
            alone = _hear_answers(host, lab, client, server)
            host.start()
            assert _hear_answers(host, lab, client, server) == alone
        assert _hear_answers(host, lab, client, server) == usual
        assert alone[0] > usual[0]
        assert alone[1] and not usual[1]


@pytest.mark.parametrize("where", ["below", "beside"])
def test_who_looks_at_changes_of_state(host: Host, lab: Lab, where: str) -> None:
    """Another SOCK_OPS program, which runs before ours or after, reads what a socket's state was before."""
    below = host.cgroup.child("tenant")
    with noting_old_states((below if where == "below" else host.cgroup).path) as states:
        client, server = host.peer(lab, "a", cgroup=below), host.peer(lab, "b", cgroup=below)
        pair = host.connect(client, server, lab.address("b"))
        host.make_hot(pair)
        pair.close()
        wait_until("its end was seen", lambda: struct.pack("=I", ESTABLISHED) in dict(states.items()))
        seen = {struct.unpack("=I", key)[0] for key, _ in states.items()}
        assert max(seen) < LAST_STATE, seen


def test_multipath_is_called_by_its_name(host: Host, lab: Lab) -> None:
    """No read of its sockets is ever seen. `flows` says why all the same."""
    pair = host.pair(lab, protocol=IPPROTO_MPTCP)
    pair.pingpong(40)
    # Its client's network namespace is not known.
    [flow] = [flow for flow in host.daemon.flows() if flow["remote"].endswith(f":{pair.client.remote[1]}")]
    assert (flow["state"], flow["reason"]) == ("paired", "mptcp")
    pair.verify()


def _is_of_a_splicer(each: Neighbour) -> bool:
    """Tests that run beside these have splicers, which come and go."""
    return each.is_splicer or each.where in SPLICERS_MAPS


def _list(host: Host, below: Path | None = None) -> set[tuple[str, str, str]]:
    """Hook, program and place of all that are listed, but for other splicers. Ours must not be."""
    found = neighbours.find(cgroups.find(str(below or host.cgroup.path)), str(host.pin_dir))
    assert not found.unknown
    own = list_pinned(host.bpffs.path)
    for each in found.neighbours:
        assert ("prog", each.id) not in own, each
        assert each.place != "map" or ("map", each.where_id) not in own, each
    return {(each.hook, each.program, each.where) for each in found.neighbours if not _is_of_a_splicer(each)}


def test_who_else_is_there(host: Host, lab: Lab) -> None:
    """Whoever uses the same hooks is listed, with its place, for as long as it is there; splicer is not."""
    pair = host.connect(
        host.peer(lab, "a", program=QUIRKS), host.peer(lab, "b", program=QUIRKS), lab.address("b")
    )
    above, own = host.cgroup.path, host.cgroup.child("tenant").path
    below = host.cgroup.child("tenant/job").path
    front, back = where(pair.client), where(pair.server)
    # The kernel frees them a little after their last user has gone, those of earlier tests, too.
    wait_until("no meddler is there", lambda: not any("meddler" in each for each in _list(host)))
    before = _list(host)
    with in_sockmap(front, back):
        assert _list(host) - before == {("sockmap", "", "meddler")}
    wait_until("it has gone", lambda: not _list(host) - before)
    with ExitStack() as stack:
        stack.enter_context(answering(above, JIFFIES))
        stack.enter_context(noting_old_states(below))
        stack.enter_context(passing_options(own, libbpf.BPF_CGROUP_SETSOCKOPT))
        stack.enter_context(passing_options(own, GETSOCKOPT))
        stack.enter_context(joined_in_the_kernel(front, back))
        stack.enter_context(choosing_listeners(lab.namespace("a")))
        inode = os.stat(f"/run/netns/{lab.namespace('a')}").st_ino
        seen = {
            ("sock_ops", "meddler", str(above)),
            ("sock_ops", "meddler", str(below)),
            ("setsockopt", "meddler", str(own)),
            ("getsockopt", "meddler", str(own)),
            ("skb_verdict", "meddler", "meddler"),
            ("sk_lookup", "meddler", f"net:[{inode}]"),
        }
        assert _list(host) - before == seen
        told = host.daemon.command("status", neighbours=True)["neighbours"]
        others = {
            (each["hook"], each["program"], each["where"])
            for each in told["others"]
            if not each["is_splicer"] and each["where"] not in SPLICERS_MAPS
        }
        assert others - before == seen
        assert told["unknown"] == []
        # Those above count as well.
        assert _list(host, own) - before == seen
        assert _list(host, below) - before == seen
        beside = host.cgroup.child("beside").path
        assert _list(host, beside) - before == {
            each for each in seen if each[2] not in (str(own), str(below))
        }
    # The sockets hold the sk_skb program, and it holds its map.
    assert _list(host) - before == {("sockmap", "", "meddler")}
    pair.close()
    wait_until("they have gone", lambda: not _list(host) - before)


def test_a_splicer_of_another_pin_directory(host: Host) -> None:
    """To somebody else ours is one of the others, and called a splicer."""
    found = neighbours.find(cgroups.find(str(host.cgroup.path)), "/nowhere").neighbours
    assert {each.hook for each in found if each.is_splicer} == {"sock_ops", "setsockopt", "sk_msg"}
    assert not [each for each in found if each.is_splicer and not _is_ours(host, each)]


def _is_ours(host: Host, each: Neighbour) -> bool:
    return each.where in (str(host.cgroup.path), "spliced")
