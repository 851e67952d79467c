# SPDX-License-Identifier: Apache-2.0
"""What is redirected is seen by whoever taps, as packets that Wireshark puts together; nobody else pays."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bpf import counting_runs, list_held_named, list_objects, read_runs
from support.connection import Stream
from support.daemon import call, wait_until
from support.host import Host
from support.lab import Lab
from support.nginx import running_nginx
from support.players import Pair
from support.tapping import (
    Tap,
    follow,
    list_complaints,
    list_gaps,
    list_tappers,
    read_fields,
    tapping,
    tshark,
)

from splicer.host import sessions

SIZES = (1, 64, 300, 1500, 5000, 16384, 40_000, 100_000)
SEED = 71
HTTP, REDIS = 7731, 7732

# Asks again and again for the first path until the file is there; then for all, and leaves.
BROWSER = """
import http.client, os, sys
address, port, go, *paths = sys.argv[1:]
connection = http.client.HTTPConnection(address, int(port), timeout=30)
def get(path):
    connection.request("GET", path)
    return connection.getresponse().read()
while not os.path.exists(go):
    get("/warm")
for path in paths:
    get(path)
"""
# The same with commands in Redis's protocol: values are bytes of all kinds.
TYPIST = """
import os, random, socket, sys
address, port, go, count = sys.argv[1:]
sock = socket.create_connection((address, int(port)), timeout=30)
answers = sock.makefile("rb")
def do(*words):
    sock.sendall(b"*%d\\r\\n" % len(words) + b"".join(b"$%d\\r\\n%s\\r\\n" % (len(w), w) for w in words))
    head = answers.readline()
    return answers.read(int(head[1:]) + 2)[:-2] if head[:1] == b"$" else head
while not os.path.exists(go):
    do(b"PING")
for number in range(int(count)):
    value = random.Random(number).randbytes(100 * number + 1)
    assert do(b"SET", b"key-%d" % number, value) == b"+OK\\r\\n"
    assert do(b"GET", b"key-%d" % number) == value
"""


def _seeded(host: Host, lab: Lab, family: int = 4, **arguments: Any) -> Pair:
    """A spliced connection of whose streams one knows all bytes."""
    client, server = host.peer(lab, "a"), host.peer(lab, "b")
    client.call("rename", name="tap-wanted")
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    pair = host.connect(client, server, lab.address("b", family), client_family=kind, seed=SEED, **arguments)
    host.make_hot(pair)
    return pair


def _sent(pair: Pair) -> tuple[int, int]:
    return pair.client.report()["sent"], pair.server.report()["sent"]


def _look(before: tuple[int, int], after: tuple[int, int]) -> list[bytes]:
    """What each end has sent meanwhile."""
    found = []
    for number, (start, end) in enumerate(zip(before, after, strict=True)):
        stream = Stream(SEED * 2 + number)
        stream.advance(start)
        found.append(stream.look(end - start))
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_streams_are_put_together(host: Host, lab: Lab, tmp_path: Path, family: int) -> None:
    """Every byte of both directions, in order, without a gap and with nothing that Wireshark complains of."""
    pair = _seeded(host, lab, family)
    before = _sent(pair)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file)) as tap:
        for size in SIZES:
            pair.pingpong(2, size, size // 2 + 1)
    assert tap.outcome.code == 0, tap.outcome
    assert "none missed" in tap.outcome.stderr
    pair.verify()
    expected, found = _look(before, _sent(pair)), follow(file)
    assert [len(each) for each in found] == [len(each) for each in expected]
    assert list(found) == expected
    assert not list_complaints(file)
    ((source, target),) = {
        tuple(row)
        for row in read_fields(file, f"tcp.srcport == {pair.client.local[1]}", "tcp.srcport", "tcp.dstport")
    }
    assert (int(source), int(target)) == (pair.client.local[1], pair.client.remote[1])


def _go(host: Host, port: int, process: Any, go: Path) -> None:
    """Have a client that asks again and again go on, once its connection is spliced."""

    def is_spliced() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return any(
            flow["remote"].endswith(f":{port}") and flow["state"] == "spliced" for flow in host.daemon.flows()
        )

    wait_until("the client is spliced", is_spliced)
    go.touch()
    process.wait(60)
    assert process.returncode == 0, process.communicate()[0]


def test_requests_and_answers_of_nginx(host: Host, lab: Lab, tmp_path: Path) -> None:
    """tshark finds each request in its order, and takes each document out of the answers as it was sent:
    from memory and by sendfile(2), small and large."""
    assert shutil.which("nginx"), "the program nginx is missing: make setup-test installs it"
    root = tmp_path / "root"
    root.mkdir()
    documents = {
        f"document-{size}": random.Random(size).randbytes(size) for size in (1, 200, 9000, 40_000, 300_000)
    }
    for name, text in {**documents, "warm": b"warm"}.items():
        (root / name).write_bytes(text)
    address = lab.address("b")
    serves = f"sendfile on; server {{ listen {address}:{HTTP}; root {root}; }}"
    paths = [f"/{name}" for name in documents]
    with running_nginx(host, lab, "b", HTTP, tmp_path / "nginx", serves):
        for number in range(5):
            place = tmp_path / f"attempt-{number}"
            place.mkdir()
            file, go = place / "tap.pcapng", place / "go"
            browser = [sys.executable, "-I", "-S", "-c", BROWSER, address, str(HTTP), str(go), *paths]
            with (
                tapping(host, place, "-w", str(file), "--port", str(HTTP)) as tap,
                host.running(lab, "a", browser) as process,
            ):
                _go(host, HTTP, process, go)
            assert tap.outcome.code == 0 and "none missed" in tap.outcome.stderr, tap.outcome
            # What is sent to a reader that has to wait for a CPU goes through TCP.
            if not list_gaps(file, "went through TCP"):
                break
    as_http = ("-d", f"tcp.port=={HTTP},http")
    asked = read_fields(file, "http.request", "http.request.uri", options=as_http)
    assert [row[0] for row in asked if row[0] != "/warm"] == paths
    answered = read_fields(
        file,
        'http.response && http.response_for.uri contains "document"',
        "http.response.code",
        options=as_http,
    )
    assert answered == [["200"]] * len(paths)
    tshark(file, *as_http, "-q", "--export-objects", f"http,{tmp_path / 'objects'}")
    found = {name: (tmp_path / "objects" / name).read_bytes() for name in documents}
    assert found == documents
    assert not list_complaints(file)


def test_commands_of_redis(host: Host, lab: Lab, tmp_path: Path) -> None:
    """A protocol with binary values: each comes out as it was set, and as it was read."""
    assert shutil.which("redis-server"), "the program redis-server is missing: make setup-test installs it"
    address, count = lab.address("b"), 12
    server = ["redis-server", "--port", str(REDIS), "--bind", address, "--save", "", "--dir", str(tmp_path)]
    server += ["--protected-mode", "no"]
    file, go = tmp_path / "tap.pcapng", tmp_path / "go"
    typist = [sys.executable, "-I", "-S", "-c", TYPIST, address, str(REDIS), str(go), str(count)]
    with (
        host.running(lab, "b", server, end_by=signal.SIGTERM),
        tapping(host, tmp_path, "-w", str(file), "--port", str(REDIS)) as tap,
    ):
        wait_until("redis listens", lambda: bool(_list_listeners(lab, REDIS)))
        with host.running(lab, "a", typist) as process:
            _go(host, REDIS, process, go)
    assert tap.outcome.code == 0 and "none missed" in tap.outcome.stderr, tap.outcome
    values = [random.Random(number).randbytes(100 * number + 1) for number in range(count)]
    as_redis = ("-d", f"tcp.port=={REDIS},resp")
    rows = read_fields(file, "resp.bulk_string.value", "resp.bulk_string.value", options=as_redis)
    found = [bytes.fromhex(word) for row in rows for word in row[0].split(",")]
    expected = []
    for number, value in enumerate(values):
        expected += [b"SET", b"key-%d" % number, value, b"GET", b"key-%d" % number, value]
    assert [word for word in found if word != b"PING"] == expected


def _list_listeners(lab: Lab, port: int) -> str:
    command = ["nsenter", f"--net=/run/netns/{lab.namespace('b')}", "ss", "-Hltn", f"sport = :{port}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_what_went_through_tcp_is_a_gap_of_its_size(host: Host, lab: Lab, tmp_path: Path) -> None:
    """A connection goes back to TCP and is spliced again. tcpdump sees what went in between; the numbers
    say how much it was."""
    pair = _seeded(host, lab)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file)) as tap:
        pair.pingpong(3)
        before = host.flow(pair)["redirected_bytes"]
        sent = sum(_sent(pair))
        host.daemon.drain()
        host.wait_flow(pair, "paired")
        pair.pingpong(5)
        host.forget_cool_downs()
        host.make_hot(pair)
        plain = sum(_sent(pair)) - sent - (host.flow(pair)["redirected_bytes"] - before)
    assert tap.outcome.code == 0 and "none missed" in tap.outcome.stderr, tap.outcome
    pair.verify()
    gaps = list_gaps(file, "went through TCP")
    assert len(gaps) >= 2 and sum(gaps) == plain > 0
    lost = read_fields(file, "tcp.analysis.lost_segment", "frame.comment")
    assert len(lost) == len(gaps)


def test_a_full_buffer_misses_and_says_how_much(host: Host, lab: Lab, tmp_path: Path) -> None:
    """The command is stopped for a while. The connection goes on, and what there was no room for is said by
    byte: at the end, in packets, and in the file's statistics."""
    pair = _seeded(host, lab)
    before = _sent(pair)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file), "--buffer", "64") as tap:
        pair.pingpong(3, 1000, 10)
        os.kill(tap.process.pid, signal.SIGSTOP)
        pair.pingpong(500, 1000, 10)
        os.kill(tap.process.pid, signal.SIGCONT)

        def goes_on() -> bool:
            pair.pingpong(1, 1000, 10)
            return file.read_bytes().count(b"before this missed") == 2

        wait_until("it records again", goes_on)
    assert tap.outcome.code == 0, tap.outcome
    pair.verify()
    (missed, size) = map(int, re.findall(r"missed: (\d+) messages \((\d+) bytes\)", tap.outcome.stderr)[0])
    assert missed > 500
    found = _count_payload(file)
    sent = sum(after - start for start, after in zip(before, _sent(pair), strict=True))
    assert found + size == sent
    by_connection = re.findall(r"> \S+: (\d+) messages, (\d+) bytes", tap.outcome.stderr)
    assert sum(int(each[1]) for each in by_connection) == size and len(by_connection) == 2
    assert sum(list_gaps(file, "missed")) == size
    assert not list_gaps(file, "went through TCP")
    lost = read_fields(file, "tcp.analysis.lost_segment", "frame.number")
    assert len(lost) == 2
    assert (
        f"missed by splicer tap on all interfaces: {missed} messages, {size} bytes"
        in file.read_bytes().decode("latin-1")
    )


def _count_payload(file: Path) -> int:
    """Bytes of payload in all packets."""
    return sum(int(row[0]) for row in read_fields(file, "tcp.len > 0", "tcp.len"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(host: Host, lab: Lab, tmp_path: Path, number: int) -> None:
    """However it ends: the place in the verdict's map is empty, its program and maps are gone, and another
    one can begin."""
    pair = _seeded(host, lab)
    before = set(list_objects())
    with tapping(host, tmp_path, "-w", str(tmp_path / "tap.pcapng"), end_by=number) as tap:
        pair.pingpong(10)
        assert list_tappers(host.pin_dir)
        own = list_held_named(tap.process.pid, "tap") - before
    assert {kind for kind, _ in own} == {"map", "prog"}
    assert tap.outcome.code == (-9 if number == signal.SIGKILL else 0)
    wait_until("it is gone", lambda: not list_tappers(host.pin_dir))
    pair.pingpong(10)
    wait_until("program and maps are gone", lambda: not own & list_objects().keys())
    with tapping(host, tmp_path, "--count", "4") as again:
        pair.pingpong(4)
        again.process.wait(30)
    assert again.outcome.code == 0
    pair.verify()


def test_nobody_pays_who_does_not_tap(host: Host, lab: Lab, tmp_path: Path) -> None:
    """verdict runs once for each message, with a tap and without."""
    pair = _seeded(host, lab)
    with counting_runs():
        pair.pingpong(20)
        before = read_runs(host.pin_dir, "verdict")
        pair.pingpong(20)
        assert read_runs(host.pin_dir, "verdict") - before == 40
        assert not list_tappers(host.pin_dir)
        with tapping(host, tmp_path):
            before = read_runs(host.pin_dir, "verdict")
            pair.pingpong(20)
            assert read_runs(host.pin_dir, "verdict") - before == 40
    pair.verify()


FILTERS: dict[str, Callable[[Pair, Pair], tuple[str, ...]]] = {
    "port": lambda wanted, _: ("--port", str(wanted.client.local[1])),
    "address": lambda wanted, _: ("--address", wanted.client.local[0]),
    "process": lambda wanted, _: ("--process", "tap-wanted"),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_filters(host: Host, lab: Lab, tmp_path: Path, kind: str) -> None:
    """Of two connections one is wanted. Nothing of the other one is there, and nothing of this one is
    missing, from its first message on."""
    wanted = _seeded(host, lab)
    other = host.connect(host.peer(lab, "b"), host.peer(lab, "b"), lab.address("b"))
    host.make_hot(other)
    before = _sent(wanted)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file), *FILTERS[kind](wanted, other)) as tap:
        for _ in range(3):
            wanted.pingpong(10)
            other.pingpong(10)
    assert tap.outcome.code == 0 and "none missed" in tap.outcome.stderr, tap.outcome
    ports = {row[0] for row in read_fields(file, "tcp", "tcp.port")}
    assert all(str(wanted.client.local[1]) in each.split(",") for each in ports)
    assert list(follow(file)) == _look(before, _sent(wanted))


def test_text_and_hex(host: Host, lab: Lab, tmp_path: Path) -> None:
    pair = _seeded(host, lab)
    for option, shown in ((), "hello\nthere..!"), (("--hex",), "68 65 6c 6c 6f 0a 74 68"):
        with tapping(host, tmp_path, "--count", "1", *option) as tap:
            pair.client.say("hello\nthere\x1b\x00!")
            pair.server.hear(14)
            tap.process.wait(30)
        assert tap.outcome.code == 0
        assert shown in tap.outcome.stdout
        assert f"{pair.client.local[0]}:{pair.client.local[1]} > " in tap.outcome.stdout
        assert "length 14" in tap.outcome.stdout


def _find_working(tap: Tap) -> int:
    """The process that taps: it may be a child, whose session has less of the CPUs than others."""
    children = Path(f"/proc/{tap.process.pid}/task/{tap.process.pid}/children").read_text().split()
    return int(children[0]) if children else tap.process.pid


def test_it_gives_way_to_what_it_taps(host: Host, lab: Lab, tmp_path: Path) -> None:
    """Unless somebody has said another priority."""
    pair = _seeded(host, lab)
    with tapping(host, tmp_path, gives_way=True) as tap:
        working = _find_working(tap)
        wait_until("it gives way", lambda: os.sched_getscheduler(working) == os.SCHED_IDLE)
        if sessions.is_share_by_session():
            assert os.getsid(working) == working
            autogroup = Path(f"/proc/{working}/autogroup")
            wait_until("its session does", lambda: autogroup.read_text().split()[-1] == "19")
        pair.pingpong(5)
    with tapping(host, tmp_path) as told:
        pair.pingpong(5)
        assert os.sched_getscheduler(told.process.pid) == os.SCHED_OTHER
        assert _find_working(told) == told.process.pid
    assert tap.outcome.code == told.outcome.code == 0
    assert "none missed" in tap.outcome.stderr
    pair.verify()


def test_it_is_killed_while_it_gives_way(host: Host, lab: Lab, tmp_path: Path) -> None:
    """What it has captured is whole, and nothing is left."""
    pair = _seeded(host, lab)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file), gives_way=True, end_by=signal.SIGKILL) as tap:
        working = _find_working(tap)
        pair.pingpong(5)
    wait_until("nobody taps any more", lambda: not Path(f"/proc/{working}").exists())
    if working != tap.process.pid:
        assert len(read_fields(file, "tcp", "frame.len")) == 10
    wait_until("the program has gone", lambda: not list_tappers(host.pin_dir))
    pair.verify()


def test_snaplen(host: Host, lab: Lab, tmp_path: Path) -> None:
    """And without anything that was compiled earlier."""
    pair = _seeded(host, lab)
    file = tmp_path / "tap.pcapng"
    with tapping(host, tmp_path, "-w", str(file), "--snaplen", "140", "--cache-dir=off") as tap:
        pair.pingpong(2, 5000, 60)
    assert "compiling" in tap.outcome.stderr
    rows = read_fields(file, "tcp", "frame.cap_len", "frame.len")
    assert rows == [["140", "5040"], ["100", "100"]] * 2
    pair.verify()


def test_refusals(host: Host, lab: Lab, tmp_path: Path) -> None:
    where = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
    with tapping(host, tmp_path):
        done = call("tap", *where)
        assert done.code == 1 and "somebody taps already" in done.stderr
    done = call("tap", *where, "-w", str(tmp_path / "none" / "file"))
    assert done.code == 1 and "cannot write" in done.stderr
    done = call("tap", f"--run-dir={tmp_path}", f"--pin-dir={host.pin_dir}")
    assert done.code == 3, done


def test_splicer_ends_first(lab: Lab, tmp_path: Path) -> None:
    """The file is whole, and it is said why there is no more."""
    with Host() as host:
        pair = _seeded(host, lab)
        file = tmp_path / "tap.pcapng"
        with tapping(host, tmp_path, "-w", str(file)) as tap:
            pair.pingpong(5)
            host.stop_peers()
            assert host.daemon.stop() == 0
            tap.process.wait(30)
        assert tap.outcome.code == 3
        assert "splicer was stopped" in tap.outcome.stderr
        assert len(read_fields(file, "tcp.len > 0", "tcp.len")) == 10


def test_daemon_dies_and_is_started_anew(lab: Lab, tmp_path: Path) -> None:
    """The programs go on, and so does the tap: with nobody there, and with the one that takes them over."""
    with Host() as host:
        pair = _seeded(host, lab)
        before = _sent(pair)
        file = tmp_path / "tap.pcapng"
        with tapping(host, tmp_path, "-w", str(file)) as tap:
            pair.pingpong(5)
            host.daemon.kill()
            pair.pingpong(5)
            host.start()
            pair.pingpong(5)
            assert tap.process.poll() is None
        assert tap.outcome.code == 0 and "none missed" in tap.outcome.stderr, tap.outcome
        assert list(follow(file)) == _look(before, _sent(pair))
        pair.verify()
