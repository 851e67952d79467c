# SPDX-License-Identifier: Apache-2.0
"""Readers that ask again and again whether there is anything. TCP serves them better: they go back to it."""

from __future__ import annotations

import os

import pytest
from support.daemon import wait_until
from support.host import HOT_TIMEOUT, Host
from support.lab import Lab
from support.players import HABITS, Pair

LOSS_COOL_DOWN_S = 30  # the first of them; doubled each time
CPUS = os.sched_getaffinity(0)
SPINNING_CPU = max(CPUS)  # the others are for who does not spin

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="who spins is met only by who runs at the same time")


def _pair(host: Host, lab: Lab) -> Pair:
    client, server = (host.peer(lab, place, program=HABITS) for place in "ab")
    for peer in (client, server):
        os.sched_setaffinity(peer.pid, CPUS - {SPINNING_CPU})
    return host.connect(client, server, lab.address("b"))


def _count_drained(host: Host) -> int:
    return int(host.daemon.status()["totals"]["drained"])


@pytest.mark.parametrize("spinner", ["client", "server"])
def test_reader_that_begins_to_spin_goes_back(host: Host, lab: Lab, spinner: str) -> None:
    """Whichever end it is. The connection says why it is plain, and is not tried again soon."""
    pair = _pair(host, lab)
    host.make_hot(pair)
    end = getattr(pair, spinner)
    end.spin(cpu=SPINNING_CPU)
    host.talk_until(pair, "paired", "spinning_reader")
    end.stop_spinning()
    pair.pingpong(100)
    assert host.flow(pair)["reason"] == "spinning_reader"
    assert host.forget_cool_downs() == [LOSS_COOL_DOWN_S]
    host.make_hot(pair)
    pair.verify()


def test_reader_that_spins_from_the_start(host: Host, lab: Lab) -> None:
    """Nothing tells while it is plain, so it is tried. The time to the next try doubles."""
    pair = _pair(host, lab)
    pair.server.spin(cpu=SPINNING_CPU)
    for least in (LOSS_COOL_DOWN_S, 2 * LOSS_COOL_DOWN_S):
        drained = _count_drained(host)

        def has_gone_back(before: int = drained) -> bool:
            pair.pingpong(20)
            return _count_drained(host) > before

        wait_until("it goes back", has_gone_back, HOT_TIMEOUT)
        assert host.flow(pair)["reason"] == "spinning_reader"
        assert host.forget_cool_downs() == [least]
    pair.server.stop_spinning()
    host.make_hot(pair)
    pair.verify()


def test_reader_that_waits_is_not_taken_for_one(host: Host, lab: Lab) -> None:
    """Its lock is taken now and then when a message comes, by its own sends for instance."""
    pair = _pair(host, lab)
    host.make_hot(pair)
    for _ in range(10):
        pair.pingpong(500)
    flow = host.flow(pair)
    assert (flow["state"], flow["reason"]) == ("spliced", "")
    pair.verify()
