# SPDX-License-Identifier: Apache-2.0
"""The share of the local bytes that is redirected, as splicer says it, is what the applications have sent."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections import Counter
from typing import Any

from support.bpf import counting_runs, read_runs
from support.daemon import call, wait_until
from support.host import OFF, Host
from support.lab import Lab
from support.meddler import counting_callbacks
from support.players import End, Pair


class Ledger:
    """What applications have sent on local connections, both ways, by what became of these."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def close(self, kind: str, pair: Pair, how: str = "client") -> None:
        """All is read and nobody resets: both sides know exactly what went through."""
        pair.verify()
        self.sent[kind] += _count(pair)
        first, second = (pair.client, pair.server) if how != "server" else (pair.server, pair.client)
        if how == "half":
            first.shutdown(how=socket.SHUT_WR)
            assert second.recv(1) == 0
        first.close()
        second.close()

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def _count(pair: Pair) -> int:
    return int(pair.client.report()["sent"]) + int(pair.server.report()["sent"])


def measure(host: Host) -> dict[str, Any]:
    return dict(host.daemon.command("status", coverage=True)["coverage"])


def _by_reason(coverage: dict[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in coverage["plain"]:
        assert row["plain_bytes"] > 0, "a reason without bytes"
        found[row["reason"]] += row["plain_bytes"]
    assert sum(found.values()) + coverage["others_bytes"] == coverage["plain_bytes"]
    return found


def _wait_for_total(host: Host, expected: int) -> dict[str, Any]:
    """What is acknowledged a moment later counts a moment later."""

    def read() -> dict[str, Any] | None:
        seen = measure(host)
        last.append(seen["redirected_bytes"] + seen["plain_bytes"])
        return seen if last[-1] == expected else None

    last: list[int] = []
    try:
        found: dict[str, Any] = wait_until("all bytes are counted", read)
    except AssertionError as error:
        raise AssertionError(f"{expected} bytes were sent, and {last[-1]} are counted") from error
    return found


def _ask_ss(lab: Lab, place: str, end: End) -> int:
    """What ss says that the socket of this end has sent and received."""
    inside = ["ip", "netns", "exec", lab.namespace(place)]
    command = [*inside, "ss", "-tinH", f"sport = :{end.local[1]} and dport = :{end.remote[1]}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"bytes_(?:acked|received):(\d+)", said)))


def test_nothing_yet(lab: Lab) -> None:
    """No local connection; then one to a peer outside of the cgroup, which is none of ours."""
    with Host() as host:
        seen = measure(host)
        assert (seen["redirected_bytes"], seen["plain_bytes"], seen["share"]) == (0, 0, None)
        assert seen["plain"] == []
        remote = host.connect(host.peer(lab, "a"), host.peer(lab, "far", inside=False), lab.address("far"))
        remote.pingpong(100, 1000, 1000)
        assert measure(host)["share"] is None
        said = call("status", f"--run-dir={host.run_dir}").stdout.splitlines()
        assert said[1].startswith("No local TCP bytes yet (since ")
        advised = call("advise", f"--run-dir={host.run_dir}")
        assert advised.code == 0
        assert advised.stdout.splitlines()[-1] == "Nothing to advise: nothing was sent yet."
        remote.verify()


def test_share_is_what_was_sent(lab: Lab) -> None:
    """Spliced, off, refused, short, older than splicer, remote; open and closed, in every order of closing:
    all bytes are counted, by the right reason, once, and not one more. Then the same after a crash."""
    with Host(start=False) as host:
        older = host.pair(lab, blocking=(False, True))
        older.pingpong(100, 5000, 300)
        before = _count(older)
        host.start()
        wait_until("the census has ended", lambda: host.daemon.status()["census"]["state"] == "done")
        ledger = Ledger()
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        address = lab.address("b")
        spliced = host.connect(client, server, address)
        host.make_hot(spliced)
        spliced.pingpong(200, 3000, 40)
        remote = host.connect(client, host.peer(lab, "far", inside=False), lab.address("far"))
        remote.pingpong(50, 10_000, 10_000)
        off = host.connect(client, server, address, port=OFF)
        off.pingpong(60, 700, 1100)
        refused = host.connect(client, server, address, blocking=(False, True))
        host.watch_cold(refused, "blocking_reader")
        loopback = host.connect(server, server, "127.0.0.1")
        for how in ("client", "server", "half") * 7:
            short = host.connect(client, server, address)
            short.client.send(100)
            assert short.server.recv(100) == 100
            short.server.send(777)
            assert short.client.recv(777) == 777
            ledger.close("cold", short, how)
        for how in ("client", "server", "half"):
            hot = host.connect(client, server, address)
            host.make_hot(hot)
            hot.pingpong(100, 500, 500)
            ledger.close("hot", hot, how)
            closed = host.connect(client, server, address, port=OFF)
            closed.pingpong(40, 900, 100)
            ledger.close("off", closed, how)
        older.pingpong(50, 2000, 200)
        for _ in range(30):
            loopback.client.send(300)
            loopback.server.recv(300)
        open_bytes = {
            "spliced": _count(spliced),
            "off": _count(off),
            "refused": _count(refused),
            "older": _count(older) - before,
            "loopback": _count(loopback),
        }
        expected = ledger.total + sum(open_bytes.values())
        seen = _wait_for_total(host, expected)
        by_reason = _by_reason(seen)
        assert seen["is_complete"] and seen["older_uncounted"] == 0
        assert by_reason["policy_off"] == open_bytes["off"] + ledger.sent["off"]
        assert by_reason["blocking_reader"] + by_reason["cold"] == (
            open_bytes["refused"] + open_bytes["older"] + ledger.sent["cold"] + open_bytes["loopback"]
        )
        redirected = open_bytes["spliced"] + ledger.sent["hot"] - by_reason[""]
        assert seen["redirected_bytes"] == redirected == host.daemon.totals()["redirected_bytes"]
        assert seen["share"] == redirected / expected
        assert _ask_ss(lab, "b", off.server) == open_bytes["off"]
        assert "% of local TCP bytes are redirected (" in call("status", f"--run-dir={host.run_dir}").stdout
        host.daemon.kill()
        off.pingpong(10, 1000, 1000)
        ledger.close("off", off, "server")
        host.start()
        again = _wait_for_total(host, expected + 20_000)
        assert again["since"] == seen["since"]
        assert _by_reason(again)["policy_off"] == by_reason["policy_off"] + 20_000
        for kind, pair in (("x", spliced), ("x", refused), ("x", older), ("x", loopback)):
            ledger.close(kind, pair)
        wait_until("nothing is open", lambda: not host.daemon.flows())
        assert _by_reason(_wait_for_total(host, expected + 20_000)) == _by_reason(again)
        remote.verify()


def test_many_parties(lab: Lab) -> None:
    """Each row says who talks to whom, more of them than a CPU keeps apart at once, and also when the
    connections, and then the processes, have gone."""
    with Host() as host:
        server = host.peer(lab, "b", cgroup=host.cgroup.child("store"))
        expected: Counter[str] = Counter()
        crowd = [host.cgroup.child(f"client-{number}") for number in range(40)]
        for turn in range(2):
            for number, cgroup in enumerate(crowd):
                client = host.peer(lab, "a", cgroup=cgroup)
                pair = host.connect(client, server, lab.address("b"))
                pair.pingpong(1, 100 + number, 1000 * (turn + 1))
                expected[cgroup.path.name] += _count(pair)
                pair.close()
                client.stop()
        _wait_for_total(host, sum(expected.values()))
        found: Counter[str] = Counter()
        for row in measure(host)["plain"]:
            assert row["server"]["cgroup"].endswith("/store") and row["reason"] == "cold"
            assert row["connections"] == 2
            found[row["client"]["cgroup"].rpartition("/")[2]] += row["plain_bytes"]
        assert found == expected


def test_beyond_the_limit(lab: Lab) -> None:
    """Those for which there was no room count when they close, and those of other machines never: also where
    somebody else asks for the changes of state of every socket."""
    with Host("--max-connections", "16") as host, counting_callbacks(host.cgroup.path):
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        elsewhere = host.peer(lab, "far", inside=False)
        pairs = [host.connect(client, server, lab.address("b")) for _ in range(20)]
        remote = [
            host.connect(client, elsewhere, lab.address("far")),
            host.connect(elsewhere, server, lab.address("b")),
        ]
        for pair in (*pairs, *remote):
            pair.pingpong(3, 200, 800)
        everything = sum(_count(pair) for pair in pairs)
        for pair in (*pairs, *remote):
            pair.close()
        by_reason = _by_reason(_wait_for_total(host, everything))
        refused = host.daemon.totals()["refused"]["map_full"]
        assert by_reason["map_full"] == refused * 3000 > 0
        advised = json.loads(call("advise", "--json", f"--run-dir={host.run_dir}").stdout)["advice"]
        assert "max_connections = 32" in [each["toml"] for each in advised]


def test_advice_helps(lab: Lab) -> None:
    """What it says of a reader that blocks is pasted: then the connection is spliced."""
    with Host() as host:
        client = host.peer(lab, "a")
        server = host.peer(lab, "b", cgroup=host.cgroup.child("store"))
        pair = host.connect(client, server, lab.address("b"), blocking=(False, True))
        host.watch_cold(pair, "blocking_reader")
        said = call("advise", f"--run-dir={host.run_dir}").stdout
        advised = json.loads(call("advise", "--json", f"--run-dir={host.run_dir}").stdout)["advice"]
        (advice,) = [each for each in advised if each["reason"] == "blocking_reader"]
        for line in advice["toml"].splitlines():
            assert f"  {line}\n" in said
        host.reload(advice["toml"])
        host.make_hot(pair)
        pair.verify()


def test_nobody_pays_who_does_not_ask(host: Host, lab: Lab) -> None:
    pair = host.hot_pair(lab)
    with counting_runs():
        before = read_runs(host.pin_dir, "tally")
        assert host.daemon.status()["coverage"] == {}
        call("status", "--brief", f"--run-dir={host.run_dir}")
        assert read_runs(host.pin_dir, "tally") == before
        assert measure(host)["plain_bytes"] > 0
        assert read_runs(host.pin_dir, "tally") > before
    pair.verify()
