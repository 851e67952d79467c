# SPDX-License-Identifier: Apache-2.0
"""The judgement: what excuses a broken connection, what counts as growth, which stalls are too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from soak.findings import Findings, Options
from soak.report import (
    count_late,
    find_denied_stalls,
    find_growth,
    find_stalls_over,
    is_excused,
    is_known,
    is_stuck,
    was_never_spliced,
)
from soak.tally import Tally, add_up, bucket_of, percentile, pick, upper_bound
from soak.watch import Life, Rescue


def cut(**changes: Any) -> dict[str, Any]:
    return {"kind": "cut", "side": "client", "peer": "server-1-0", "born": 90.0, "time": 100.0} | changes


@pytest.mark.parametrize(
    ("complaint", "killed", "excused"),
    [
        (cut(), {}, False),
        (cut(), {"server-1-0": 99.9}, True),
        (cut(), {"server-1-0": 150.0}, False),  # it was killed later
        (cut(), {"server-2-0": 99.9}, False),  # somebody else was
        (cut(), {"server-1-1": 99.9}, False),  # another generation
        (cut(peer=""), {"server-2-0": 99.9}, True),  # it had not said who it is
        (cut(peer=""), {"client-2-0": 99.9}, False),  # no server
        (cut(peer=""), {"server-2-0": 50.0}, False),  # before the connection was made
        (cut(peer="", side="server"), {"client-2-0": 99.9}, True),
    ],
)
def test_only_a_killed_peer_excuses(
    complaint: dict[str, Any], killed: dict[str, float], excused: bool
) -> None:
    assert is_excused(complaint, killed) is excused


@pytest.mark.parametrize(
    ("halts", "stuck"),
    [
        ([], True),
        ([("server-1-0", 80.0, 92.0)], False),  # quiet from 85 to 100, 7 seconds of it stopped
        ([("client-0-0", 96.0, 130.0)], False),  # itself, and told before it went on
        ([("server-1-0", 80.0, 86.0)], True),
        ([("server-2-0", 80.0, 100.0)], True),  # somebody else
    ],
)
def test_a_stopped_worker_is_not_stuck(halts: list[tuple[str, float, float]], stuck: bool) -> None:
    findings = Findings(Options(seed=1, seconds=1.0), halts=halts)
    assert is_stuck(cut(kind="stuck", worker="client-0-0", quiet=15.0), findings) is stuck


def life(*resident: int, files: int = 30, more_files: int = 0) -> Life:
    return Life(1, [(float(n), kib, files + more_files * n) for n, kib in enumerate(resident)])


def test_growth() -> None:
    flat = [40_000 + (n % 3) * 500 for n in range(60)]
    assert not find_growth(life(*flat))
    assert find_growth(life(*(40_000 + 400 * n for n in range(60))))
    assert find_growth(life(*flat, more_files=1))
    assert not find_growth(life(*(40_000 + 2500 * n for n in range(8)))), "too short a life to tell"
    assert find_growth(life(70_000)), "more than a daemon may ever have"


def test_stalls_are_judged_by_what_plain_tcp_showed() -> None:
    findings = Findings(Options(seed=1, seconds=1.0))
    for spliced, seconds in ((False, 0.1), (True, 0.3), (True, 0.36)):
        record = {"seconds": seconds, "time": 50.0, "age": 3.0, "spliced": spliced, "read": "recv"}
        record |= {"local": "10.79.0.1:7000", "remote": "10.79.0.2:40000", "sends": 99}
        findings.tally.remember(spliced, record)
        findings.stalls.append(record)
    findings.no_daemon.append((49.0, 51.0))
    assert [each["seconds"] for each in find_stalls_over(findings)] == [0.36]


def test_a_connection_that_was_never_spliced_is_plain_tcp() -> None:
    """Its stall widens the bound for the others."""
    findings = Findings(Options(seed=1, seconds=1.0))
    common = {"time": 50.0, "age": 3.0, "spliced": True, "read": "recv"}
    common |= {"local": "10.79.0.1:7000", "remote": "10.79.0.2:40000"}
    cold = {"state": "paired", "reason": "cold", "redirected_messages": 0, "passed_messages": 0}
    for seconds, flow, sends in (
        (0.4, cold, 99),
        (0.41, None, 3),  # gone already, but its peer cannot have been hot
        (0.6, cold | {"passed_messages": 1}, 3),
        (0.7, None, 99),
    ):
        findings.stalls.append(common | {"seconds": seconds, "flow": flow, "sends": sends})
    assert [each["seconds"] for each in find_stalls_over(findings)] == [0.7]
    young = common | {"flow": None, "sends": 3}
    assert was_never_spliced(young, [(40.0, 'mode = "eager"')])
    assert not was_never_spliced(young, [(45.0, 'mode = "eager"')])
    assert not was_never_spliced(young | {"local": "10.79.0.1:7002"}, [])


def test_only_readers_that_trust_fionread_are_excused_without_a_daemon() -> None:
    stall = {"seconds": 2.0, "time": 50.0, "spliced": True, "read": "exact"}
    assert is_known(stall, [(47.5, 49.0)])
    assert not is_known(stall, [(40.0, 46.0)])
    assert not is_known(stall, [])
    assert not is_known(stall | {"read": "recv"}, [(47.5, 49.0)])


def test_what_class_b_denies_is_judged_apart() -> None:
    stall = {"seconds": 1.0, "time": 50.0, "spliced": True, "read": "exact", "flow": None}
    stall |= {"local": "10.79.0.1:7002", "remote": "10.79.0.2:40000", "sends": 99, "age": 9.0}
    plain_port = stall | {"local": "10.79.0.1:7000"}
    late = plain_port | {
        "flow": {"state": "paired", "reason": "backpressure", "redirected_messages": 1, "passed_messages": 0}
    }
    spliced = plain_port | {"flow": late["flow"] | {"state": "spliced", "reason": ""}}
    others = [plain_port, spliced, stall | {"read": "recv"}]
    findings = Findings(Options(seed=1, seconds=1.0), stalls=[stall, late, *others])
    findings.watch = SimpleNamespace(kernel_class="B")
    assert find_denied_stalls(findings) == [stall, late]
    assert find_stalls_over(findings) == others
    findings.watch = SimpleNamespace(kernel_class="C")
    assert find_denied_stalls(findings) == []
    assert find_stalls_over(findings) == findings.stalls


@pytest.mark.parametrize(
    ("end", "event", "late"),
    [
        ({}, (90.0, "pause"), 0),
        ({}, (97.0, "pause"), 1),
        ({}, (97.0, "memory"), 1),
        ({}, (97.0, "restart_while_paused"), 1),
        ({}, (97.0, "drain"), 0),
        ({"pause": 0.02}, (0.0, ""), 1),
        ({"lag": 0.06}, (0.0, ""), 1),
        ({"lag": 0.06, "stalled": 0.3}, (0.0, ""), 0),  # it did ask
        ({"lag": 0.03}, (0.0, ""), 0),
        ({"lag": 0.06, "local": "10.79.0.1:9", "remote": "10.79.0.2:7000"}, (0.0, ""), 0),  # another's
    ],
)
def test_readers_that_could_not_read_are_late(
    end: dict[str, Any], event: tuple[float, str], late: int
) -> None:
    findings = Findings(Options(seed=1, seconds=1.0), events=[event])
    findings.described.append(
        {"pause": 0.0, "lag": 0.0, "stalled": 0.0}
        | {"local": "10.79.0.1:40000", "remote": "10.79.0.2:7000"}
        | end
    )
    flow = {"local": "10.79.0.1:40000", "remote": "10.79.0.2:7000"}
    findings.watch = SimpleNamespace(rescues=[Rescue(100.0, flow, None)])
    assert count_late(findings) == late


def test_tallies_add_up() -> None:
    one, other = Tally(), Tally()
    for tally, stalls in ((one, [0.0, 0.0, 0.010]), (other, [0.0, 0.5])):
        for seconds in stalls:
            if tally.stall(True, seconds):
                tally.remember(True, {"seconds": seconds})
    total = add_up(each.to_json() for each in (one, other))
    stalls = pick(total.counters["stalls"], "spliced")
    assert sum(stalls.values()) == 5
    assert percentile(stalls, 0.5) == 0.0
    assert 0.5 <= percentile(stalls, 1.0) < 0.6
    assert [each["seconds"] for each in total.worst["spliced"]] == [0.5, 0.010]
    assert all(upper_bound(bucket_of(s)) >= s for s in (0.0, 1e-6, 0.001, 0.25, 3.0))
