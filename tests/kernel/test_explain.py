# SPDX-License-Identifier: Apache-2.0
"""`splicer explain`: what it says of a connection is what is so, whatever the connection is.

A case is a row of SCENES: a scene makes a connection and says what must be told of it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Outcome, call, wait_until
from support.engine import FakeEngine, name_id
from support.firewall import Firewall
from support.host import Host
from support.lab import Lab
from support.meddler import in_foreign_sockhash
from support.players import QUIRKS, Pair

SO_MAX_PACING_RATE = 47


def ask(host: Host, *subject: str) -> Outcome:
    return call("explain", *subject, f"--run-dir={host.run_dir}")


def explain(host: Host, *subject: str) -> list[dict[str, Any]]:
    """The connections of an answer, the same in words and as JSON."""
    done = ask(host, *subject, "--json")
    assert (done.code, done.stderr) == (0, ""), done
    assert all(len(line) <= 79 for line in ask(host, *subject).stdout.splitlines())
    return list(json.loads(done.stdout)["connections"])


def spell(pair: Pair) -> tuple[str, str]:
    """The two addresses of a connection, as its client sees them."""
    return tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in ends(pair))  # type: ignore[return-value]


def ends(pair: Pair) -> tuple[tuple[str, int], tuple[str, int]]:
    return pair.client.local, pair.client.remote


def find_failed(told: dict[str, Any]) -> list[str]:
    """But for the pause between attempts, which is over while we look."""
    return [each["check"] for each in told["checks"] if each["passed"] is False and each["check"] != "pause"]


@dataclass
class Told:
    """What must be said of a connection: state, reason, which checks have failed, and words that must be in
    what was seen, in what comes next, and in what would change it."""

    pair: Pair
    state: str
    reason: str
    failed: list[str]
    saw: str = ""
    next: str = ""
    change: str = ""
    subject: tuple[str, ...] = ()
    verify: bool = True
    flow: bool = True


Scene = Callable[[Host, Lab, contextlib.ExitStack], Told]


def spliced(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    return Told(host.hot_pair(lab), "spliced", "", [], "O_NONBLOCK", "for as long as all of this holds")


def cold(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    pair.pingpong(9)
    reads = host.flow(pair)
    assert reads["reason"] == "cold"
    return Told(pair, "paired", "cold", ["cold"], "of 16 reads, server", "times more", "splicer set --port")


def young(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    """It has said nothing so far."""
    return Told(
        host.pair(lab),
        "paired",
        "cold",
        ["cold"],
        "client 0 of 16 reads, server 0 of 16",
        "16 times more",
        flow=False,  # its namespace is not known yet
    )


def splices(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    for _ in range(20):
        pair.client.send(64)
        assert pair.server.splice_in(count=64) == 64
        pair.server.send(64)
        assert pair.client.recv(64) == 64
    host.wait_flow(pair, "paired", "splice_reader")
    seen = "a read by splice(2) was seen"
    never = "it stays plain for as long as it lives"
    return Told(pair, "paired", "splice_reader", ["splice_reader"], seen, never, "switch splice(2) off")


def blocks(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab, blocking=(True, True))
    host.talk_until(pair, "paired", "blocking_reader")
    seen = "no O_NONBLOCK"
    return Told(pair, "paired", "blocking_reader", ["blocking_reader"], seen, "tried again", "O_NONBLOCK")


def set_off(host: Host, lab: Lab, stack: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    port = str(pair.client.remote[1])
    done = call("set", "--port", port, "off", f"--run-dir={host.run_dir}")
    assert done.code == 0
    stack.callback(call, "unset", "--port", port, f"--run-dir={host.run_dir}")
    pair.pingpong(40)
    seen = f"mode off, by override of port {port}"
    return Told(
        pair, "paired", "policy_off", ["policy_off"], seen, "until the policy changes", "splicer unset --port"
    )


def paused(host: Host, lab: Lab, stack: contextlib.ExitStack) -> Told:
    pair = host.hot_pair(lab)
    assert call("pause", f"--run-dir={host.run_dir}").code == 0
    stack.callback(call, "resume", f"--run-dir={host.run_dir}")
    host.talk_until(pair, "paired", "policy_off")
    return Told(
        pair,
        "paired",
        "policy_off",
        ["splicing", "policy_off"],
        "splicer pause",
        "until splicer resume",
        "resume",
    )


def streams(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.hot_pair(lab)
    pair.server.begin("recv", count=60_000)
    pair.client.send(60_000, chunk=300)
    pair.server.finish()
    host.wait_flow(pair, "paired", "stream")
    return Told(pair, "paired", "stream", ["stream"], "no further attempt for", "tried again", "faster")


def tls(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    if pair.client.attempt("set_ulp", name="tls") == "ENOENT":
        pytest.skip("this kernel has no TLS")
    host.talk_until(pair, "paired", "ulp")
    return Told(
        pair,
        "paired",
        "ulp",
        ["ulp"],
        "client: kernel TLS or another one; server: no upper layer protocol",
        "tried again",
        "kernel TLS",
    )


def foreign(host: Host, lab: Lab, stack: contextlib.ExitStack) -> Told:
    pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b", program=QUIRKS), lab.address("b"))
    number = pair.server.fileno()
    stack.enter_context(in_foreign_sockhash(pair.server.peer.pid, number))
    host.talk_until(pair, "paired", "foreign_psock")
    seen = "server: in somebody else's sockmap"
    return Told(pair, "paired", "foreign_psock", ["foreign_psock"], seen, "tried again", "other sockmap")


def lowat(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 3)
    host.talk_until(pair, "paired", "rcvlowat")
    seen = "client: SO_RCVLOWAT 1; server: SO_RCVLOWAT 3"
    return Told(pair, "paired", "rcvlowat", ["rcvlowat"], seen, "tried again", "SO_RCVLOWAT at 1")


def lowat_taken_back(host: Host, lab: Lab, stack: contextlib.ExitStack) -> Told:
    """What is seen now is fine, and what was found out last holds all the same: both are said."""
    told = lowat(host, lab, stack)
    told.pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    told.saw = "failed when last looked at; now: both ends: SO_RCVLOWAT 1"
    return told


def paced(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.pair(lab)
    pair.client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 100_000_000)
    host.talk_until(pair, "paired", "pacing")
    seen = "client: SO_MAX_PACING_RATE 100000000 bytes/s; server: no pacing"
    return Told(pair, "paired", "pacing", ["pacing"], seen, "tried again", "SO_MAX_PACING_RATE")


def remote(host: Host, lab: Lab, stack: contextlib.ExitStack) -> Told:
    """No socket of this host is the other end: so a connection to another host looks from here. Its server
    has reset it, and the RST was lost on the way."""
    pair = host.pair(lab)
    pair.pingpong(4)
    stack.enter_context(Firewall(lab.namespace("a")).dropping(pair.client.local[1]))
    pair.server.reset()
    wait_until("its record has gone", lambda: host.find_flow(pair) is None)
    return Told(
        pair, "plain", "remote", ["local"], "no socket on this host", "stays plain", "one host", verify=False
    )


def outside(host: Host, lab: Lab, _: contextlib.ExitStack) -> Told:
    pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b", inside=False), lab.address("b"))
    pair.pingpong(40)
    return Told(pair, "plain", "outside", ["cgroup"], f"not in {host.cgroup.path}", "stays plain", "--cgroup")


SCENES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        spliced,
        cold,
        young,
        splices,
        blocks,
        set_off,
        paused,
        streams,
        tls,
        foreign,
        lowat,
        lowat_taken_back,
        paced,
        remote,
        outside,
    )
}


def check(host: Host, wanted: Told) -> None:
    """What is told of the connection by its addresses, in either order, and by its client's pid."""
    local, other = wanted.subject or spell(wanted.pair)
    for subject in ((local, other), (other, local), (str(wanted.pair.client.peer.pid),)):
        if wanted.reason == "remote" and subject == (other, local):
            continue  # that side is nobody's
        [told] = explain(host, *subject)
        assert (told["state"], told["reason"]) == (wanted.state, wanted.reason), told
        assert find_failed(told) == wanted.failed, told["checks"]
        seen = "\n".join(each["saw"] for each in told["checks"])
        assert wanted.saw in seen, seen
        assert wanted.next in told["next"], told["next"]
        assert wanted.change in "\n".join(told["change"]), told["change"]
    flow = host.find_flow(wanted.pair)
    if not wanted.flow:
        return
    if wanted.state != "plain":
        assert flow is not None
        assert (flow["state"], flow["reason"]) == (wanted.state, wanted.reason), "explain and flows disagree"
    else:
        assert flow is None, "flows knows it"


@pytest.mark.parametrize("name", SCENES)
def test_what_is_said_is_so(host: Host, lab: Lab, name: str) -> None:
    with contextlib.ExitStack() as stack:
        wanted = SCENES[name](host, lab, stack)
        check(host, wanted)
    if wanted.verify:
        wanted.pair.pingpong(4)
        wanted.pair.verify()


def test_when_it_was_tried_and_will_be(host: Host, lab: Lab) -> None:
    """The last attempt, and how long the pause is that follows; after more refusals it is a longer one."""
    wanted = lowat(host, lab, contextlib.ExitStack())
    [told] = explain(host, *spell(wanted.pair))
    assert told["tried_seconds"] is not None
    assert told["next_seconds"] > 0
    assert told["tried_seconds"] + told["next_seconds"] <= 2.5, "the first pauses are short"
    host.forget_cool_downs()
    host.talk_until(wanted.pair, "paired", "rcvlowat")

    def is_longer() -> bool:
        wanted.pair.pingpong(40)
        [now] = explain(host, *spell(wanted.pair))
        return bool((now["next_seconds"] or 0) > told["next_seconds"])

    wait_until("the pause is longer", is_longer, timeout=10.0)


def test_a_full_table(lab: Lab) -> None:
    """A connection that splicer has no room for is not known to it: that is why."""
    with Host("--max-connections", "16") as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        pairs = [host.connect(client, server, lab.address("b")) for _ in range(20)]
        for pair in pairs:
            pair.pingpong(4)
        [left, *_] = [pair for pair in pairs if host.find_flow(pair) is None]
        [told] = explain(host, *spell(left))
        assert (told["state"], told["reason"]) == ("plain", "map_full")
        assert find_failed(told) == ["map_full"]
        assert "of at most 16 are followed" in told["checks"][-1]["saw"]
        assert "--max-connections" in told["change"][0]
        # The client has them all: those that are known, and those that are not.
        told_of = explain(host, str(client.pid))
        unknown = sum(each["count"] for each in told_of if each["reason"] == "map_full")
        assert unknown == sum(host.find_flow(pair) is None for pair in pairs)
        assert sum(each["count"] for each in told_of) == len(pairs)


@pytest.mark.parametrize("option", ["--no-census", "--census"])
def test_one_that_is_older(lab: Lab, option: str) -> None:
    """Older than splicer: left alone if it is told to, and said so; else it is found, and like any other."""
    with Host(start=False) as host:
        pair = host.pair(lab)
        pair.pingpong(20)
        host.start(*([option] if option == "--no-census" else []))
        wait_until(
            "the census has ended", lambda: host.daemon.status()["census"]["state"] != "running", timeout=30
        )
        [told] = explain(host, *spell(pair))
        if option == "--no-census":
            assert (told["state"], told["reason"]) == ("plain", "older")
            assert find_failed(told) == ["followed"]
            assert "--no-census" in told["checks"][-1]["saw"]
            assert "connect anew" in told["change"][0]
        else:
            assert (told["state"], told["reason"]) == ("paired", "cold")
            host.make_hot(pair)
            assert explain(host, *spell(pair))[0]["state"] == "spliced"
        pair.verify()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with tempfile.TemporaryDirectory(prefix="splicer-test-engine-") as directory:
        made = FakeEngine(str(Path(directory) / "engine.sock"))
        yield made
        made.stop()


def test_a_container_that_is_switched_off(lab: Lab, engine: FakeEngine) -> None:
    """By its name, by its service and by its addresses: off, by whose word, and how to change it."""
    with Host(f"--docker={engine.url}", start=False) as host:
        inside = host.cgroup.child(f"docker-{name_id(7)}.scope")
        server = host.peer(lab, "b", cgroup=inside)
        labels = {"splicer.mode": "off", "com.docker.compose.service": "web"}
        engine.run(7, name="shop-web-1", labels=labels, pid=server.pid)
        host.start()
        pair = host.connect(host.peer(lab, "a"), server, lab.address("b"))
        host.talk_until(pair, "paired", "policy_off")
        for subject in (("shop-web-1",), ("web",), spell(pair)):
            [told] = explain(host, *subject)
            assert (told["reason"], find_failed(told)) == ("policy_off", ["policy_off"])
            assert told["server"]["container"] == "shop-web-1"
            seen = [each["saw"] for each in told["checks"] if each["check"] == "policy_off"]
            assert seen == ["mode off, by label splicer.mode, of the server"]
            assert "label splicer.mode" in told["change"][0]
        assert call("set", "shop-web-1", "adaptive", f"--run-dir={host.run_dir}").code == 0
        host.make_hot(pair)
        assert explain(host, "shop-web-1")[0]["state"] == "spliced"
        assert call("unset", "shop-web-1", f"--run-dir={host.run_dir}").code == 0
        host.talk_until(pair, "paired", "policy_off")
        pair.verify()


def test_one_that_nobody_knows(host: Host) -> None:
    [told] = explain(host, "192.0.2.1:1", "192.0.2.2:2")
    assert (told["state"], told["reason"], find_failed(told)) == ("", "unknown", ["exists"])
    assert "Nobody on this host" in ask(host, "192.0.2.1:1", "192.0.2.2:2").stdout


def test_who_asks_for_what_is_not_there(host: Host) -> None:
    for subject, code, said in (
        (("192.0.2.1", "192.0.2.2:2"), 2, "not an address with a port (192.0.2.1)"),
        (("nobody",), 1, "no running container"),
        (("4194305",), 1, "cannot look at the sockets of that process"),
        (("1.2.3.4:5",), 2, "only one of two addresses"),
        (("a", "b", "c"), 2, "too many of two addresses"),
    ):
        done = ask(host, *subject)
        assert done.code == code, done
        assert said in done.stderr
        assert "hint: " in done.stderr


def test_the_kernel_and_the_book_agree(host: Host, lab: Lab) -> None:
    """What `explain` says of the policy is computed anew, and is what the programs have decided: with rules
    by cgroup, address and port, in either order, at either end."""
    web, app = host.cgroup.child("web"), host.cgroup.child("app")
    tables = [
        f'[[policy]]\ncgroup = "{web.path}"\nmode = "off"\n',
        f'[[policy]]\ncgroup = "{app.path}"\nmode = "adaptive"\n',
        f'[[policy]]\ncidr = "{lab.address("b")}"\nmode = "off"\n',
        '[[policy]]\nports = 7911\nmode = "adaptive"\n',
        '[[policy]]\ncgroup = "nowhere"\nmode = "off"\n',
    ]
    before = host.config.read_text()
    pairs = [
        host.connect(
            host.peer(lab, "a", cgroup=client),
            host.peer(lab, "b", cgroup=server),
            lab.address("b"),
            port=port,
        )
        for port, (client, server) in enumerate(
            ((web, app), (app, web), (None, web), (app, None), (None, None)), 7910
        )
    ]
    try:
        for turn in range(len(tables)):
            host.reload("".join(tables[turn:] + tables[:turn]))
            for pair in pairs:
                pair.pingpong(40)
            for pair in pairs:
                [told] = explain(host, *spell(pair))
                mode = next(each["saw"] for each in told["checks"] if each["check"] == "policy_off")
                state = "paired" if "mode off" in mode else "spliced"
                host.talk_until(pair, state)
    finally:
        host.reload(before)
    for pair in pairs:
        pair.verify()
