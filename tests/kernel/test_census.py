# SPDX-License-Identifier: Apache-2.0
"""Connections that were there before splicer: found by name, and like any other from then on."""

from __future__ import annotations

import socket
import struct
from typing import Any

from support.daemon import call, wait_until
from support.host import ALLOW, EAGER, OFF, Host
from support.hostile import Hostile, read_map, read_name, read_seeds
from support.lab import MIXES, PLACES, Lab
from support.load import Load
from support.players import Pair
from support.tiers import thorough

from splicer.kernel import libbpf
from splicer.kernel.layout import OLDER, CensusState
from splicer.kernel.settings import SettingsMap

LONGEST = 120.0  # seconds after which traffic ends whatever happens
TCP_REPAIR = 19
REPAIR_OFF_WITHOUT_PROBE = -1


def _take_census(host: Host, *arguments: str) -> dict[str, Any]:
    """Start splicer; what it says of the census once that has ended."""
    host.start(*arguments)
    return wait_until("the census has ended", lambda: _read_ended(host), timeout=30.0)


def _read_ended(host: Host) -> dict[str, Any] | None:
    census = host.daemon.status()["census"]
    return None if census["state"] == "running" else dict(census)


def _check_forgotten(host: Host, pairs: list[Pair]) -> None:
    """Closing them leaves nothing of them in the maps."""
    for pair in pairs:
        pair.close()
    for name in ("pairs", "older"):
        wait_until(f"nothing is left in {name}", lambda name=name: not read_map(host, name))
    wait_until("no seed is left", lambda: not read_seeds(host))
    wait_until("no end is in the SOCKHASH", lambda: host.count_spliced() == 0)


def test_older_connections_are_spliced(lab: Lab) -> None:
    """IPv4, IPv6 and v4-mapped, on loopback, over a bridge and through a router, translated, used for long or
    never: all are found and spliced, and forgotten when they are closed."""
    with Host(start=False) as host:
        pairs = []
        for family, server_family, version, prefix in MIXES.values():
            for client_at, server_at, to in PLACES.values():
                client, server = host.peer(lab, client_at), host.peer(lab, server_at)
                address = prefix + lab.address(to, version)
                pair = host.connect(
                    client, server, address, client_family=family, server_family=server_family
                )
                pair.pingpong(100)
                pairs.append(pair)
        lab.translate("a", "output", ("10.99.0.2", 8201), (lab.address("b"), 7201))
        pairs.append(host.pair(lab, port=7201, dial=("10.99.0.2", 8201)))
        census = _take_census(host)
        assert census["state"] == "done"
        assert (census["found"], census["left"], census["held_up"]) == (len(pairs), {}, 0)
        for pair in pairs:
            host.make_hot(pair)
        for pair in pairs:
            before = host.flow(pair)["redirected_messages"]
            pair.pingpong(10)
            assert host.flow(pair)["redirected_messages"] == before + 20
            pair.verify()
        assert host.daemon.totals()["paired"] == len(pairs)
        told = call("status", f"--run-dir={host.run_dir}").stdout
        assert f"{len(pairs)} connections older than splicer found" in told
        _check_forgotten(host, pairs)


def test_older_connections_have_a_policy(lab: Lab) -> None:
    """What is switched off stays plain; where eager is said they are spliced when both ends have read; a
    blocking reader that sleeps meanwhile gets its bytes."""
    with Host(start=False) as host:
        off, eager = host.pair(lab, port=OFF), host.pair(lab, port=EAGER)
        sleeper = host.pair(lab, port=ALLOW, blocking=(True, True))
        refused = host.pair(lab, blocking=(True, True))
        sleeper.server.begin("recv", count=64)
        refused.server.begin("recv", count=64)
        assert _take_census(host)["found"] == 4
        host.make_hot(eager)
        host.watch_cold(off, "policy_off")
        for pair in (sleeper, refused):
            pair.client.send(64)
            assert pair.server.finish() == 64
            pair.pingpong(40)
        host.make_hot(sleeper)
        host.watch_cold(refused, "blocking_reader")
        for pair in (off, eager, sleeper, refused):
            pair.verify()


def test_older_connections_can_be_left_alone(lab: Lab) -> None:
    """--no-census: nobody looks, they stay plain and work; a new one beside them is spliced."""
    with Host(start=False) as host:
        older = host.pair(lab)
        assert _take_census(host, "--no-census")["state"] == "off"
        for _ in range(5):
            older.pingpong(40)
        host.hot_pair(lab).verify()
        assert host.find_flow(older) is None
        assert "--no-census" in call("status", f"--run-dir={host.run_dir}").stdout
        older.verify()


def test_who_is_not_found_among_older_connections(lab: Lab) -> None:
    """An end outside of the cgroup, one under repair, and one whose other end is not here: each is counted,
    stays plain, and works; what is in another cgroup altogether is nobody's business."""
    with Host(start=False) as host:
        found = host.pair(lab)
        outside = host.connect(host.peer(lab, "a"), host.peer(lab, "b", inside=False), lab.address("b"))
        strangers = host.connect(
            host.peer(lab, "a", inside=False), host.peer(lab, "b", inside=False), lab.address("b")
        )
        repaired = host.pair(lab)
        repaired.client.setsockopt(socket.SOL_TCP, TCP_REPAIR, 1)
        single = host.dial(host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b"), defer_accept=30)
        census = _take_census(host)
        repaired.client.setsockopt(socket.SOL_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
        # The other ends of our peers' pipes are no TCP, so what is single is `single` alone.
        assert (census["found"], census["left"]) == (1, {"outside": 1, "repaired": 1})
        assert census["single"] == 1
        host.make_hot(found)
        for pair in (outside, strangers, repaired):
            for _ in range(3):
                pair.pingpong(40)
            assert host.find_flow(pair) is None
            pair.verify()
        told = call("status", f"--run-dir={host.run_dir}").stdout
        assert "not followed: 1 with an end outside of the cgroup, 1 under TCP_REPAIR" in told
        single.client.close()


def test_forged_ends_among_older_connections(lab: Lab) -> None:
    """Somebody else has a socket with the name of one end, as well as can be forged: which of the three are
    the true two cannot be known, so none of them is touched; the others are found."""
    with Host() as host:
        victims = {side: host.pair(lab) for side in ("client", "server")}
        other = host.pair(lab)
        names = {side: read_name(host, pair) for side, pair in victims.items()}
        host.daemon.stop()
        forgers = {side: Hostile(host, [lab.address("a"), lab.address("b")]) for side in victims}
        for side, pair in victims.items():
            hostile = forgers[side]
            end = pair.client if side == "client" else pair.server
            seqs = names[side].as_client if side == "client" else names[side].as_server
            hostile.call("claim", address=end.local[0])
            where: dict[str, Any] = {"local": list(end.local), "remote": list(end.remote)}
            hostile.call("shake_hands", conn=side, **where, seqs=seqs)
            hostile.call("be_told", conn=side, count=1, times=20)
        census = _take_census(host)
        assert (census["found"], census["left"]) == (1, {"ambiguous": 2})
        for side, pair in victims.items():
            for _ in range(3):
                pair.pingpong(40)
            assert host.find_flow(pair) is None
            assert forgers[side].attempt("hear_once", conn=side, count=100) == "EAGAIN"
            pair.verify()
        host.make_hot(other)


def test_stopped_and_started_again(lab: Lab) -> None:
    """What was spliced before a stop is spliced after the next start, with traffic all the time. Where
    redirected bytes were left unread it stays as it was, and loses none."""
    with Host("--stop-timeout", "1") as host:
        pair, unread = host.hot_pair(lab), host.hot_pair(lab)
        load = Load(host, lab)
        for _ in range(2):
            assert host.daemon.stop() == 0
            pair.pingpong(50)
            census = _take_census(host)
            assert census["state"] == "done"
            assert census["left"] == {}
            host.make_hot(pair)
        load.finish()
        unread.client.send(5_000, chunk=500)
        assert host.daemon.stop() == 0
        _take_census(host)
        unread.client.send(1_000, chunk=500)
        assert unread.server.recv(6_000) == 6_000
        unread.pingpong(50)
        host.make_hot(pair)
        for each in (pair, unread):
            each.verify()
            each.close()


def test_killed_during_a_census(lab: Lab) -> None:
    """The next daemon over the same programs takes it anew, and only then. After one that has ended none is
    needed: what was connected since has been registered."""
    with Host(start=False) as host:
        older = host.pair(lab)
        assert _take_census(host, "--no-census")["state"] == "off"
        host.daemon.kill()
        pinned = libbpf.Map.open(str(host.pin_dir / "maps" / "settings"))
        left = libbpf.Map.open(str(host.pin_dir / "maps" / "older"))
        SettingsMap(pinned).write(census=CensusState.JOINS)
        left.set(struct.pack("=2I", 1, 2), OLDER.pack(1, 2, 3, 4))
        pinned.close()
        left.close()
        younger = host.pair(lab)
        census = _take_census(host)
        assert (census["state"], census["found"]) == ("done", 1)
        host.daemon.kill()
        assert _take_census(host)["state"] == "earlier"
        for pair in (older, younger):
            host.make_hot(pair)
            pair.verify()
        _check_forgotten(host, [older, younger])


@thorough("the bound is one for all; test_capacity.py has it")
def test_more_older_connections_than_there_is_room_for(lab: Lab) -> None:
    """The bound of --max-connections holds, with the share of one tenant in it; the rest is counted."""
    with Host("--max-connections", "16", start=False) as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        pairs = [host.connect(client, server, lab.address("b")) for _ in range(20)]
        census = _take_census(host)
        assert census["found"] == 14
        assert census["left"] == {"map_full": 6}
        assert host.daemon.totals()["refused"]["map_full"] == 6
        for pair in pairs:
            pair.pingpong(40)
            pair.verify()
        _check_forgotten(host, pairs)


def test_census_while_connections_come_and_go(lab: Lab) -> None:
    """Connections that are opened, closed and reset all the time, in both namespaces, while it is taken: no
    byte is lost, and nothing is left of them."""
    with Host(start=False) as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        where: dict[str, Any] = {"family": socket.AF_INET, "host": lab.address("b")}
        port = server.call("listen", name="door", **where)
        server.begin("serve", listener="door", seconds=LONGEST)
        client.begin("churn", **where, port=port, seconds=LONGEST, seed=4, together=40, rounds=30)
        pairs = [host.pair(lab) for _ in range(3)]
        census = _take_census(host)
        assert census["state"] == "done"
        assert census["found"] >= 3
        for pair in pairs:
            host.make_hot(pair)
        client.tell_to_end()
        done = client.finish()
        assert (done["wrong"], done["broken"]) == (0, 0)
        assert done["connections"] > 50
        server.tell_to_end()
        server.finish()
        for pair in pairs:
            pair.verify()
        _check_forgotten(host, pairs)
