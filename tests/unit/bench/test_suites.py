# SPDX-License-Identifier: Apache-2.0
"""What the suites make of what they measured, which workloads they know, and their load programs.

That they measure is tests/kernel/test_benchmark.py.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

import splicer.bench
from splicer.errors import SplicerError
from splicer.kernel.costs import Cost

LOADS = Path(splicer.bench.__file__).resolve().parent / "loads"
LOOPBACK = "127.0.0.1"
SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
SPLICING = {
    "spliced": 1,
    "redirected_messages": 100,
    "redirected_bytes": 6400,
    "passed_messages": 0,
    "rescued": 0,
    "cpu_percent": 1.0,
    "rss_kib": 1024,
    "programs": {},
    "refused": {},
}


class Modules:
    """Those of splicer.bench, imported where they are used."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"splicer.bench.{name}")


@pytest.fixture
def bench() -> Modules:
    return Modules()


def _result(
    bench: Modules,
    workload: Any,
    plains: Sequence[float],
    splices: Sequence[tuple[float, dict[str, Any] | None]],
    key: str = "rate",
) -> Any:
    def sample(value: float) -> Any:
        metrics = {metric.key: 1.0 for metric in workload.metrics} | {key: value}
        return bench.model.Sample(metrics, requests=10, sent_bytes=12800)

    legs = [
        bench.results.Leg(
            sample(value), None if changes is None else bench.model.Splicing(**{**SPLICING, **changes})
        )
        for value, changes in splices
    ]
    return bench.results.Result(workload, [sample(value) for value in plains], legs)


def _cell(bench: Modules, pattern: str = "stream", **changes: Any) -> Any:
    return bench.cells.Cell("loopback", pattern, 16384, False, **changes)


def test_a_ratio_is_to_the_plain_legs_around_and_they_are_the_noise(bench: Modules) -> None:
    found = _result(bench, _cell(bench), [10, 30, 20], [(40, {}), (25, {})])
    row = found.rows[0]
    assert list(row.ratios.values) == [1, 2]
    assert row.noises.values == pytest.approx([2 / 3, 3])
    assert "1.50 (1.00 - 2.00) 1.83 " in found.to_line()
    assert "1.50 (1.00 - 2.00)  1.83 (0.67 - 3.00)" in found.to_text()
    rate = found.to_json(check=True)["metrics"]["rate"]
    assert rate["ratio"] == {"median": 1.5, "min": 1, "max": 2}
    assert rate["noise"]["max"] == 3
    assert (rate["plain_samples"], rate["spliced_samples"]) == ([10, 30, 20], [40, 25])


NOTHING = {"redirected_messages": 0, "redirected_bytes": 0}


@pytest.mark.parametrize(
    ("legs", "text"),
    [
        ([{}, {}], "50%"),
        ([NOTHING, {}], "0-50%"),
        ([NOTHING, NOTHING], "none"),
        # Of a stream that went back at once: little, and not nothing.
        ([{"redirected_bytes": 1}, {"redirected_bytes": 64}], "<1%"),
    ],
)
def test_the_matrix_says_where_nothing_was_redirected(
    bench: Modules, legs: list[dict[str, Any]], text: str
) -> None:
    line = _result(bench, _cell(bench), [1, 1, 1], [(1, changes) for changes in legs]).to_line()
    assert line.endswith(f"  {text}") and len(line) <= 80


def test_what_the_legs_did_must_be_what_the_workload_is_for(bench: Modules) -> None:
    always = next(iter(bench.cells.streams()))
    refused = bench.workloads.REFUSED_WORKLOADS[0]
    for workload, changes, wrong in (
        (always, NOTHING, "redirected nothing"),
        (always, {}, None),
        (refused, {}, "was to be refused"),
        (refused, NOTHING, None),
        (_cell(bench), NOTHING, None),
    ):
        failures = _result(bench, workload, [1, 1], [(1, changes)]).failures(check=False)
        assert [wrong in failure for failure in failures] == ([True] if wrong else [])


@pytest.mark.parametrize(
    ("plains", "spliced", "fails"),
    [
        ([100, 100, 100], 97, False),
        ([100, 100, 100], 96, True),
        # Plain legs that differ by 10 % allow as much beyond the bound, and no more.
        ([100, 110, 100], 94, False),
        ([100, 110, 100], 90, True),
    ],
)
def test_a_bound_holds_beyond_the_noise(
    bench: Modules, plains: list[float], spliced: float, fails: bool
) -> None:
    found = _result(bench, _cell(bench, bound=0.97), plains, [(spliced, {})] * 2)
    assert bool(found.failures(check=True)) is fails
    assert not found.failures(check=False)


def test_latency_is_bounded_from_above(bench: Modules) -> None:
    keep_alive = bench.workloads.WRK_WORKLOADS[0]
    for p50, fails in ((0.7, False), (0.8, True)):
        found = _result(bench, keep_alive, [1, 1], [(p50, {})], key="p50_us")
        assert any("p50" in failure for failure in found.failures(check=True)) is fails


def test_programs_are_counted_for_a_request_an_exchange_or_a_message(bench: Modules) -> None:
    programs = {"programs": {"verdict": Cost(20, 10_000), "adopt": Cost(0, 0)}}
    for pattern, what in (("rr", "an exchange"), ("stream", "a message")):
        found = _result(bench, _cell(bench, pattern), [1, 1], [(1, programs)])
        wanted = f"programs, for {what}: verdict 2.0 x 500 ns;\n    1.00 us in all"
        assert wanted in found.to_line() and wanted in found.to_text()
    found = _result(bench, bench.workloads.REFUSED_WORKLOADS[0], [1, 1], [(1, programs)])
    assert "programs, for a request: verdict 2.0" in found.to_text()


def test_nothing_redirected_is_worth_a_word_where_something_should_be(bench: Modules) -> None:
    for workload, counted in ((_cell(bench), 0), (bench.workloads.REFUSED_WORKLOADS[0], None)):
        found = bench.chains.compare(_result(bench, workload, [1, 1], [(1, NOTHING)]))
        assert found.redirected == counted


def test_why_connections_were_refused_is_said(bench: Modules) -> None:
    refused = {**NOTHING, "refused": {"blocking_reader": 2}}
    text = _result(bench, bench.workloads.REFUSED_WORKLOADS[0], [1, 1], [(1, refused)]).to_text()
    assert "refused: blocking_reader 2" in text


# -- which workloads there are ------------------------------------------------------------------------------


def _select(bench: Modules, group: str | None, *only: str) -> list[str]:
    return [workload.name for workload in bench.chains.select(group, only)]


def test_workloads_are_found_by_suite_and_by_name(bench: Modules) -> None:
    names = ["keep-alive", "keep-alive-1", "keep-alive-128", "close", "proxy-20k", "proxy-1m"]
    assert _select(bench, None) == _select(bench, "wrk") == names
    assert _select(bench, None, "off-*") == ["off-1m", "off-small", "off-close"]
    assert _select(bench, None, "close", "spin") == ["close", "spin"]
    assert _select(bench, "plain", "*-1m") == ["blocking-1m", "off-1m", "remote-1m"]
    assert len(_select(bench, "matrix")) == 32
    assert len(_select(bench, "streams")) == 24
    assert _select(bench, "matrix", "*-rr-64-nagle") == ["loopback-rr-64-nagle", "bridge-rr-64-nagle"]
    with pytest.raises(SplicerError, match="no workload of that name"):
        _select(bench, "plain", "keep-alive")


def test_the_list_names_all_suites_with_workloads(bench: Modules) -> None:
    listed = bench.chains.list_lines(None, ())
    groups = bench.chains.list_groups()
    names = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert names == [workload.name for group in groups.values() for workload in group]
    assert [line for line in listed if line and line[0] != " "] == [f"{name}:" for name in groups]
    # What --only finds without a suite has one meaning.
    found = _select(bench, None, "*")
    assert len(set(found)) == len(found)
    assert max(map(len, listed)) <= 80


def test_groups_and_modules_are_the_suites(bench: Modules) -> None:
    suites = bench.suites.SUITES.values()
    assert {suite.name for suite in suites if not suite.module} == set(bench.chains.list_groups())
    for suite in suites:
        if suite.module:
            assert callable(getattr(bench, suite.module).run), suite.name


def test_how_soon_in_a_line(bench: Modules) -> None:
    row = bench.adopting.Row("one", 4, [0.0, 0.25, 0.5, 1, 1], [3.0, 1.0, 40.0, 2.0], 1.25, 0)
    line = " ".join(row.to_line().split())
    assert line == "one 0% 25% 50% 100% 100% 3.0 40.0 40.0"
    assert (row.to_json()["p50_ms"], row.to_json()["p95_ms"]) == (3.0, 40.0)
    assert len(bench.adopting.HEAD) == len(row.to_line()) <= 80
    row.rescued = 2
    assert row.to_line().splitlines()[1:] == ["  2 rescued"]


def test_how_soon_where_none_was_spliced(bench: Modules) -> None:
    row = bench.adopting.Row("one", 4, [0.0] * 5)
    assert row.to_json()["p50_ms"] is None
    assert "- " in row.to_line()


# -- a stack of programs -----------------------------------------------------------------------------------

SERVICES = {"10.0.0.1": "web", "10.0.0.2": "db"}
PORTS = {"web": 8080, "db": 3306}


def _connection(bench: Modules, port: int = 40000) -> Any:
    return bench.ledger.Connection("web", "db", f"10.0.0.1:{port}", "10.0.0.2:3306")


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, LOOPBACK), (socket.AF_INET6, f"::ffff:{LOOPBACK}")]
)
def test_what_sockets_have_sent(bench: Modules, family: socket.AddressFamily, address: str) -> None:
    with (
        contextlib.closing(bench.ledger.Looker()) as looker,
        socket.create_server((LOOPBACK, 0)) as listener,
        socket.socket(family) as client,
    ):
        port = listener.getsockname()[1]
        client.connect((address, port))
        server, _ = listener.accept()
        with server:
            client.sendall(bytes(1234))
            server.sendall(bytes(56))
            server.recv(1234, socket.MSG_WAITALL)
            found = {each.cookie: each for each in looker.look()}
            ends = f"{LOOPBACK}:{client.getsockname()[1]}", f"{LOOPBACK}:{port}"
            for each, local, remote, sent in ((client, *ends, 1234), (server, *ends[::-1], 56)):
                cookie = int.from_bytes(each.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
                assert found[cookie] == (cookie, local, remote, sent)


def test_a_connection_counts_from_the_first_look_on(bench: Modules) -> None:
    """Both ends of it; one that comes later from its beginning, and one that is gone as it was last seen."""
    ledger = bench.ledger.Ledger(SERVICES, PORTS)

    def look(**sent: int) -> None:
        ends = {"a": ("10.0.0.1:40000", "10.0.0.2:3306"), "c": ("10.0.0.1:8080", "10.0.0.9:50000")}
        ends |= {"b": ends["a"][::-1], "d": ("10.0.0.1:40001", "10.0.0.2:3306")}
        ledger.look(bench.ledger.Socket(ord(name), *ends[name], n) for name, n in sent.items())

    look(a=1000, b=5000, c=10)
    assert ledger.sent == {_connection(bench): 0}
    look(a=1001, b=5020, c=310, d=300)
    look(d=400)
    assert ledger.sent == {_connection(bench): 21, _connection(bench, 40001): 400}
    assert ledger.open == {_connection(bench, 40001)}
    assert ledger.sent_elsewhere == 300


def test_ip_counts_what_no_look_has_seen(bench: Modules) -> None:
    before, after = bench.ledger.Packets(1000, 10), bench.ledger.Packets(1000 + 3 * 52 + 900, 13)
    assert (after - before).payload == 900
    assert bench.ledger.read_packets(os.getpid()).octets >= 0


FLOW = {"local": "10.0.0.1:40000", "remote": "10.0.0.2:3306", "state": "paired", "reason": "blocking_reader"}


@pytest.mark.parametrize(
    ("is_open", "older", "flow", "reason"),
    [
        (True, True, FLOW, "blocking_reader"),
        (True, True, None, "older, not listed"),
        (True, False, None, "not listed"),
        (False, True, None, "ended"),
        (True, False, {**FLOW, "state": "spliced", "reason": ""}, "spliced"),
        (True, False, {**FLOW, "state": "draining", "reason": ""}, "draining"),
    ],
)
def test_why_bytes_went_through_tcp(
    bench: Modules, is_open: bool, older: bool, flow: dict[str, Any] | None, reason: str
) -> None:
    connection = _connection(bench)
    rows = bench.stack.explain(
        {connection: 700},
        {connection} if is_open else set(),
        {connection} if older else set(),
        [flow] if flow else [],
    )
    assert [(row.ends, row.plain) for row in rows] == [
        (bench.stack.Ends("web", "db"), {reason: bench.stack.Amount(1, 700)})
    ]


def _measured(bench: Modules) -> Any:
    ends, amount = bench.stack.Ends("web", "db"), bench.stack.Amount
    found = bench.stack.Measured({"web": "1.0", "db": "2"}, "pymysql", 5.0, errors={"timeout": 2, "read": 0})
    for redirected, missed in ((3_000_000, 0), (1_000_000, 60_000)):
        plain = {"blocking_reader": amount(4, 900_000), "cold": amount(2, 100_000)}
        found.legs.append(bench.stack.SplicedLeg([bench.stack.PairRow(ends, redirected, plain)], missed))
    found.plains += [bench.stack.Rates(100, 50), bench.stack.Rates(100, 50), bench.stack.Rates(100, 50)]
    found.splices += [bench.stack.Rates(110, 40), bench.stack.Rates(120, 45)]
    return found


def test_the_share_of_a_stack(bench: Modules) -> None:
    found = _measured(bench)
    assert found.shares == [0.75, 0.5]
    answer = found.to_json()
    assert answer["share"] == pytest.approx(4 / 6)
    assert answer["missed"] == pytest.approx(60_000 / 2_060_000)
    assert answer["pairs"] == [
        {
            "client": "web",
            "server": "db",
            "tcp_bytes": 2_000_000,
            "redirected_bytes": 4_000_000,
            "share": pytest.approx(4 / 6),
            "plain": {
                "blocking_reader": {"connections": 8, "bytes": 1_800_000},
                "cold": {"connections": 4, "bytes": 200_000},
            },
        }
    ]
    lines = [" ".join(line.split()) for line in found.to_text().splitlines()]
    assert "web -> db 2.00 4.00 67% blocking_reader 90% (4)," in lines and "cold 10% (2)" in lines
    assert all(len(line) <= 80 for line in found.to_text().splitlines())
    assert "requests/s 100 115 1.15 (1.10 - 1.20) 1.00 (1.00 - 1.00)" in lines
    assert lines[-1] == "all 2.00 4.00 67% 50% - 75% in a leg"
    assert found.failures() == ["stack: wrk counted 2 errors (timeout)"]


def test_what_was_redirected_between_cgroups(bench: Modules) -> None:
    rows = [
        {"client": {"cgroup": f"/x/{client}"}, "server": {"cgroup": "/x/db"}, "redirected_bytes": number}
        for client, number in (("web", 5), ("jobs", 7), ("web", 2))
    ]
    assert bench.stack.sum_redirected(rows) == {
        bench.stack.Ends("web", "db"): 7,
        bench.stack.Ends("jobs", "db"): 7,
    }


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.22.1\n", "1.22.1"),
        ("PHP 8.2.29 (fpm-fcgi) (built: Jul  3 2026 16:16:05)\nCopyright (c) The PHP Group", "8.2.29"),
        ("gunicorn (version 20.1.0)", "20.1.0"),
        ("mariadbd  Ver 10.11.14-MariaDB-0+deb12u2 for debian-linux-gnu on x86_64 (Debian 12)", "10.11.14"),
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64", "7.0.15"),
        ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", "15.14"),
        ("8.1.0", "8.1.0"),
        ("nothing", "?"),
    ],
)
def test_versions(bench: Modules, text: str, version: str) -> None:
    assert bench.services.read_version(text) == version


# -- the load -----------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("with_credits", [False, True])
@pytest.mark.parametrize("pattern", ["rr", "stream"])
def test_one_connection_counts_what_it_carries(tmp_path: Path, pattern: str, with_credits: bool) -> None:
    size = 4096
    port = str(_free_port())
    program = [sys.executable, "-I", str(LOADS / "load.py")]
    fifo = tmp_path / "credits"
    os.mkfifo(fifo)
    credits = [str(fifo)] if with_credits else []
    with subprocess.Popen([*program, "serve", LOOPBACK, port, *credits], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        drive = [*program, "drive", LOOPBACK, port, pattern, str(size), "1", "0.1", *credits]
        found = json.loads(subprocess.run(drive, stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    assert server.returncode == 0
    directions = 1 if pattern == "stream" else 2
    assert found["requests"] > 0 and found["rate"] > 0
    # The last message of a stream need not go out as a whole.
    assert 0 <= directions * size * found["requests"] - found["sent_bytes"] < size


@pytest.mark.skipif(shutil.which("wrk") is None, reason="without wrk; make setup-test installs it")
def test_the_spinning_connection_counts_what_it_carries(bench: Modules) -> None:
    port = _free_port()
    with subprocess.Popen(bench.cells.make_spin("serve", port), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        drive = bench.cells.make_spin("drive", port, 64, 0.1)
        found = json.loads(subprocess.run(drive, stdout=subprocess.PIPE, check=True, timeout=60).stdout)
    assert server.returncode == 0
    assert found["requests"] > 0 and found["rate"] > 0 and found["p50_us"] > 0
    assert found["sent_bytes"] == 2 * 64 * found["requests"]


class _Origin(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    connections = 0
    requests = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def do_GET(self) -> None:
        type(self).requests += 1
        body = b"x" * 100_000
        self.send_response(200 if self.path == "/1m" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kept", ["keep-alive", "close"])
def test_the_blocking_client_counts_its_requests(kept: str) -> None:
    class Origin(_Origin):
        pass

    with ThreadingHTTPServer((LOOPBACK, 0), Origin) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            command = [sys.executable, "-I", str(LOADS / "reader.py"), LOOPBACK, str(server.server_port)]
            good, bad = (
                subprocess.run([*command, path, kept, "0.1"], capture_output=True, timeout=60, check=False)
                for path in ("/1m", "/else")
            )
        finally:
            server.shutdown()
            thread.join()
    found = json.loads(good.stdout)
    assert found["requests"] == Origin.requests - 1
    assert Origin.connections == (2 if kept == "keep-alive" else Origin.requests)
    assert found["megabytes"] > 0
    assert bad.returncode != 0 and b"404" in bad.stderr


@pytest.mark.skipif(shutil.which("wrk") is None, reason="without wrk; make setup-test installs it")
@pytest.mark.parametrize("script", ["loads/report.lua", "pages/mix.lua"])
def test_wrk_ends_with_a_report(bench: Modules, script: str) -> None:
    """Whatever it is that it asks for."""
    with ThreadingHTTPServer((LOOPBACK, 0), _Origin) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            command = ["wrk", "-t1", "-c1", "-d1s", "-s", str(LOADS.parent / script)]
            done = subprocess.run(
                [*command, f"http://{LOOPBACK}:{server.server_port}"], capture_output=True, check=True
            )
        finally:
            server.shutdown()
            thread.join()
    found = bench.wrk.read_report(done.stdout.splitlines()[-1], 1.0)
    assert found.requests > 0
    assert set(found.errors) == {"status"}, "it has no such page"
