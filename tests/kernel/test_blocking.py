# SPDX-License-Identifier: Apache-2.0
"""Readers that sleep in recv(2): left alone, or woken all the same where an operator vouches for them."""

from __future__ import annotations

import socket
import time

import pytest
from support.daemon import wait_until
from support.host import ALLOW, EAGER, EAGER_ALLOW, Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import HABITS, End, Pair, PeerError
from support.tiers import spread

EARLIER = "eager differs in what comes before"
POLICIES = {"refuse": 0, "eager-refuse": EAGER, "allow": ALLOW, "eager-allow": EAGER_ALLOW}
ALLOWED = {"allow", "eager-allow"}
SLEEP = 0.02  # seconds asleep in each round, far longer than adoption takes


def _connect(host: Host, lab: Lab, policy: str, blocking: tuple[bool, bool]) -> Pair:
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    return host.connect(client, server, lab.address("b"), port=POLICIES[policy], blocking=blocking)


def _sleepy_rounds(sleeper: End, waker: End, rounds: int) -> None:
    """`rounds` times: the sleeper goes to sleep in recv, then is sent a message and answers it."""
    sleeper.begin("echo", rounds=rounds, timeout=20.0)
    for _ in range(rounds):
        time.sleep(SLEEP)
        waker.pingpong(rounds=1)
    sleeper.finish()


def _find_state(host: Host, pair: Pair) -> tuple[str, str]:
    """State and reason."""
    flow = host.flow(pair)
    return flow["state"], flow["reason"]


def _expect_policy(host: Host, pair: Pair, policy: str, sleeper: End, waker: End) -> None:
    """Spliced, if need be after some more rounds, or plain, as the policy has it."""
    expected = ("spliced", "") if policy in ALLOWED else ("paired", "blocking_reader")
    wait_until(
        f"it is {expected}",
        lambda: _find_state(host, pair) == expected or _sleepy_rounds(sleeper, waker, rounds=2),
    )


@pytest.mark.parametrize("asleep", spread(["client", "server"], ["server"], "the same from the other end"))
@pytest.mark.parametrize("policy", POLICIES)
def test_asleep_while_the_connection_becomes_hot(host: Host, lab: Lab, policy: str, asleep: str) -> None:
    """A blocking reader that is asleep in recv(2) when its connection becomes hot, and is adopted or refused,
    is woken by the next message under every policy."""
    pair = _connect(host, lab, policy, (asleep == "client", asleep == "server"))
    ends = (pair.client, pair.server) if asleep == "client" else (pair.server, pair.client)
    _sleepy_rounds(*ends, rounds=40)
    _expect_policy(host, pair, policy, *ends)
    _sleepy_rounds(*ends, rounds=10)
    pair.verify()
    if policy not in ALLOWED:
        assert ends[0].report()["spurious"] == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_both_ends_blocking(host: Host, lab: Lab, policy: str) -> None:
    """The same with blocking sockets at both ends, as most programs have them."""
    pair = _connect(host, lab, policy, (True, True))
    pair.pingpong(30)
    _sleepy_rounds(pair.server, pair.client, rounds=20)
    _sleepy_rounds(pair.client, pair.server, rounds=20)
    _expect_policy(host, pair, policy, pair.server, pair.client)
    pair.pingpong(300)
    pair.verify()


@pytest.mark.parametrize("policy", sorted(ALLOWED))
def test_asleep_while_drained_and_adopted_again(host: Host, lab: Lab, policy: str) -> None:
    """Draining and adopting again while a blocking reader sleeps does not leave it asleep."""
    pair = _connect(host, lab, policy, (False, True))
    _sleepy_rounds(pair.server, pair.client, rounds=30)
    _expect_policy(host, pair, policy, pair.server, pair.client)
    for _ in range(10):
        pair.server.begin("echo", rounds=30)
        time.sleep(SLEEP)
        host.daemon.drain()
        time.sleep(SLEEP)
        pair.client.pingpong(rounds=30)
        pair.server.finish()
    pair.verify()


@pytest.mark.parametrize("policy", spread(POLICIES, ["refuse", "allow"], EARLIER))
def test_long_sleep(host: Host, lab: Lab, policy: str) -> None:
    """A reader that sleeps on long after its connection has become hot is woken by what comes at last."""
    pair = _connect(host, lab, policy, (False, True))
    pair.pingpong(60)
    pair.server.begin("hear", count=5, timeout=10.0)
    time.sleep(1.0)
    pair.client.say("hello")
    assert pair.server.finish() == "hello"
    pair.server.begin("recv_to_eof")
    time.sleep(0.3)
    pair.client.shutdown(how=socket.SHUT_WR)
    assert pair.server.finish() == 0
    pair.verify()


@pytest.mark.parametrize("policy", POLICIES)
def test_asleep_when_the_peer_resets(host: Host, lab: Lab, policy: str) -> None:
    """A RST wakes a sleeping reader with ECONNRESET; where blocking is allowed EAGAIN may come first, and a
    program there has to try again."""
    pair = _connect(host, lab, policy, (False, True))
    pair.pingpong(60)
    if policy in ALLOWED:
        time.sleep(0.1)
    else:
        host.wait_flow(pair, "paired", "blocking_reader")
    pair.server.begin("recv", count=100)
    time.sleep(0.1)
    pair.client.reset()
    with pytest.raises(PeerError, match="ECONNRESET"):
        pair.server.finish()
    if policy not in ALLOWED:
        assert pair.server.report()["spurious"] == 0


@pytest.mark.parametrize("policy", spread(POLICIES, ["refuse", "allow"], EARLIER))
def test_reader_that_waits_for_all(host: Host, lab: Lab, policy: str) -> None:
    """MSG_WAITALL readers get all they asked for in one call; they stay plain even where others may block."""
    pair = _connect(host, lab, policy, (False, True))
    for _ in range(40):
        pair.server.begin("recv_once", count=900, flags=socket.MSG_WAITALL)
        for _ in range(3):
            pair.client.send(300)
        assert pair.server.finish() == 900
        pair.server.send(64)
        pair.client.recv(64)

    def is_refused() -> bool:
        state, reason = _find_state(host, pair)
        return state == "paired" and reason not in ("", "cold", "pending")

    wait_until("it is refused", is_refused)
    for _ in range(5):
        pair.server.begin("recv_once", count=900, flags=socket.MSG_WAITALL)
        for _ in range(3):
            pair.client.send(300)
            time.sleep(0.005)
        assert pair.server.finish() == 900
    pair.verify()


@pytest.mark.parametrize("policy", POLICIES)
def test_receive_timeout(host: Host, lab: Lab, policy: str) -> None:
    """SO_RCVTIMEO: an empty blocking read gives up with EAGAIN in time, not earlier; a later one reads."""
    pair = _connect(host, lab, policy, (False, True))
    pair.pingpong(60)
    time.sleep(0.05)
    pair.pingpong(5)
    pair.server.settimeout(option=socket.SO_RCVTIMEO, seconds=0.3)
    started = time.monotonic()
    with Stopwatch() as watch:
        assert pair.server.attempt("hear_once", count=10) == "EAGAIN"
    assert time.monotonic() - started > 0.28
    assert watch.seconds < 1.0
    pair.client.say("x")
    assert pair.server.hear(1) == "x"
    pair.verify()


def test_blocking_sender_waits_for_room(host: Host, lab: Lab) -> None:
    """A blocking sender whose reader does not read sleeps until there is room, where blocking is allowed."""
    pair = _connect(host, lab, "allow", (True, False))
    host.make_hot(pair)
    count = 30_000_000
    pair.client.begin("send", count=count, chunk=50_000, timeout=20.0)
    assert pair.client.peer.is_waiting(0.5), "the sender was not held back"
    assert pair.server.recv(count, timeout=20.0) == count
    assert pair.client.finish() == count
    pair.verify()


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("policy", ["refuse", "allow"])
def test_flag_that_is_cleared_for_each_read(host: Host, lab: Lab, policy: str, side: str) -> None:
    """A reader that sets O_NONBLOCK while it waits, and clears it to read, is a blocking one. When it stops
    that, it is none any more."""
    client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
    pair = host.connect(client, server, lab.address("b"), port=POLICIES[policy])
    end: End = getattr(pair, side)
    end.toggle()
    if policy in ALLOWED:
        host.make_hot(pair)
    else:
        host.talk_until(pair, "paired", "blocking_reader")
        for _ in range(3):
            host.forget_cool_downs()
            pair.pingpong(40)
            assert _find_state(host, pair) in {("paired", "blocking_reader"), ("paired", "pending")}
        assert host.flow(pair)["redirected_messages"] == 0
    end.toggle(on=False)
    host.forget_cool_downs()
    host.make_hot(pair)
    pair.verify()


@pytest.mark.parametrize("side", ["client", "server"])
def test_flag_that_is_cleared_for_each_read_from_the_first_byte(host: Host, lab: Lab, side: str) -> None:
    """Eager: an end is in before it reads. Its first read shows what it is."""
    client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
    pair = host.connect(client, server, lab.address("b"), port=POLICIES["eager-refuse"])
    end: End = getattr(pair, side)
    end.toggle()
    host.talk_until(pair, "paired", "blocking_reader")
    assert end.report()["spurious"] == 0
    pair.verify()
