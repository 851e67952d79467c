# SPDX-License-Identifier: Apache-2.0
"""More connections than --max-connections: all of them work, the excess stays plain and is counted."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab

from splicer.kernel import libbpf
from splicer.kernel.layout import PAIR

LIMIT = 16
CONNECTIONS = 40


def _open_pairs(host: Host) -> libbpf.Map:
    return libbpf.Map.open(str(host.pin_dir / "maps" / "pairs"))


@pytest.fixture(scope="module")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    with Host("--max-connections", str(LIMIT)) as made:
        yield made


@pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])
def test_excess_connections_stay_plain(host: Host, lab: Lab, port: int) -> None:
    """With a full map a connection is plain TCP and a counter, never an error; room is used again."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    before = host.daemon.totals()["refused"].get("map_full", 0)
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b"), port=port) for _ in range(CONNECTIONS)]

    def enough_are_spliced() -> bool:
        for pair in pairs:
            pair.pingpong(20)
        connections = host.daemon.status()["connections"]
        assert sum(connections.values()) <= LIMIT
        return bool(connections["spliced"] >= LIMIT // 2)

    wait_until("half of what there is room for is spliced", enough_are_spliced)
    assert host.count_spliced() <= 2 * LIMIT
    assert host.daemon.totals()["refused"]["map_full"] - before >= CONNECTIONS - LIMIT
    for pair in pairs:
        pair.verify()
        pair.close()
    wait_until("closed connections are gone", lambda: not host.daemon.flows())
    late = host.connect(client, server, lab.address("b"), port=port)
    host.make_hot(late)
    late.verify()
    assert "error" not in host.daemon.tail().lower()


def test_no_room_for_a_record(host: Host, lab: Lab) -> None:
    """As if there were no memory: the connection is plain, known by its seed, and spliced once there is."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    # Records without a state, which nobody takes for a connection.
    keys = [struct.pack("=2I", number, 0) for number in range(1, LIMIT + 1)]
    with contextlib.closing(_open_pairs(host)) as pairs:
        for key in keys:
            pairs.set(key, bytes(PAIR.size))
        pair = host.pair(lab)
        for _ in range(10):
            pair.pingpong(40)
            # Where its client is nobody knows yet.
            [flow] = host.daemon.flows()
            assert (flow["state"], flow["reason"]) == ("paired", "cold")
            assert flow["local"].endswith(f":{pair.client.local[1]}")
        for key in keys:
            pairs.delete(key)
    host.make_hot(pair)
    pair.verify()
    pair.close()
    wait_until("it is gone", lambda: not host.daemon.flows())
