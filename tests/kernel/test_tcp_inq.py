# SPDX-License-Identifier: Apache-2.0
"""Connections that ask for TCP_INQ, as gRPC does on every one: spliced, or plain where the policy says so.

That their readers get every byte, whatever happens, is for tests/conformance/probes/in_queue.py.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.cgroup import find_v2_root
from support.daemon import wait_until
from support.host import CHANGED_NS, EAGER, EAGER_NO_INQ, NO_INQ, SERVICES, Host
from support.lab import Lab
from support.players import Pair

TCP_INQ = [socket.IPPROTO_TCP, 36, 1]
NO_MORE = [socket.IPPROTO_TCP, 36, 0]
TIMESTAMPS = {
    "SO_TIMESTAMP": [socket.SOL_SOCKET, 29, 1],
    "SO_TIMESTAMPNS": [socket.SOL_SOCKET, 35, 1],
    "SO_TIMESTAMPING": [socket.SOL_SOCKET, 37, 16],
}
ENDS = {"client": ([TCP_INQ], []), "server": ([], [TCP_INQ]), "both": ([TCP_INQ], [TCP_INQ])}
FLIP = 2.0  # seconds that a change of policy may take to reach a living connection
MANY = 8
_ports = itertools.count(7400)

at_each_end = pytest.mark.parametrize("at", ENDS)


@pytest.fixture
def host(host: Host) -> Iterator[Host]:
    yield host
    if host.config.read_text() != SERVICES:
        host.reload(SERVICES)


def refuse(port: int) -> str:
    """The configuration, and a service that cannot do without the answer."""
    return f'{SERVICES}\n[[policy]]\nports = {port}\ntcp_inq = "refuse"\n'


def ask(pair: Pair, at: str, option: list[int]) -> None:
    for name in ("client", "server"):
        if at in (name, "both"):
            getattr(pair, name).setsockopt(*option)


@pytest.mark.parametrize("port", [0, EAGER], ids=["adaptive", "eager"])
@at_each_end
def test_spliced_by_default(host: Host, lab: Lab, at: str, port: int) -> None:
    """A connection that asks from the start is spliced as any other, and its bytes are redirected."""
    pair = host.hot_pair(lab, port=port, options=ENDS[at])
    before = host.flow(pair)
    pair.pingpong(40)
    after = host.flow(pair)
    assert (after["state"], after["reason"]) == ("spliced", "")
    assert after["redirected_messages"] - before["redirected_messages"] == 80
    pair.verify()


@at_each_end
def test_asked_for_while_spliced(host: Host, lab: Lab, at: str) -> None:
    """To ask for it, or for no more of it, leaves a spliced connection as it is."""
    pair = host.hot_pair(lab)
    drained = host.daemon.totals()["drained"]
    for option in (TCP_INQ, NO_MORE, TCP_INQ):
        ask(pair, at, option)
        pair.pingpong(10)
        assert host.flow(pair)["state"] == "spliced"
    assert host.daemon.totals()["drained"] == drained
    pair.verify()


@pytest.mark.parametrize("port", [NO_INQ, EAGER_NO_INQ], ids=["adaptive", "eager"])
@at_each_end
def test_refused_from_the_start(host: Host, lab: Lab, at: str, port: int) -> None:
    """Where the policy refuses it, a connection that asks stays plain and every answer is right. Eager takes
    it out before anything is redirected."""
    pair = host.pair(lab, port=port, options=ENDS[at])
    if port == EAGER_NO_INQ:
        # In before it was known: seen at the latest when it is used.
        host.talk_until(pair, "paired", "control_messages")
    host.watch_cold(pair, "control_messages")
    if at != "client":
        pair.client.say("0123456789")
        assert pair.server.wait_fionread(count=10) == 10
        assert pair.server.hear_message(count=4) == ["0123", [[*TCP_INQ[:2], 6]]]
        assert pair.server.hear_message(count=10) == ["456789", [[*TCP_INQ[:2], 0]]]
    assert host.flow(pair)["redirected_messages"] == 0
    pair.verify()


@at_each_end
def test_refused_while_spliced(host: Host, lab: Lab, at: str) -> None:
    """Where the policy refuses it, to ask takes the connection back at once."""
    pair = host.hot_pair(lab, port=NO_INQ)
    ask(pair, at, TCP_INQ)
    pair.client.say("0123456789")
    if at != "client":
        assert pair.server.hear_message(count=4) == ["0123", [[*TCP_INQ[:2], 6]]]
        assert pair.server.hear(6) == "456789"
    else:
        assert pair.server.hear(10) == "0123456789"
    host.wait_flow(pair, "paired", "control_messages")
    host.watch_cold(pair, "control_messages")
    pair.verify()


def test_others_of_a_service_that_refuses_it(host: Host, lab: Lab) -> None:
    """Connections that do not ask are spliced all the same."""
    for port in (NO_INQ, EAGER_NO_INQ):
        host.hot_pair(lab, port=port).verify()


@pytest.mark.parametrize("silent", [False, True], ids=["busy", "silent"])
def test_refused_at_run_time(host: Host, lab: Lab, silent: bool) -> None:
    """A policy that becomes stricter takes back what is spliced already, also what has been spliced for long
    and carries nothing. A policy that allows it again has it spliced again."""
    port = next(_ports)
    pairs = [host.hot_pair(lab, port=port, options=ENDS["both"]) for _ in range(MANY if silent else 1)]
    bystander = host.hot_pair(lab, port=port)
    if silent:

        def age(fields: list[Any]) -> None:
            fields[CHANGED_NS] = 1

        host.edit_pairs(age)
    host.reload(refuse(port))
    for pair in pairs:
        host.wait_flow(pair, "paired", "control_messages", timeout=FLIP, rounds=0 if silent else 20)
    assert host.flow(bystander)["state"] == "spliced"
    host.reload(SERVICES)
    for pair in pairs:
        host.talk_until(pair, "spliced", timeout=FLIP)
        pair.verify()


def test_option_on_the_command_line(lab: Lab) -> None:
    """`--tcp-inq refuse` is for everybody of whom no rule says anything else."""
    port = next(_ports)
    services = f'[[policy]]\nports = {port}\ntcp_inq = "allow"\n'
    with Host("--tcp-inq", "refuse", services=services) as host:
        host.watch_cold(host.pair(lab, options=ENDS["both"]), "control_messages")
        host.hot_pair(lab, port=port, options=ENDS["both"]).verify()
        host.hot_pair(lab).verify()


def test_word_of_the_client(host: Host, lab: Lab) -> None:
    """What is said about the client counts where nothing is said about the server."""
    app = host.cgroup.child("app")
    port = next(_ports)
    root = find_v2_root()
    assert root is not None
    rule = f'[[policy]]\ncgroup = "{app.path.relative_to(root)}"\ntcp_inq = "refuse"\n'
    said = f'[[policy]]\nports = {port}\ntcp_inq = "allow"\n'
    host.reload(rule + said)
    silent, spoken = (
        host.connect(
            host.peer(lab, "a", cgroup=app),
            host.peer(lab, "b"),
            lab.address("b"),
            port=each,
            options=ENDS["client"],
        )
        for each in (0, port)
    )
    host.watch_cold(silent, "control_messages")
    host.make_hot(spoken)
    for pair in (silent, spoken):
        pair.verify()


@pytest.mark.parametrize("option", TIMESTAMPS)
def test_timestamps_stay_refused(host: Host, lab: Lab, option: str) -> None:
    """A time cannot be had otherwise: who asks for timestamps as well stays plain, or goes back."""
    both = [TCP_INQ, TIMESTAMPS[option]]
    host.watch_cold(host.pair(lab, options=([], both)), "control_messages")
    pair = host.hot_pair(lab, options=([], [TCP_INQ]))
    pair.server.setsockopt(*TIMESTAMPS[option])
    host.wait_flow(pair, "paired", "control_messages")
    host.watch_cold(pair, "control_messages")
    pair.verify()


def test_no_answer_for_redirected_bytes(host: Host, lab: Lab) -> None:
    """Redirected bytes come without an answer; it comes again with the first bytes from TCP."""
    pair = host.hot_pair(lab, options=([], [TCP_INQ]))
    pair.client.say("0123456789")
    assert pair.server.wait_fionread(count=10) == 10
    assert pair.server.hear_message(count=4) == ["0123", []]
    assert pair.server.hear_message(count=10) == ["456789", []]
    host.daemon.drain()
    wait_until("it is plain", lambda: host.flow(pair)["state"] == "paired")
    pair.client.say("0123456789")
    assert pair.server.wait_fionread(count=10) == 10
    assert pair.server.hear_message(count=4) == ["0123", [[*TCP_INQ[:2], 6]]]
    assert pair.server.hear_message(count=10) == ["456789", [[*TCP_INQ[:2], 0]]]
    pair.verify()
