# SPDX-License-Identifier: Apache-2.0
"""Which connections are spliced, what is counted, and what `status` and `flows` say about it."""

from __future__ import annotations

import json
import time
from socket import AF_INET, AF_INET6

import pytest
from support.daemon import call, wait_until
from support.host import EAGER, Host
from support.lab import MIXES, PLACES, Lab
from support.players import Pair

STATUS_KEYS = {"schema", "running", "pid", "version", "mode", "cgroup", "connections", "totals"}
TOTALS_KEYS = {
    "paired",
    "spliced",
    "drained",
    "redirected_bytes",
    "redirected_messages",
    "passed_messages",
    "rescued",
    "refused",
}
FLOW_KEYS = {
    "local",
    "remote",
    "netns",
    "peer_netns",
    "state",
    "reason",
    "redirected_bytes",
    "redirected_messages",
    "passed_messages",
    "age_seconds",
    "client",
    "server",
    "client_unread",
    "server_unread",
}
PARTY_KEYS = {"container", "service", "project", "pod", "process", "pid", "command", "cgroup"}

# Source ports that tests fix: below the ephemeral ones, which other connections may just have used.
SAME_SOURCE, USED_AGAIN = 22_001, 22_002


def _expect_all_redirected(host: Host, pair: Pair, rounds: int = 100, size: int = 64) -> None:
    before, totals = host.flow(pair), host.daemon.totals()
    pair.pingpong(rounds, size=size, answer=size)
    time.sleep(0.1)
    after, totals_after = host.flow(pair), host.daemon.totals()
    for old, new in ((before, after), (totals, totals_after)):
        assert new["redirected_messages"] - old["redirected_messages"] == 2 * rounds
        assert new["redirected_bytes"] - old["redirected_bytes"] == 2 * rounds * size
        assert new["passed_messages"] == old["passed_messages"]


def _as_text(address: tuple[str, int]) -> str:
    host = address[0].removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mix", MIXES)
def test_splices_every_family_everywhere(host: Host, lab: Lab, mix: str, place: str) -> None:
    """IPv4, IPv6 and v4-mapped, in every mix, on loopback, over a bridge and through a router: all are
    spliced, and from then on each message is redirected, counted one by one."""
    client_family, server_family, version, prefix = MIXES[mix]
    client_at, server_at, to = PLACES[place]
    client, server = host.peer(lab, client_at), host.peer(lab, server_at)
    address = prefix + lab.address(to, version)
    pair = host.connect(client, server, address, client_family=client_family, server_family=server_family)
    host.make_hot(pair)
    _expect_all_redirected(host, pair)
    flow = host.flow(pair)
    assert flow["local"] == _as_text(pair.client.local)
    assert flow["remote"] == _as_text(pair.client.remote)
    assert flow["netns"] == client.call("netns_cookie")
    assert flow["peer_netns"] == server.call("netns_cookie")
    assert flow["state"] == "spliced"
    assert flow["reason"] == ""
    pair.verify()


def test_both_ends_in_one_process(host: Host, lab: Lab) -> None:
    """A process that talks to itself is spliced like any two."""
    peer = host.peer(lab, "a")
    pair = host.connect(peer, peer, "127.0.0.1")

    def is_spliced() -> bool:
        for _ in range(20):
            pair.client.send(64)
            pair.server.recv(64)
            pair.server.send(64)
            pair.client.recv(64)
        flow = host.find_flow(pair)
        return flow is not None and flow["state"] == "spliced"

    wait_until("it is spliced", is_spliced)
    pair.client.send(10_000)
    pair.server.recv(10_000)
    pair.verify()


@pytest.mark.parametrize("size", [1, 1000, 16_384, 65_536, 200_000])
def test_messages_of_every_size_arrive(host: Host, lab: Lab, size: int) -> None:
    """Request and response of any size are byte-exact, and small ones are one redirected message each."""
    pair = host.hot_pair(lab)
    if size <= 16_384:
        _expect_all_redirected(host, pair, rounds=20, size=size)
    else:
        pair.pingpong(20, size=size, answer=size)
    pair.verify()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("hook", ["output", "prerouting"])
def test_splices_through_dnat(host: Host, lab: Lab, hook: str, version: int) -> None:
    """A connection whose destination netfilter rewrites, at its start or on its way, is spliced; the row has
    the address the client sees."""
    family = AF_INET if version == 4 else AF_INET6
    actual, port = lab.address("b", version), 7200
    if hook == "output":
        client_at, dial = "a", ("10.99.0.1" if version == 4 else "fd99::1", 8200)
        lab.translate("a", "output", dial, (actual, port))
    else:
        client_at, dial = "far", ("10.78.0.254" if version == 4 else "fd78::254", 8200)
        lab.translate("router", "prerouting", dial, (actual, port))
    client, server = host.peer(lab, client_at), host.peer(lab, "b")
    pair = host.connect(client, server, actual, port=port, dial=dial, client_family=family)
    assert pair.client.remote == dial
    assert pair.server.local == (actual, port)
    flow = host.make_hot(pair)
    assert flow["remote"] == _as_text(dial)
    _expect_all_redirected(host, pair)
    pair.verify()


def test_works_through_masquerading(host: Host, second_lab: Lab) -> None:
    """A connection whose source netfilter rewrites works, whether or not it can be recognised as local."""
    second_lab.masquerade("router", "br0")
    pair = host.connect(host.peer(second_lab, "far"), host.peer(second_lab, "b"), second_lab.address("b"))
    assert pair.server.remote[0] == "10.77.0.254"
    for _ in range(10):
        pair.pingpong(40)
        time.sleep(0.02)
    pair.verify()


@pytest.mark.parametrize("place", ["bridge", "loopback"])
def test_equal_four_tuples_do_not_mix(host: Host, lab: Lab, second_lab: Lab, place: str) -> None:
    """The same four-tuple alive in two pairs of namespaces, both hot: every byte reaches its own peer."""
    client_at, server_at, to = PLACES[place]
    address = lab.address(to)
    source = (lab.address("lo" if place == "loopback" else client_at), SAME_SOURCE)
    pairs = []
    for number, where in enumerate((lab, second_lab)):
        client, server = host.peer(where, client_at), host.peer(where, server_at)
        pairs.append(host.connect(client, server, address, port=7300, source=source, seed=1000 + number))
    one, other = pairs
    assert (one.client.local, one.client.remote) == (other.client.local, other.client.remote)
    for pair in pairs:
        host.make_hot(pair)
    flows = [host.wait_flow(pair, "spliced") for pair in pairs]
    assert flows[0]["local"] == flows[1]["local"]
    assert flows[0]["remote"] == flows[1]["remote"]
    assert flows[0]["netns"] != flows[1]["netns"]
    ends = (one.client, one.server, other.client, other.server)
    for seed, end in enumerate(ends):
        end.peer.begin("exchange", conns=[end.conn], seconds=1.0, seed=seed, largest=4000)
    for end in ends:
        end.finish()
    for pair in pairs:
        pair.verify()


def test_four_tuple_used_again(host: Host, lab: Lab) -> None:
    """A four-tuple that is used again right after its connection ended is a new connection altogether."""
    source = (lab.address("a"), USED_AGAIN)
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    for number in range(5):
        pair = host.connect(client, server, lab.address("b"), port=7301, source=source, seed=50 + number)
        host.make_hot(pair)
        pair.pingpong(50)
        pair.verify()
        # The client resets, so that no TIME_WAIT stands in the way of the next round.
        pair.client.reset()
        pair.server.wait_events(events=["HUP"])
        pair.server.close()


def test_eager_is_spliced_from_the_start(host: Host, lab: Lab) -> None:
    """Under the policy `eager` a connection is spliced without having become hot first."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    for _ in range(3):
        pair = host.connect(client, server, lab.address("b"), port=EAGER)
        flow = host.flow(pair)
        assert flow["state"] == "spliced"
        pair.pingpong(3)
        flow = host.flow(pair)
        if flow["reason"] != "unaccepted":
            break  # else its server was not let run before its first read
    _expect_all_redirected(host, pair, rounds=10)
    pair.verify()


def test_status_and_flows_have_the_documented_keys(host: Host, lab: Lab) -> None:
    """The JSON of both nouns has the documented keys, on the command line and on the control socket."""
    pair = host.hot_pair(lab)
    status = json.loads(call("status", "--json", "--run-dir", str(host.run_dir)).stdout)
    assert set(status) >= STATUS_KEYS
    assert set(status["connections"]) == {"paired", "spliced", "draining"}
    assert set(status["totals"]) == TOTALS_KEYS
    assert status["schema"] == 1
    assert status["running"] is True
    assert status["pid"] == host.daemon.pid
    assert status["mode"] == "adaptive"
    assert status["cgroup"] == str(host.cgroup.path)
    assert status["connections"]["spliced"] >= 1
    assert set(status) == set(host.daemon.status())
    answer = json.loads(call("flows", "--json", "--run-dir", str(host.run_dir)).stdout)
    assert set(answer) == {"schema", "flows"}
    assert answer["schema"] == 1
    # `peer`, the server's own address, differs from `remote` under DNAT only.
    assert [set(flow) - {"peer"} for flow in answer["flows"]] == [FLOW_KEYS] * len(answer["flows"])
    [flow] = [flow for flow in answer["flows"] if flow["local"] == _as_text(pair.client.local)]
    assert flow["state"] == "spliced"
    assert 0 <= flow["age_seconds"] < 60
    for end, party in ((pair.client, flow["client"]), (pair.server, flow["server"])):
        assert set(party) == PARTY_KEYS
        assert party["pid"] == end.peer.pid
        assert party["process"].startswith("python")
        assert "peer.py" in party["command"]
        assert party["cgroup"].endswith(host.cgroup.path.name)
    for noun in ("status", "flows"):
        table = call(noun, "--run-dir", str(host.run_dir))
        assert table.code == 0
        assert table.stdout.strip()
        assert table.stderr == ""


def test_connection_counts_follow_the_connections(host: Host, lab: Lab) -> None:
    """`status` counts what is alive per state, `totals` what ever was; closed connections leave `flows`."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    before = host.daemon.totals()
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    pairs = [host.connect(client, server, lab.address("b")) for _ in range(4)]
    host.make_hot(pairs[0])
    host.make_hot(pairs[1])
    connections = host.daemon.status()["connections"]
    assert connections == {"paired": 2, "spliced": 2, "draining": 0}
    for pair in pairs:
        pair.close()
    wait_until("closed connections are gone", lambda: not host.daemon.flows())
    assert host.daemon.status()["connections"] == {"paired": 0, "spliced": 0, "draining": 0}
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    totals = host.daemon.totals()
    assert totals["paired"] - before["paired"] == 4
    assert totals["spliced"] - before["spliced"] == 2
