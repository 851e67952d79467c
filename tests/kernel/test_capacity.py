# SPDX-License-Identifier: Apache-2.0
"""More connections than --max-connections: all of them work, the excess stays plain and is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab

LIMIT = 16
CONNECTIONS = 40


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
