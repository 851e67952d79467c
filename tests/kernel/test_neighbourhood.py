# SPDX-License-Identifier: Apache-2.0
"""All kinds of other BPF users at once, beside splicer: what they see, and what they answer, is what it is
without splicer. What is spliced goes on while they come and go, or goes back for the documented reason;
hazard 100. The single scenes are in test_neighbours.py."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import pauses
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab
from support.meddler import (
    GETSOCKOPT,
    STATE,
    Counts,
    answering,
    choosing_listeners,
    counting_callbacks,
    counting_options,
    in_sockmap,
    joined_in_the_kernel,
    judging_messages,
    steering,
)
from support.players import QUIRKS, End, Pair, Peer
from support.relayed import ask_through, make_chain, where

from splicer.kernel import libbpf

SO_PRIORITY, SO_MARK = 12, 36
RTO = 8  # of SOCK_OPS
NOBODY = "10.77.0.99"  # on the lab's network
JIFFIES = 12_000
STEERED = 7299  # a port that nobody listens on
ROUNDS = 60
Seen = dict[str, Any]


class Street:
    """Cgroups: splicer's, one above it, and one below in which the peers are."""

    def __init__(self, host: Host, lab: Lab) -> None:
        self.host, self.lab = host, lab
        above = host.cgroup
        host.cgroup = above.child("ours")
        self.below = host.cgroup.child("tenant")
        self.levels = {"above": above.path, "same": host.cgroup.path, "below": self.below.path}

    def peers(self) -> tuple[Peer, Peer]:
        return tuple(
            self.host.peer(self.lab, place, cgroup=self.below, program=QUIRKS) for place in ("a", "b")
        )  # type: ignore[return-value]

    @contextmanager
    def neighbours(self, arrive: Callable[[], object]) -> Iterator[dict[str, Counts]]:
        """Two users of each hook on each cgroup: one is there before somebody arrives, one comes after."""
        with ExitStack() as stack:
            found: dict[str, Counts] = {}
            for which in ("before", "after"):
                for level, path in self.levels.items():
                    for hook, made in self._visit(path):
                        found[f"{hook} {level}, {which}"] = stack.enter_context(made)
                if which == "before":
                    stack.enter_context(answering(self.below.path, JIFFIES))
                    arrive()
            yield found

    @staticmethod
    def _visit(path: Path) -> Iterator[tuple[str, AbstractContextManager[Counts]]]:
        yield "sock_ops", counting_callbacks(path)
        yield "setsockopt", counting_options(path, libbpf.BPF_CGROUP_SETSOCKOPT, SO_PRIORITY)
        yield "getsockopt", counting_options(path, GETSOCKOPT, SO_MARK)

    def play(self, neighbours: dict[str, Counts], *, spliced: bool) -> Seen:
        """A fixed scene, whatever it takes to be spliced in between; what the neighbours saw of it."""
        host, lab = self.host, self.lab
        client, server = self.peers()
        seen: Seen = {}
        # Who has nothing to do with others' sockets.
        pair = host.connect(client, server, lab.address("b"))
        seen["denied"] = (
            pair.client.attempt("setsockopt", level=socket.SOL_SOCKET, option=SO_PRIORITY, value=3),
            pair.client.attempt("getsockopt", level=socket.SOL_SOCKET, option=SO_MARK),
        )
        pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seen["nodelay"] = pair.client.getsockopt(level=socket.IPPROTO_TCP, option=socket.TCP_NODELAY) != 0
        seen["ecn"] = pair.client.has_ecn()
        seen["timeout"] = client.call("dial_in_vain", host=NOBODY, port=9)
        pair.pingpong(ROUNDS)
        if spliced:
            host.make_hot(pair)
        # A mesh: an SK_MSG program of its own.
        meshed = host.connect(client, server, lab.address("b"))
        with judging_messages(where(meshed.client), where(meshed.server)) as judged:
            meshed.pingpong(ROUNDS)
            seen["judged"] = judged.read()
            if spliced:
                host.wait_flow(meshed, "paired", "foreign_psock", rounds=2)
        # A proxy: an sk_skb program.
        _, front, back = make_chain(host, lab, 0, is_hot=False)
        with joined_in_the_kernel(where(front.server), where(back.client)):
            ask_through(front, back, ROUNDS)
        # A dispatcher: an sk_lookup program.
        server.call("listen", name="steered", family=socket.AF_INET, host=lab.address("b"))
        listener = server.pid, server.call("listener_fileno", listener="steered")
        with steering(lab.namespace("b"), STEERED, listener) as steered:
            visit = _visit(client, server, lab.address("b"))
            visit.pingpong(ROUNDS)
            if spliced:
                host.make_hot(visit)
            seen["steered"] = steered.read()
        for each in (pair, meshed, visit):
            each.verify()
            each.client.close()
            assert each.server.expect_eof()
            each.server.close()
        pauses.sleep(0.3)  # until everybody has heard of the last change of state
        seen["counts"] = {name: _without_timeouts(counts.read()) for name, counts in neighbours.items()}
        return seen


def _visit(client: Peer, server: Peer, address: str) -> Pair:
    """A connection to the port that is steered."""
    streams = {"sends": 902, "receives": 903}
    ends = client.call("connect", conn="visit", family=socket.AF_INET, host=address, port=STEERED, **streams)
    server.call("accept", listener="steered", conn="visited", sends=903, receives=902)
    local, remote = (tuple(each) for each in ends)
    return Pair(End(client, "visit", local, remote), End(server, "visited", remote, local), "visit")


def _without_timeouts(counts: dict[int, int]) -> dict[int, int]:
    """A segment that is sent again is nobody's doing; who is told of it depends on everybody's flags."""
    return {what: number for what, number in counts.items() if what != RTO}


@pytest.fixture(scope="module")
def street(_prerequisites: None, lab: Lab) -> Iterator[Street]:
    """A host on which no splicer runs yet."""
    with Host(start=False) as host:
        yield Street(host, lab)


def test_what_they_see_is_what_they_see_alone(street: Street) -> None:
    """On cgroups above splicer's, on the same and below, there before it and later: callbacks, options,
    answers, refusals, messages, and who gets a connection."""
    with street.neighbours(lambda: None) as neighbours:
        alone = street.play(neighbours, spliced=False)
    street.host.stop_peers()
    with street.neighbours(street.host.start) as neighbours:
        beside = street.play(neighbours, spliced=True)
    assert beside == alone
    assert alone["denied"] == ("EPERM", "EPERM")
    assert alone["ecn"] and alone["timeout"] > 2_000_000
    assert alone["judged"] == {0: 2 * ROUNDS} and alone["steered"] == {0: 1}
    assert all(counts for counts in alone["counts"].values())
    assert all(counts[STATE] for name, counts in alone["counts"].items() if name.startswith("sock_ops"))
    street.host.stop_peers()


def test_they_come_and_go(street: Street) -> None:
    """Connections that are spliced, eager and adaptive, carry traffic meanwhile: they stay so and lose no
    byte, until somebody's program reads one of them."""
    host, lab = street.host, street.lab
    if not host.has_run:
        host.start()
    pairs = [host.connect(*street.peers(), lab.address("b"), port=port) for port in (0, EAGER)]
    for pair in pairs:
        host.make_hot(pair)
    ends = [where(end) for pair in pairs for end in (pair.client, pair.server)]
    rows = [host.flow(pair) for pair in pairs]
    before = [row["redirected_messages"] for row in rows]
    for pair in pairs:
        pair.server.begin("echo_to_eof", size=700, timeout=60.0)
        pair.client.begin("pingpong_for", seconds=60.0, size=700, timeout=60.0)
    for path in street.levels.values():
        for _, coming in street._visit(path):
            with coming:
                _check_that_it_goes_on(host, rows)
    with in_sockmap(*ends), choosing_listeners(lab.namespace("b")):
        _check_that_it_goes_on(host, rows)
    for end in ends:
        # An SK_MSG program is where one is already.
        with pytest.raises(OSError, match=os.strerror(errno.EBUSY)), judging_messages(end):
            pass
    _check_that_it_goes_on(host, rows)
    for pair, count in zip(pairs, before, strict=True):
        pair.client.peer.tell_to_end()
        rounds = pair.client.finish()
        assert pair.server.finish() == rounds
        pair.verify()
        assert host.flow(pair)["redirected_messages"] - count == 2 * rounds
    _, front, back = make_chain(host, lab, 0)
    with joined_in_the_kernel(where(front.server), where(back.client)):
        ask_through(front, back, ROUNDS)
        for pair in (front, back):
            host.wait_flow(pair, "paired", "foreign_psock")
    host.daemon.drain()
    wait_until("nothing is spliced", lambda: host.count_spliced() == 0)


def _check_that_it_goes_on(host: Host, rows: list[Seen]) -> None:
    """All are spliced, and messages are redirected."""
    before = _count_redirected(host, rows)
    wait_until(
        "messages are redirected",
        lambda: all(now > then + 50 for now, then in zip(_count_redirected(host, rows), before, strict=True)),
    )


def _count_redirected(host: Host, rows: list[Seen]) -> list[int]:
    """Of each connection, which must be spliced. Its peers are busy, so it is known by an earlier row."""
    found = {(flow["local"], flow["remote"], flow["netns"]): flow for flow in host.daemon.flows()}
    flows = [found[row["local"], row["remote"], row["netns"]] for row in rows]
    assert all(flow["state"] == "spliced" for flow in flows), flows
    return [flow["redirected_messages"] for flow in flows]
