# SPDX-License-Identifier: Apache-2.0
"""The watch looks at those it is told to look at, and at nobody else; and ends that have lost their record
are found, whoever has left them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.daemon import wait_until
from support.enlisting import sweeping
from support.host import CHANGED_NS, Host
from support.lab import Lab
from support.players import Pair
from support.tiers import spread

from splicer.kernel import libbpf
from splicer.kernel.layout import MODES, PAIR, STATE_SPLICED, WATCH_PAIRS
from splicer.kernel.sweep import Sweeper
from splicer.model import REASON_NAMES

SPLICE = REASON_NAMES.index("splice_reader")
SIZE = 100
SERVER_BORN, SERVER_TGID = 39, 41  # among the fields of layout.PAIR


@contextmanager
def _by_hand(host: Host) -> Iterator[Sweeper]:
    """The programs, with nobody to run them but the test; then the next daemon comes."""
    host.daemon.kill()
    with sweeping(host) as sweeper:
        yield sweeper
    host.start()


def _connect_many(host: Host, lab: Lab, number: int) -> list[Pair]:
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(number)]
    for pair in pairs:
        host.make_hot(pair)
    return pairs


def _find_names(sweeper: Sweeper, pairs: list[Pair]) -> list[int]:
    by_port = {int(pair.client.local.rpartition(":")[2]): pair.name for pair in sweeper.list_pairs()}
    return [by_port[pair.client.local[1]] for pair in pairs]


def _find_spliced(sweeper: Sweeper) -> set[int]:
    return {pair.name for pair in sweeper.list_pairs() if pair.state == STATE_SPLICED}


# looks


def test_only_those_named_are_looked_at(lab: Lab) -> None:
    """Two connections have TCP bytes that nobody reads. Each is noticed when somebody looks, and rescued when
    somebody goes on looking; the others, in the same run or in another, are left as they are."""
    with Host() as host:
        pairs = _connect_many(host, lab, WATCH_PAIRS + 2)
        first, last = pairs[0], pairs[-1]
        with _by_hand(host) as sweeper:
            names = _find_names(sweeper, pairs)
            assert _find_spliced(sweeper) == set(names)
            sweeper.settings.write(splicing=False)
            for stuck in (first, last):
                stuck.client.send(SIZE)
            for stuck in (names[0], names[-1]):
                wait_until(
                    "it has TCP bytes", lambda stuck=stuck: sweeper.watch_pairs([stuck]).again == {stuck}
                )
            healthy = sweeper.watch_pairs(names[1:-1])
            assert (healthy.looked, healthy.again, healthy.rescued) == (WATCH_PAIRS, frozenset(), 0)
            assert sweeper.watch_pairs([*names[1:], 12345]).again <= {names[-1]}
            wait_until("it was rescued", lambda: sweeper.watch_pairs(names[:-1]).rescued == 1)
            assert _find_spliced(sweeper) >= set(names[1:-1])
            assert names[0] not in _find_spliced(sweeper)
        for stuck in (first, last):
            assert stuck.server.recv(SIZE) == SIZE
        for pair in pairs:
            pair.pingpong(5)
            pair.verify()


def test_a_change_of_policy_is_asked_about_when_somebody_looks(lab: Lab) -> None:
    """The policy says off now. Those that are looked at, more than one run can take, go back; the others
    follow when they are looked at."""
    with Host() as host:
        pairs = _connect_many(host, lab, WATCH_PAIRS + 4)
        with _by_hand(host) as sweeper:
            names = _find_names(sweeper, pairs)
            policy = sweeper.settings.read().policy
            sweeper.settings.write(mode=MODES["off"], policy=policy + 1)
            assert sweeper.watch_pairs(names[:2]).again == frozenset()
            assert _find_spliced(sweeper) == set(names[2:])
            assert sweeper.watch_all().looked == len(names)
            assert _find_spliced(sweeper) == set()
        for pair in pairs:
            pair.pingpong(5)
            pair.verify()


def _make_old(host: Host) -> None:
    """Let all pairs be spliced since long ago. The watch looks more closely at new ones."""

    def age(fields: list[Any]) -> None:
        fields[CHANGED_NS] = 1

    host.edit_pairs(age)


def _remember_server_as_splicer(host: Host) -> None:
    """As observe does with a process that has called splice(2) on some connection."""
    pairs = libbpf.Map.open(str(host.pin_dir / "maps" / "pairs"))
    splicers = libbpf.Map.open(str(host.pin_dir / "maps" / "splicers"))
    try:
        fields = PAIR.unpack(pairs.items()[0][1])
        splicers.set(struct.pack("=I", fields[SERVER_TGID]), struct.pack("=2I", fields[SERVER_BORN], SPLICE))
    finally:
        pairs.close()
        splicers.close()


@pytest.mark.parametrize(
    "change", spread(["blocks", "splices"], ["splices"], "another change, found by the same look")
)
def test_old_and_silent_connections_are_looked_at_like_any_other(lab: Lab, change: str) -> None:
    """They have been spliced for long and carry nothing. One look finds all whose reader has become unfit."""
    with Host() as host:
        pairs = _connect_many(host, lab, WATCH_PAIRS + 2)
        with _by_hand(host) as sweeper:
            names = _find_names(sweeper, pairs)
            sweeper.watch_all()
            _make_old(host)
            for _ in range(2):
                assert sweeper.watch_all().looked == len(names)
            assert _find_spliced(sweeper) == set(names)
            for pair in pairs[1:]:
                if change == "blocks":
                    pair.server.setblocking(blocking=True)
            if change == "splices":
                _remember_server_as_splicer(host)
            sweeper.watch_all()
            assert _find_spliced(sweeper) == ({names[0]} if change == "blocks" else set())
        for pair in pairs:
            pair.server.setblocking(blocking=False)
            pair.pingpong(5)
            pair.verify()


def test_what_has_gone_is_no_harm(lab: Lab) -> None:
    """Names of connections that are closed, at one end or both, plain ones, none at all."""
    with Host() as host:
        pairs = _connect_many(host, lab, 3)
        with _by_hand(host) as sweeper:
            names = _find_names(sweeper, pairs)
            pairs[0].close()
            pairs[1].client.close()
            assert pairs[1].server.expect_eof()
            for _ in range(3):
                found = sweeper.watch_pairs([*names, 0, 1, (1 << 64) - 1])
                assert (found.again, found.rescued) == (frozenset(), 0)
            assert sweeper.watch_pairs([]).looked == 0
            assert names[2] in _find_spliced(sweeper)
        pairs[2].pingpong(5)
        pairs[2].verify()


# orphans


def _wait_out(host: Host) -> None:
    wait_until("all ends are out of the SOCKHASH", lambda: host.count_spliced() == 0, timeout=5.0)


@pytest.mark.parametrize("unread", [0, SIZE], ids=["nothing-waits", "bytes-wait"])
def test_client_that_stays_when_its_server_has_closed(host: Host, lab: Lab, unread: int) -> None:
    """Its record has gone. It is taken out of the SOCKHASH, but not before it has read all that was
    redirected."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(3)]
    for pair in pairs:
        host.make_hot(pair)
    for pair in pairs:
        if unread:
            pair.server.send(unread)
        pair.server.close()
    wait_until("the records are gone", lambda: not host.daemon.flows())
    if unread:
        others = host.hot_pair(lab)
        others.pingpong(20)
        others.close()
        for pair in pairs:
            assert pair.client.recv(unread) == unread
    _wait_out(host)
    for pair in pairs:
        assert pair.client.report()["first_wrong"] is None
        assert pair.client.expect_eof()


@pytest.mark.parametrize("many", spread([4, 600], [4], "as many as need several searches"))
def test_clients_whose_servers_closed_while_no_daemon_ran(lab: Lab, many: int) -> None:
    """Nobody was there to be told: the next daemon finds them, also among more than it walks over at a
    time."""
    with Host("--mode=eager") as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        crowd = [host.connect(client, server, lab.address("b")) for _ in range(many)]
        spliced = host.count_spliced()
        assert spliced > 1.9 * many
        left, others = crowd[:: many // 2], crowd[1 :: many // 2]
        host.daemon.kill()
        for pair in left:
            pair.server.close()
            assert pair.client.expect_eof()
        assert host.count_spliced() == spliced - len(left)
        host.start()
        wait_until("they are out of the SOCKHASH", lambda: host.count_spliced() <= spliced - 2 * len(left))
        for pair in others:
            pair.pingpong(20)
            pair.verify()
        assert host.count_spliced() == spliced - 2 * len(left)
