# SPDX-License-Identifier: Apache-2.0
"""What waits unread at spliced ends is counted for whoever asks, and `ss` does not see it."""

from __future__ import annotations

import subprocess

import pytest
from support.bpf import counting_runs, read_runs
from support.host import EAGER, Host
from support.lab import Lab
from support.players import End, Pair

NOTHING = {"redirected_bytes": 0, "tcp_bytes": 0}


def _unread(host: Host, pair: Pair) -> tuple[dict[str, int], dict[str, int]]:
    """At the client, and at the server."""
    flow = host.flow(pair, unread=True)
    return flow["client_unread"], flow["server_unread"]


def _read_queue(lab: Lab, place: str, end: End) -> int:
    """Recv-Q of ss."""
    command = ["ip", "netns", "exec", lab.namespace(place), "ss", "-tnH", f"sport = :{end.local[1]}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.split()[1])


@pytest.mark.parametrize("port", [0, EAGER])
def test_what_waits_at_each_end(host: Host, lab: Lab, port: int) -> None:
    pair = host.pair(lab, port=port)
    host.make_hot(pair)
    assert _unread(host, pair) == (NOTHING, NOTHING)
    for size in (1000, 1, 9000):
        pair.client.send(size)
    pair.server.send(300)
    assert _unread(host, pair) == (
        {"redirected_bytes": 300, "tcp_bytes": 0},
        {"redirected_bytes": 10001, "tcp_bytes": 0},
    )
    assert _read_queue(lab, "b", pair.server) == _read_queue(lab, "a", pair.client) == 0
    pair.server.recv(400)
    assert _unread(host, pair)[1] == {"redirected_bytes": 9601, "tcp_bytes": 0}
    # On the way back what follows goes through TCP.
    host.daemon.drain()
    host.wait_flow(pair, "draining")
    sent = 0

    def passes() -> bool:
        nonlocal sent
        pair.client.send(50)
        sent += 50
        return bool(_unread(host, pair)[1]["tcp_bytes"])

    while not passes():
        assert sent < 10**6, "it goes on being redirected"
    at_client, at_server = _unread(host, pair)
    assert at_client == {"redirected_bytes": 300, "tcp_bytes": 0}
    assert at_server == {"redirected_bytes": 9601 + sent - 50, "tcp_bytes": 50}
    assert _read_queue(lab, "b", pair.server) == 50
    pair.server.recv(9601 + sent)
    pair.client.recv(300)
    host.wait_flow(pair, "paired")
    # `ss` says it of a plain connection.
    assert _unread(host, pair) == (None, None)
    pair.verify()


def test_nobody_pays_who_does_not_ask(host: Host, lab: Lab) -> None:
    pair = host.hot_pair(lab)
    with counting_runs():
        before = read_runs(host.pin_dir, "measure")
        flow = host.flow(pair)
        assert flow["state"] == "spliced" and flow["server_unread"] is None
        assert read_runs(host.pin_dir, "measure") == before
        assert _unread(host, pair) == (NOTHING, NOTHING)
        assert read_runs(host.pin_dir, "measure") > before
