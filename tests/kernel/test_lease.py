# SPDX-License-Identifier: Apache-2.0
"""A busy spliced connection sends a packet each way through TCP once in a lease: whoever forgets connections
without packets remembers it, and it can go back. Nobody else notices."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import wait_until
from support.firewall import Firewall
from support.host import EAGER, SERVICES, Host
from support.lab import MIXES, PLACES, Lab
from support.players import Pair
from support.tiers import spread

from splicer.doctor.prerequisites import CAPABILITIES

KEPT = f"lease = 1\n{SERVICES}"
NEVER = f"lease = 0\n{SERVICES}"
SEGMENTS_OUT, SEGMENTS_IN = 0, 1
FORGOTTEN_S = 8
ROUNDS = 5
WHERE = [f"{place} {mix}" for place in PLACES for mix in MIXES]
ALWAYS = ("loopback v4", "bridge v6", "router mapped-to-dual")


@pytest.fixture(scope="module")
def own_host() -> Iterator[Host]:
    with Host(services=KEPT) as made:
        yield made


@pytest.fixture
def leased(own_host: Host) -> Iterator[Host]:
    """splicer with the shortest lease there is."""
    own_host.reload(KEPT)
    rescued = own_host.daemon.totals()["rescued"]
    yield own_host
    own_host.stop_peers()
    assert own_host.daemon.totals()["rescued"] == rescued, "a connection had to be rescued"


def _connect(host: Host, lab: Lab, client: str = "a", server: str = "b") -> Pair:
    pair = host.connect(host.peer(lab, client), host.peer(lab, server), lab.address(server))
    host.make_hot(pair)
    return pair


def _count_renewed(host: Host) -> int:
    return int(host.daemon.status()["leases"]["renewed"])


def _talk_until_renewed(host: Host, pair: Pair, times: int) -> None:
    before = _count_renewed(host)

    def is_renewed() -> bool:
        pair.pingpong(20, pause=0.001)
        return _count_renewed(host) >= before + times

    wait_until(f"it was renewed {times} times", is_renewed, timeout=10.0 + 3 * times)


def _has_strict_rules(lab: Lab) -> Firewall:
    if not Path("/proc/net/nf_conntrack").exists():
        pytest.skip("this kernel does not list its conntrack entries in /proc")
    return Firewall(lab.namespace("router"))


# what it is for


def test_busy_for_longer_than_conntrack_remembers(leased: Host, lab: Lab) -> None:
    """Strict rules on the way, and a connection that is spliced for longer than conntrack remembers one
    without packets. It goes back, and the next messages arrive."""
    firewall = _has_strict_rules(lab)
    with firewall.strict(FORGOTTEN_S):
        pair = _connect(leased, lab, "far", "b")
        passed = leased.flow(pair)["passed_messages"]
        end = time.monotonic() + FORGOTTEN_S + 3
        while time.monotonic() < end:
            pair.pingpong(20, pause=0.001)
            assert firewall.is_known(pair.client.local[1])
        assert leased.flow(pair)["state"] == "spliced"
        assert leased.flow(pair)["passed_messages"] == passed
        leased.daemon.drain()
        leased.wait_flow(pair, "paired")
        pair.pingpong(5)
        pair.verify()


def test_zero_is_never(leased: Host, lab: Lab) -> None:
    """With lease = 0 conntrack forgets it, though it is busy, and what is sent after the way back is lost."""
    leased.reload(NEVER)
    assert leased.daemon.status()["leases"]["state"] == "off"
    firewall = _has_strict_rules(lab)
    with firewall.strict(2):
        pair = _connect(leased, lab, "far", "b")
        before = _count_renewed(leased)

        def is_forgotten() -> bool:
            pair.pingpong(20, pause=0.001)
            return not firewall.is_known(pair.client.local[1])

        wait_until("conntrack forgets it", is_forgotten, timeout=20.0)
        assert _count_renewed(leased) == before
        assert leased.flow(pair)["state"] == "spliced"
        leased.daemon.drain()
        leased.wait_flow(pair, "paired")
        sent = pair.client.count_segments()[SEGMENTS_OUT]
        received = pair.server.count_segments()[SEGMENTS_IN]
        pair.client.send(10)
        wait_until("it is sent again", lambda: pair.client.count_segments()[SEGMENTS_OUT] >= sent + 3)
        assert pair.server.count_segments()[SEGMENTS_IN] == received


@pytest.mark.parametrize("where", spread(WHERE, ALWAYS, "the same packet, in other families and places"))
def test_one_packet_each_way(leased: Host, lab: Lab, where: str) -> None:
    """Wherever both ends are: each renewal is one segment to the server and one to the client, and no message
    goes through TCP."""
    place, mix = where.split()
    client_family, server_family, version, prefix = MIXES[mix]
    client_at, server_at, visible = PLACES[place]
    pair = leased.connect(
        leased.peer(lab, client_at),
        leased.peer(lab, server_at),
        prefix + lab.address(visible, version),
        client_family=client_family,
        server_family=server_family,
    )
    leased.make_hot(pair)
    passed = leased.flow(pair)["passed_messages"]
    _talk_until_renewed(leased, pair, 1)
    before = _count_renewed(leased)
    segments = [end.count_segments() for end in (pair.client, pair.server)]
    _talk_until_renewed(leased, pair, 2)
    after = [end.count_segments() for end in (pair.client, pair.server)]
    renewed = _count_renewed(leased) - before
    came = [now[SEGMENTS_IN] - then[SEGMENTS_IN] for now, then in zip(after, segments, strict=True)]
    # One may be under way at either look.
    assert all(1 <= number <= renewed + 1 for number in came), (came, renewed)
    assert leased.flow(pair)["state"] == "spliced"
    assert leased.flow(pair)["passed_messages"] == passed
    pair.verify()


def test_past_a_rewritten_destination(leased: Host, second_lab: Lab) -> None:
    """Where netfilter rewrites the destination on the way it rewrites the probe's, too."""
    actual, dial = (second_lab.address("b"), 7300), ("10.78.0.254", 8300)
    second_lab.translate("router", "prerouting", dial, actual)
    client, server = leased.peer(second_lab, "far"), leased.peer(second_lab, "b")
    pair = leased.connect(client, server, actual[0], port=actual[1], dial=dial)
    leased.make_hot(pair)
    before = pair.client.count_segments()[SEGMENTS_IN]

    def is_answered() -> bool:
        pair.pingpong(20, pause=0.001)
        return bool(pair.client.count_segments()[SEGMENTS_IN] > before)

    wait_until("the server answers", is_answered)
    assert leased.flow(pair)["state"] == "spliced"
    pair.verify()


def test_marked(leased: Host, lab: Lab) -> None:
    """The probe has the mark of the connection's own packets, so that rules and routes treat it alike."""
    options = [[socket.SOL_SOCKET, socket.SO_MARK, 7]]
    pair = leased.connect(
        leased.peer(lab, "a"), leased.peer(lab, "b"), lab.address("b"), options=(options, options)
    )
    leased.make_hot(pair)
    with Firewall(lab.namespace("a")).only_marked(7, pair.client.remote[1]):
        before = pair.client.count_segments()[SEGMENTS_IN]

        def is_answered() -> bool:
            pair.pingpong(20, pause=0.001)
            return bool(pair.client.count_segments()[SEGMENTS_IN] > before)

        wait_until("the server answers", is_answered)
    pair.verify()


# whom it does not concern


def test_silent_ones_are_left_alone(leased: Host, lab: Lab) -> None:
    """Nothing is sent on some while another one is renewed again and again: their TCP is silent, too, and
    they stay spliced. When one is used again TCP speaks, as plain TCP would."""
    busy, *silent = (_connect(leased, lab) for _ in range(4))
    # What they sent while they got hot.
    _talk_until_renewed(leased, busy, 3)
    before = [[*pair.client.count_segments(), *pair.server.count_segments()] for pair in silent]
    _talk_until_renewed(leased, busy, ROUNDS)
    after = [[*pair.client.count_segments(), *pair.server.count_segments()] for pair in silent]
    assert after == before
    assert all(leased.flow(pair)["state"] == "spliced" for pair in silent)
    again = silent[0]
    again.pingpong(1)
    wait_until("its TCP speaks", lambda: again.client.count_segments()[SEGMENTS_IN] > before[0][SEGMENTS_IN])
    for pair in (busy, *silent):
        pair.verify()


def test_nothing_is_noticed_under_constant_traffic(leased: Host, lab: Lab) -> None:
    """Bytes both ways all the time, adaptive and eager, one way and both ways, while leases end every second:
    all of them come, in order, and nothing goes through TCP."""
    client, server = leased.peer(lab, "a"), leased.peer(lab, "b")
    pairs = [leased.connect(client, server, lab.address("b"), port=port) for port in (0, 0, EAGER, EAGER)]
    for pair in pairs:
        leased.make_hot(pair)
    passed = [leased.flow(pair)["passed_messages"] for pair in pairs]
    before = _count_renewed(leased)

    def are_renewed() -> bool:
        for pair in pairs:
            pair.pingpong(50, size=3000, answer=20_000)
            pair.pingpong(50)
        return _count_renewed(leased) >= before + ROUNDS * len(pairs)

    wait_until("all were renewed often", are_renewed, timeout=30.0)
    for pair in pairs:
        assert leased.flow(pair)["state"] == "spliced"
        pair.verify()
    assert [leased.flow(pair)["passed_messages"] for pair in pairs] == passed
    assert leased.daemon.status()["leases"]["failed"] == 0


def test_without_the_capability(lab: Lab) -> None:
    """Without CAP_NET_RAW everything else goes on, and `splicer status` says so."""
    names = [f"+{name.removeprefix('CAP_').lower()}" for name in CAPABILITIES]
    with Host(services=KEPT, start=False) as host:
        host.prefix = ("setpriv", f"--bounding-set={','.join(['-all', *names])}", "--inh-caps=-all")
        host.start()
        pair = _connect(host, lab)

        def is_said() -> bool:
            pair.pingpong(20, pause=0.001)
            return bool(host.daemon.status()["leases"]["state"] == "forbidden")

        wait_until("it is said", is_said)
        assert host.flow(pair)["state"] == "spliced"
        assert host.daemon.log.read_text().count('"leases_not_kept"') == 1
        pair.verify()
