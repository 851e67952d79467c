# SPDX-License-Identifier: Apache-2.0
"""Programs that read in ways which redirected bytes do not survive. Each docstring says what is guaranteed.

What a socket itself shows before it is spliced (blocking, SO_RCVLOWAT, SO_ZEROCOPY, SO_PEEK_OFF, TCP_INQ,
pacing, MPTCP) is in probes/unspliced.py, and what an application asks for later in probes/options.py. Here
are the readers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import EAGER, Host
from support.lab import Lab
from support.players import Pair
from support.requirements import VARIABLE

RELAY = Path(__file__).with_name("relay.py")
FRONT, BACK = 7601, 7602
PLAIN_REASONS = {"splice_reader", "unknown_reader", "blocking_reader"}


@pytest.fixture
def quiet_host(host: Host) -> Iterator[Host]:
    """The host without peers and connections of other tests."""
    wait_until("earlier connections are gone", lambda: not host.daemon.flows())
    yield host
    host.stop_peers()
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)


@contextmanager
def _relay(
    host: Host, lab: Lab, mode: str, front: int = FRONT, back: int = BACK
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-S", str(RELAY), mode, str(front), lab.address("b"), str(back)]
    with host.running(lab, "a", command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def _connect(host: Host, lab: Lab, front: int = FRONT, back: int = BACK) -> Pair:
    """A connection from a client through what listens on `front` of host a to a server on host b."""
    client, server = host.peer(lab, "b"), host.peer(lab, "b")
    return host.connect(client, server, lab.address("b"), port=back, dial=(lab.address("a"), front))


def _legs(host: Host, port: int) -> list[dict[str, Any]]:
    """The known connections to a port."""
    return [flow for flow in host.daemon.flows() if flow["remote"].endswith(f":{port}")]


def _mixed_traffic(pair: Pair) -> None:
    """Request and response, then bulk both ways; every byte is checked."""
    pair.pingpong(60)
    for count in (300_000, 2_000_000):
        pair.server.begin("recv", count=count)
        pair.client.send(count)
        assert pair.server.finish() == count
        pair.client.begin("recv", count=count)
        pair.server.send(count)
        assert pair.client.finish() == count
    pair.pingpong(60, size=3000, answer=9000)
    pair.verify()


def _is_plain(flow: dict[str, Any]) -> bool:
    return flow["state"] == "paired" and flow["reason"] in PLAIN_REASONS


@pytest.mark.parametrize("mode", ["go", "threads"])
def test_relay_that_splices_from_the_start(quiet_host: Host, lab: Lab, mode: str) -> None:
    """Go's io.Copy, docker-proxy: guaranteed. Both of its connections are recognised within their first reads
    and never spliced, and neither are those that the process makes later."""
    host = quiet_host
    with _relay(host, lab, mode):
        for _ in range(3):
            pair = _connect(host, lab)
            _mixed_traffic(pair)
            for port in (FRONT, BACK):
                legs = _legs(host, port)
                assert legs
                assert [flow for flow in legs if not _is_plain(flow)] == []
                assert {flow["redirected_messages"] for flow in legs} == {0}
            assert host.count_spliced() == 0


@pytest.mark.parametrize(("front", "back"), [(EAGER, BACK), (FRONT, EAGER)], ids=["front", "back"])
def test_relay_that_splices_under_eager(quiet_host: Host, lab: Lab, front: int, back: int) -> None:
    """Guaranteed under `eager` as well: nothing is redirected to an end before it was seen to read, and what
    is read by splice(2) goes back to plain TCP. Whoever speaks first, nobody waits for ever."""
    host = quiet_host
    with _relay(host, lab, "go", front, back):
        for _ in range(4):
            pair = _connect(host, lab, front, back)
            pair.client.send(100)
            assert pair.server.attempt("recv", count=100, timeout=10.0) == 100
            pair.server.send(100)
            assert pair.client.attempt("recv", count=100, timeout=10.0) == 100
            _mixed_traffic(pair)


def test_relay_without_splice_is_spliced(quiet_host: Host, lab: Lab) -> None:
    """The same relay with recv(2) and send(2) is spliced at both sides: what keeps the others plain is how
    they read."""
    host = quiet_host
    with _relay(host, lab, "copy"):
        pair = _connect(host, lab)
        wait_until("both legs are spliced", lambda: pair.pingpong(40) or host.count_spliced() == 4)
        _mixed_traffic(pair)


def test_relay_that_splices_after_a_head(quiet_host: Host, lab: Lab) -> None:
    """HAProxy, Go's HTTP proxies: a relay reads heads by recv(2), is spliced, and then splices. Guaranteed if
    nothing redirected waits at that moment: the first splice(2), even one that finds nothing, sends the
    connection back; what follows is seen by splice(2). The process is remembered: later connections are plain
    from the start."""
    host = quiet_host
    with _relay(host, lab, "headers"):
        pair = _connect(host, lab)
        _pingpong_within_the_head(host, pair)
        # The rest of the head and one round more, a message at a time: the splice comes upon an empty queue.
        pair.pingpong(4, size=1000, answer=1000, pause=0.005)
        _mixed_traffic(pair)
        wait_until(
            "both legs are plain", lambda: all(_is_plain(f) for f in _legs(host, FRONT) + _legs(host, BACK))
        )
        second = _connect(host, lab)
        _mixed_traffic(second)
        for flow in _legs(host, FRONT) + _legs(host, BACK):
            assert _is_plain(flow), flow
        assert host.count_spliced() == 0


def _pingpong_within_the_head(host: Host, pair: Pair) -> None:
    """Until both legs are spliced, with less than the relay reads by hand."""
    for _ in range(100):
        pair.pingpong(1, size=32, answer=32, pause=0.02)
        if host.count_spliced() == 4:
            break
    else:
        raise AssertionError(f"both legs are not spliced: {host.daemon.flows()}")
    pair.pingpong(4, size=32, answer=32)


def test_relay_that_splices_with_the_body_behind_the_head(quiet_host: Host, lab: Lab) -> None:
    """Not guaranteed, see KNOWN_ISSUES.md: the first splice(2) in the life of a process comes upon redirected
    bytes. It does not see them, and whoever waits for them on that connection waits until they are read by
    recv(2). What is guaranteed: nothing wrong arrives, for what follows waits behind them; the process is
    remembered, and its next connections are whole."""
    host = quiet_host
    with _relay(host, lab, "headers"):
        pair = _connect(host, lab)
        _pingpong_within_the_head(host, pair)
        body = 400_000
        pair.client.send(body, chunk=10_000)  # too few to be a stream, which goes back by itself
        received = pair.server.attempt("recv", count=body, timeout=1.0)
        report = pair.server.report()
        assert report["first_wrong"] is None
        if received == "TIMEOUT":
            assert report["received"] < pair.client.report()["sent"]
        wait_until(
            "no leg is spliced", lambda: "spliced" not in {flow["state"] for flow in host.daemon.flows()}
        )
        second = _connect(host, lab)
        _mixed_traffic(second)
        assert {flow["redirected_messages"] for flow in _legs_of(host, second)} == {0}


def _legs_of(host: Host, pair: Pair) -> list[dict[str, Any]]:
    """The rows of both connections that make up a relayed one."""
    ports = {f":{pair.client.local[1]}", f":{pair.server.remote[1]}"}
    return [flow for flow in host.daemon.flows() if any(flow["local"].endswith(port) for port in ports)]


def test_reader_that_starts_to_splice(quiet_host: Host, lab: Lab) -> None:
    """Guaranteed: the first splice(2) of a process on an end with nothing waiting takes that connection back
    at once (no message is redirected after it), its other connections go back within the watch's second, and
    no later one is spliced. Another process is not concerned."""
    host = quiet_host
    client, server, bystander = host.peer(lab, "a"), host.peer(lab, "b"), host.peer(lab, "b")
    address = lab.address("b")
    pairs = [host.connect(client, server, address) for _ in range(3)]
    other = host.connect(client, bystander, address)
    for pair in (*pairs, other):
        host.make_hot(pair)
    first = pairs[0]
    assert first.server.attempt("splice_nothing") == "EAGAIN"
    redirected = host.flow(first)["redirected_messages"]
    first.client.send(5000)
    assert first.server.splice_in(count=5000) == 5000
    assert host.flow(first)["redirected_messages"] == redirected
    host.wait_flow(first, "paired", "splice_reader")
    for pair in pairs[1:]:
        host.wait_flow(pair, "paired", "splice_reader", timeout=2.5)
        pair.pingpong(20)
        pair.verify()
    late = host.connect(client, server, address)
    host.watch_cold(late, "splice_reader")
    assert host.flow(other)["state"] == "spliced"
    other.pingpong(10)
    other.verify()


def test_reader_that_splices_while_bytes_wait(quiet_host: Host, lab: Lab) -> None:
    """Not guaranteed, see KNOWN_ISSUES.md: a first splice(2) while redirected bytes wait does not see them,
    nor what is sent then. All of it is kept for recv(2), nothing is lost or reordered, and the connection is
    plain from then on."""
    host = quiet_host
    pair = host.hot_pair(lab)
    pair.client.send(1000)
    assert pair.server.attempt("splice_nothing") == "EAGAIN"
    pair.client.send(500)
    assert pair.server.attempt("splice_nothing") == "EAGAIN"
    assert pair.server.recv(1500) == 1500
    host.wait_flow(pair, "paired", "splice_reader")
    pair.client.send(500)
    assert pair.server.splice_in(count=500) == 500
    pair.verify()


def test_reader_that_starts_to_block(quiet_host: Host, lab: Lab) -> None:
    """Guaranteed within the watch's second: a spliced socket whose O_NONBLOCK was cleared goes back to plain
    TCP, with the reason; then MSG_WAITALL and SO_RCVTIMEO mean what they say."""
    host = quiet_host
    pair = host.hot_pair(lab)
    pair.server.setblocking(blocking=True)
    host.wait_flow(pair, "paired", "blocking_reader", timeout=2.5)
    pair.server.begin("recv_once", count=900, flags=0x100)
    for _ in range(3):
        pair.client.send(300)
        time.sleep(0.01)
    assert pair.server.finish() == 900
    pair.verify()


def _needs(program: str) -> None:
    if shutil.which(program) is None:
        refuse = pytest.fail if os.environ.get(VARIABLE) == "1" else pytest.skip
        refuse(f"the program {program} is missing: make setup-test installs it")


def test_socat(quiet_host: Host, lab: Lab) -> None:
    """A real socat, which copies with read(2) and write(2) between select(2): bytes are right whatever
    becomes of its connections."""
    _needs("socat")
    host = quiet_host
    command = ["socat", f"TCP4-LISTEN:{FRONT},reuseaddr,fork", f"TCP4:{lab.address('b')}:{BACK}"]
    with host.running(lab, "a", command) as process:
        _wait_listening(lab, "a", FRONT, process)
        for _ in range(2):
            pair = _connect(host, lab)
            _mixed_traffic(pair)
            pair.client.shutdown(how=1)
            assert pair.server.expect_eof()
        assert {flow["state"] for flow in host.daemon.flows()} <= {"paired", "spliced", "draining"}


HAPROXY = """
global
    maxconn 200
    nbthread 1
defaults
    mode {mode}
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    {splicing}
listen relay
    bind {bind}:{front}
    server one {address}:{back}
"""


@pytest.mark.parametrize(
    "splicing", ["option splice-auto", "option splice-request\n    option splice-response", ""]
)
def test_haproxy(quiet_host: Host, lab: Lab, splicing: str, tmp_path: Path) -> None:
    """A real HAProxy in TCP mode. Guaranteed: with splicing, every byte arrives, and once it has spliced its
    connections are plain; without, they are spliced like any other."""
    _needs("haproxy")
    host = quiet_host
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        HAPROXY.format(
            mode="tcp",
            splicing=splicing,
            bind=lab.address("a"),
            front=FRONT,
            address=lab.address("b"),
            back=BACK,
        )
    )
    with host.running(lab, "a", ["haproxy", "-db", "-f", str(config)]) as process:
        _wait_listening(lab, "a", FRONT, process)
        pairs = [_connect(host, lab) for _ in range(3)]
        for pair in pairs:
            _mixed_traffic(pair)
        for pair in pairs:
            _mixed_traffic(pair)
        legs = _legs(host, FRONT) + _legs(host, BACK)
        assert len(legs) == 6
        reasons = {flow["reason"] for flow in legs}
        print(reasons, [flow["redirected_messages"] for flow in legs])
        if "splice-request" in splicing:
            wait_until(
                "all are plain", lambda: all(_is_plain(f) for f in _legs(host, FRONT) + _legs(host, BACK))
            )
        if not splicing:
            assert "splice_reader" not in reasons


def _wait_listening(lab: Lab, place: str, port: int, process: subprocess.Popen[str]) -> None:
    def listens() -> bool:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        command = ["nsenter", f"--net=/run/netns/{lab.namespace(place)}", "ss", "-Htln", f"sport = :{port}"]
        return bool(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    wait_until(f"something listens on port {port}", listens)


KINDS: dict[str, Callable[[Pair], object]] = {
    # A stream of one direction is drained by itself; a splice must find it wherever it is.
    "splice": lambda pair: pair.server.attempt("splice_nothing"),
    "low water": lambda pair: pair.server.setsockopt(1, 18, 2),
    "zero copy": lambda pair: pair.server.setsockopt(1, 60, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_misbehaviour_in_the_middle_of_traffic(quiet_host: Host, lab: Lab, kind: str) -> None:
    """Guaranteed: whatever the moment at which a connection in full use becomes unfit, no byte is lost,
    repeated or misplaced, and it is plain in the end."""
    host = quiet_host
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    for number in range(6):
        # A splicing process is remembered, so the next round needs another one.
        server = host.peer(lab, "b") if kind == "splice" else server
        pair = host.connect(client, server, lab.address("b"))
        host.make_hot(pair)
        pair.client.begin("pingpong", rounds=60 + number * 30, size=500, answer=500)
        pair.server.echo(rounds=30, size=500, answer=500)
        KINDS[kind](pair)
        pair.server.echo(rounds=30 + number * 30, size=500, answer=500)
        pair.client.finish()
        wait_until("plain", lambda pair=pair: host.flow(pair)["state"] == "paired")
        pair.pingpong(20)
        pair.verify()
        pair.close()


def test_stack_of_relays(quiet_host: Host, lab: Lab) -> None:
    """A chain client - copying relay - splicing relay - server: each connection is judged by its own two
    ends."""
    host = quiet_host
    with ExitStack() as stack:
        stack.enter_context(_relay(host, lab, "go"))
        command = [sys.executable, "-I", "-S", str(RELAY), "copy", "7603", lab.address("a"), str(FRONT)]
        copying = stack.enter_context(host.running(lab, "a", command))
        assert copying.stdout is not None
        copying.stdout.readline()
        pair = _connect(host, lab, front=7603)
        for _ in range(4):
            pair.pingpong(60)
            time.sleep(0.05)
        _mixed_traffic(pair)
        for port in (FRONT, BACK):
            assert all(_is_plain(flow) for flow in _legs(host, port)), _legs(host, port)
        assert {flow["reason"] for flow in _legs(host, 7603)} & PLAIN_REASONS == set()
