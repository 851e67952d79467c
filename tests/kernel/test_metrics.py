# SPDX-License-Identifier: Apache-2.0
"""Metrics of a daemon at work: right, bounded, never going back, and no burden to it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cgroup import Cgroup
from support.daemon import call, wait_until
from support.engine import FakeEngine
from support.host import OFF, Host
from support.lab import Lab
from support.players import Pair
from support.scraping import Series, add_up, by_label, fetch, find_port, read_series
from support.tiers import thorough

from splicer.metrics.services import MOST_NAMES, MOST_PAIRS

SUMS = ("splicer_redirected_bytes_total", "splicer_redirected_messages_total", "splicer_plain_bytes_total")


@pytest.fixture
def port() -> int:
    return find_port()


@pytest.fixture
def place() -> Iterator[Cgroup]:
    """Where a daemon that should not start would be attached."""
    made = Cgroup()
    yield made
    made.remove()


@pytest.fixture
def watched(port: int) -> Iterator[Host]:
    """With metrics at `port`."""
    with Host(f"--metrics=127.0.0.1:{port}") as host:
        yield host


def find_difference(host: Host, port: int) -> dict[str, tuple[Any, Any]]:
    """What the metrics say, and what `splicer status` says, where it is not the same. Nobody may talk."""
    series = read_series(port)
    status = host.daemon.command("status", coverage=True)
    totals = status["totals"]
    pairs = {
        SUMS[0]: (add_up(series, SUMS[0]), totals["redirected_bytes"]),
        SUMS[1]: (add_up(series, SUMS[1]), totals["redirected_messages"]),
        SUMS[2]: (add_up(series, SUMS[2]), status["coverage"]["plain_bytes"]),
        "passed": (add_up(series, "splicer_passed_messages_total"), totals["passed_messages"]),
        "paired": (add_up(series, "splicer_paired_connections_total"), totals["paired"]),
        "adoptions": (add_up(series, "splicer_adoptions_total"), totals["spliced"]),
        "drains": (add_up(series, "splicer_drains_total"), totals["drained"]),
        "refusals": (by_label(series, "splicer_refusals_total", "reason"), totals["refused"]),
        "rescues": (add_up(series, "splicer_rescues_total"), totals["rescued"]),
        "states": (
            by_label(series, "splicer_connections", "state"),
            {state: count for state, count in status["connections"].items() if count},
        ),
    }
    return {name: both for name, both in pairs.items() if both[0] != both[1]}


def wait_agreed(host: Host, port: int) -> None:
    """What a look missed is found by one of the next ones."""
    found: dict[str, Any] = {}

    def is_agreed() -> bool:
        found.clear()
        found.update(find_difference(host, port))
        return not found

    try:
        wait_until("metrics and status agree", is_agreed, timeout=20.0)
    except AssertionError as error:
        raise AssertionError(f"metrics, and what status says: {found}") from error


def check_forward(before: Series, after: Series) -> None:
    for (name, labels), value in before.items():
        if name.startswith("splicer_") and name.endswith(("_total", "_count", "_bucket", "_sum")):
            now = after.get((name, labels))
            assert now is not None and now >= value, f"{name} {dict(labels)}: {value}, then {now}"


def make_pair(host: Host, lab: Lab, client: str, server: str, port: int = 0) -> Pair:
    """Between two services."""
    places = [host.cgroup.child(name) for name in (client, server)]
    ends = [host.peer(lab, where, cgroup=each) for where, each in zip("ab", places, strict=True)]
    return host.connect(*ends, lab.address("b"), port=port)


def test_metrics_are_what_status_says(watched: Host, lab: Lab, port: int) -> None:
    """Spliced, off, refused, drained, open and closed. Each by its services; drains and refusals by why."""
    host = watched
    spliced = make_pair(host, lab, "web.service", "db@7.service")
    host.make_hot(spliced)
    spliced.pingpong(100, 1000, 500)
    off = make_pair(host, lab, "web.service", "cache.service", OFF)
    off.pingpong(50, 3000, 10)
    refused = host.connect(spliced.client.peer, spliced.server.peer, lab.address("b"), blocking=(False, True))
    host.watch_cold(refused, "blocking_reader")
    wait_agreed(host, port)
    series = read_series(port)
    assert by_label(series, SUMS[0], "server").keys() == {"db@.service"}
    assert by_label(series, SUMS[2], "server").keys() == {"db@.service", "cache.service"}
    assert by_label(series, SUMS[2], "client").keys() == {"web.service"}
    assert by_label(series, "splicer_refusals_total", "reason")["blocking_reader"] >= 1
    host.daemon.drain()
    wait_until("it was drained", lambda: host.daemon.totals()["drained"] == 1)
    wait_until(
        "and is counted by why",
        lambda: by_label(read_series(port), "splicer_drains_total", "reason") == {"request": 1},
    )
    off.pingpong(50, 3000, 10)
    for pair in (spliced, off, refused):
        pair.verify()
        pair.close()
    wait_until("nothing is open", lambda: not host.daemon.flows())
    wait_agreed(host, port)
    check_forward(series, read_series(port))
    assert add_up(read_series(port), "splicer_closed_plain_bytes_total") == add_up(read_series(port), SUMS[2])


def test_nothing_goes_back_when_the_daemon_is_killed(watched: Host, lab: Lab, port: int) -> None:
    """The next one takes the programs over, and the sums: also of services that have gone meanwhile."""
    host = watched
    pair = make_pair(host, lab, "web.service", "db.service")
    host.make_hot(pair)
    gone = make_pair(host, lab, "gone.service", "db2.service")
    host.make_hot(gone)
    gone.pingpong(100, 1000, 1000)
    wait_agreed(host, port)
    before = read_series(port)
    host.daemon.kill()
    for end in (gone.client, gone.server):
        end.peer.stop()
    for name in ("gone.service", "db2.service"):
        host.cgroup.child(name).remove()
    pair.pingpong(50, 1000, 1000)
    host.start()
    after = read_series(port)
    # How long things took is of one daemon.
    times = ("splicer_loop_turn", "splicer_sweep", "splicer_watch")
    check_forward({key: value for key, value in before.items() if not key[0].startswith(times)}, after)
    wait_agreed(host, port)
    assert by_label(read_series(port), SUMS[0], "client").keys() == {"web.service", "gone.service"}
    pair.verify()
    pair.close()
    host.daemon.stop()
    assert not (host.run_dir / "metrics.json").exists()


def test_there_is_an_end_to_series(watched: Host, lab: Lab, port: int) -> None:
    """More services than there are names for, and each goes when it has talked: every sum is right, and none
    goes back."""
    host = watched
    server = host.peer(lab, "b", cgroup=host.cgroup.child("db.service"))
    client = host.peer(lab, "a", cgroup=host.cgroup.child("first.service"))
    letters = "abcdefghij"
    places = [
        host.cgroup.child(f"web-{letters[number // 10]}{letters[number % 10]}.service")
        for number in range(MOST_NAMES + 10)
    ]
    series: Series = {}
    for place in places:
        place.add(client.pid)
        pair = host.connect(client, server, lab.address("b"))
        pair.pingpong(5, 300, 300)
        pair.verify()
        pair.close()
        host.cgroup.child("first.service").add(client.pid)
        now = read_series(port)
        check_forward(series, now)
        series = now
        place.remove()
    wait_until("nothing is open", lambda: not host.daemon.flows())
    wait_agreed(host, port)
    series = read_series(port)
    clients = by_label(series, SUMS[2], "client")
    assert len(clients) <= MOST_NAMES + 1 and clients["other"] > 0
    assert sum(name == SUMS[2] for name, _ in series) <= MOST_PAIRS


@thorough(
    "it takes as long as somebody may say nothing; unit/metrics has the page, and this module who scrapes"
)
def test_rude_scrapers(watched: Host, lab: Lab, port: int) -> None:
    """Twenty of them say nothing or read nothing. Connections are spliced meanwhile, the daemon answers, and
    whoever scrapes has an answer when they are cut off."""
    host = watched
    with contextlib.ExitStack() as opened:
        for number in range(20):
            rude = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            rude.sendall((b"", b"GET /metrics HTTP", b"GET /metrics HTTP/1.1\r\n\r\n" * 50)[number % 3])
        before = host.daemon.status()
        assert before["healthy"]
        pair = host.hot_pair(lab)
        tasks = Path(f"/proc/{host.daemon.pid}/task")
        names = [(each / "comm").read_text().strip() for each in tasks.iterdir()]
        assert len(names) < 20, names
        assert fetch(port, timeout=120)[0] == 200
        pair.verify()


def test_docker_and_labels(lab: Lab, port: int, tmp_path: Path) -> None:
    """By the services that an engine tells of."""
    engine = FakeEngine(str(tmp_path / "engine.sock"))
    try:
        with Host(f"--metrics=127.0.0.1:{port}", f"--docker={engine.url}") as host:
            pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b"))
            assert add_up(read_series(port), "splicer_docker_up") == 1
            engine.run(1, name="odd", labels={"splicer.mode": "perhaps"}, pid=pair.client.peer.pid)
            wait_until("the label is counted", lambda: add_up(read_series(port), "splicer_bad_labels") == 1)
            assert add_up(read_series(port), "splicer_containers") == 1
            engine.stop()
            wait_until("it is gone", lambda: add_up(read_series(port), "splicer_docker_up") == 0)
            pair.verify()
    finally:
        engine.stop()


def test_run_time_of_programs(watched: Host, lab: Lab, port: int) -> None:
    """Only while the kernel counts."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    pair = watched.hot_pair(lab)
    try:
        switch.write_text("1")
        pair.pingpong(50)
        series = read_series(port)
        switch.write_text("0")
        assert not [name for name, _ in read_series(port) if name.startswith("splicer_program")]
    finally:
        switch.write_text(before)
    assert by_label(series, "splicer_program_runs_total", "program")["verdict"] >= 100
    assert 0 < by_label(series, "splicer_program_run_seconds_total", "program")["verdict"] < 1
    pair.verify()


def test_pages(watched: Host, port: int) -> None:
    for page in ("/healthz", "/readyz"):
        assert fetch(port, page) == (200, "ok\n")
    assert fetch(port, "/")[0] == 404
    assert not read_series(port).keys() & {("splicer_docker_up", frozenset())}, "docker is off"


@pytest.mark.parametrize(
    ("where", "code", "word"),
    [
        ("0.0.0.0:9469", 2, "loopback"),
        ("127.0.0.1:0", 2, "loopback"),
        ("nonsense", 2, "loopback"),
        ("{file}", 1, "in the place of the metrics socket"),
        ("/nowhere/metrics.sock", 1, "ls -ld /nowhere"),
        ("127.0.0.1:{port}", 1, "ss -tlnp"),
    ],
)
def test_where_it_cannot_be(
    tmp_path: Path, where: str, code: int, word: str, port: int, place: Cgroup
) -> None:
    """One line and a hint; nothing was loaded."""
    file = tmp_path / "file"
    file.write_text("")
    with socket.create_server(("127.0.0.1", port)):
        done = call(
            "run",
            f"--cgroup={place.path}",
            f"--metrics={where.format(file=file, port=port)}",
            f"--run-dir={tmp_path}/run",
            "--pin-dir=/sys/fs/bpf/splicer-nothing-here",
            "--log-format=json",
        )
    assert done.code == code, done
    *_, message, hint = done.stderr.splitlines()
    assert message.startswith("splicer: ") and hint.startswith("hint: ") and word in message + hint
    assert "generation_loaded" not in done.stderr
    assert not Path("/sys/fs/bpf/splicer-nothing-here").exists()


def test_without_the_library(tmp_path: Path, place: Cgroup) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError\n")
    done = call(
        "run",
        f"--cgroup={place.path}",
        f"--metrics={tmp_path}/metrics.sock",
        f"--run-dir={tmp_path}/run",
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}",
    )
    assert done.code == 1 and "hint: apt-get install python3-prometheus-client" in done.stderr
