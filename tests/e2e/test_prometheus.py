# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real daemon: the dashboard's queries and the alerts of examples/grafana."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.daemon import REPOSITORY, wait_until
from support.engine import FakeEngine
from support.host import OFF, SERVICES, Host
from support.lab import Lab
from support.players import JUGGLER, Pair
from support.requirements import decide_e2e
from support.running import end_on_sigterm
from support.scraping import fetch, find_difference, find_port, prometheus

EXAMPLES = REPOSITORY / "examples/grafana"
RULES = (EXAMPLES / "alerts.yml").read_text()
DASHBOARD: dict[str, Any] = json.loads((EXAMPLES / "dashboard.json").read_text())
ALERTS: list[str] = [rule["alert"] for rule in yaml.safe_load(RULES)["groups"][0]["rules"]]
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
NETWORKS = 1024  # MAX_NETWORKS of bpf/maps.h
PATIENCE = 30.0  # seconds; what is scraped shows a moment later


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    decision, reason = decide_e2e()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
    end_on_sigterm()
    made = Lab()
    yield made
    made.remove()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    made = FakeEngine(str(tmp_path / "engine.sock"))
    yield made
    made.stop()


def hasten(rules: str) -> str:
    """The rules for a test that has no hours: conditions last a moment, and rates are of seconds."""
    rules = re.sub(r"\bfor: \w+", "for: 500ms", rules)
    return rules.replace("[5m]", "[10s]").replace("_lag_seconds > 30", "_lag_seconds > 1")


def connect(host: Host, lab: Lab, client: str, server: str, port: int = 0) -> Pair:
    """Between two services."""
    ends = [
        host.peer(lab, place, cgroup=host.cgroup.child(name))
        for place, name in (("a", client), ("b", server))
    ]
    return host.connect(*ends, lab.address("b"), port=port)


def ask_status(host: Host) -> dict[str, Any]:
    return host.daemon.command("status", coverage=True)


def check(*command: str, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_finds_nothing_wrong() -> None:
    """With the rules, and the configuration that names them."""
    assert f"{len(ALERTS)} rules found" in check("promtool", "check", "rules", str(EXAMPLES / "alerts.yml"))
    check("promtool", "check", "config", str(EXAMPLES / "prometheus.yml"))


def test_the_dashboard_is_one() -> None:
    """What Grafana asks for: an id and a place of its own for each panel, and the data source by variable."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    named = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"} == named
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_every_query_returns_something(lab: Lab, engine: FakeEngine, tmp_path: Path) -> None:
    """Of the dashboard, with spliced and plain traffic; and the sums are those of `splicer status`."""
    target = find_port()
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    with Host(f"--metrics=127.0.0.1:{target}", f"--docker={engine.url}") as host:
        spliced = connect(host, lab, "web.service", "db.service")
        off = connect(host, lab, "web.service", "cache.service", OFF)
        try:
            switch.write_text("1")
            with prometheus(tmp_path / "prometheus", target, hasten(RULES)) as server:
                host.make_hot(spliced)
                waiting = {expression: title for title, expression in QUERIES}

                def ask_all() -> bool:
                    spliced.pingpong(20, 1000, 1000)
                    off.pingpong(20, 1000, 1000)
                    for expression in list(waiting):
                        query = expression.replace("$__rate_interval", "10s").replace("$instance", ".*")
                        found = server.ask(query)
                        if found and all(each["value"][1] not in ("NaN", "+Inf") for each in found):
                            del waiting[expression]
                    return not waiting

                try:
                    wait_until("every query returns something", ask_all, PATIENCE)
                except AssertionError as error:
                    raise AssertionError(f"nothing: {waiting}") from error
                switch.write_text(before)
                host.daemon.drain()
                wait_until("it was drained", lambda: host.daemon.totals()["drained"] == 1)
                spliced.close()
                wait_until(
                    "Prometheus and status agree",
                    lambda: not find_difference(server, ask_status(host)),
                    PATIENCE,
                )
                picture = tmp_path / "dashboard.png"
                draw = [sys.executable, str(EXAMPLES / "draw.py")]
                check(*draw, f"http://127.0.0.1:{server.port}", str(picture), "1")
                assert picture.read_bytes().startswith(b"\x89PNG")
                said = check("promtool", "check", "metrics", stdin=fetch(target)[1])
                assert not said, said
        finally:
            switch.write_text(before)
        off.verify()


def test_every_alert_fires(lab: Lab, engine: FakeEngine, tmp_path: Path) -> None:
    """None does while all is well. Each does when its fault is made, for real."""
    target = find_port()
    fired: set[str] = set()
    with (
        Host(f"--metrics=127.0.0.1:{target}", f"--docker={engine.url}", "--max-connections=16") as host,
        prometheus(tmp_path / "prometheus", target, hasten(RULES)) as server,
    ):

        def expect(*names: str) -> None:
            wait_until(f"{names} fire", lambda: server.list_firing() >= set(names), PATIENCE)
            fired.update(names)

        def expect_no_more(*names: str) -> None:
            wait_until(f"{names} end", lambda: not server.list_firing() & set(names), PATIENCE)

        hot = connect(host, lab, "web.service", "db.service")
        host.make_hot(hot)
        wait_until("it is scraped", lambda: server.read("splicer_adoptions_total") == 1, PATIENCE)
        wait_until("rules were looked at", lambda: server.count_evaluations() > 3, PATIENCE)
        assert server.list_firing() == set()

        off = connect(host, lab, "web.service", "cache.service", OFF)

        def talk() -> bool:
            off.pingpong(20, 60_000, 60_000)
            return "SplicerMostlyPlain" in server.list_firing()

        wait_until("most bytes are plain", talk, PATIENCE)
        expect("SplicerMostlyPlain")

        engine.run(1, name="odd", labels={"splicer.mode": "perhaps"}, pid=off.client.peer.pid)
        expect("SplicerBadLabels")
        engine.stop()
        expect("SplicerEngineLost")
        host.daemon.command("pause")
        expect("SplicerPaused")
        host.daemon.command("resume")
        expect_no_more("SplicerPaused")

        stuck = connect(host, lab, "web.service", "db.service")
        host.make_hot(stuck)
        # A byte that comes through TCP, and that nobody reads.
        stuck.client.shutdown(how=socket.SHUT_RD)
        stuck.server.say("x")
        expect("SplicerRescues")

        holder = host.peer(lab, "a", program=JUGGLER)
        held = host.connect(host.peer(lab, "a"), holder, "127.0.0.1")
        host.make_hot(held)
        held.client.send(100)
        assert held.server.wait_fionread(count=100) == 100
        held.server.hold(count=100)
        host.daemon.command("drain")
        expect("SplicerSweepsHeld")
        assert held.server.release() == 100
        expect_no_more("SplicerSweepsHeld")

        crowd = [host.connect(off.client.peer, off.server.peer, lab.address("b")) for _ in range(14)]
        expect("SplicerRoomExhausted", "SplicerTableFilling")
        for pair in crowd:
            pair.close()
        expect_no_more("SplicerRoomExhausted", "SplicerTableFilling")

        tables = [
            f'[[policy]]\ncidr = "10.{number // 250}.{number % 250}.0/24"\nmode = "off"\n'
            for number in range(NETWORKS + 10)
        ]
        host.reload(SERVICES + "\n".join(tables))
        expect("SplicerUnhealthy", "SplicerPolicyBehind")
        assert fetch(target, "/healthz")[0] == fetch(target, "/readyz")[0] == 503
        host.reload(SERVICES)
        expect_no_more("SplicerUnhealthy", "SplicerPolicyBehind")

        host.daemon.kill()
        expect("SplicerDown")
        host.start()
        expect_no_more("SplicerDown")
        assert fired == set(ALERTS)
