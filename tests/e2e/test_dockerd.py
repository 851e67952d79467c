# SPDX-License-Identifier: Apache-2.0
"""The engine is restarted, stopped and started: running splices are none of its business."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.daemon import wait_until
from support.docker import Engine
from support.pauses import Stopwatch
from support.podman import on_both_engines
from support.stack import Network, Stack

pytestmark = on_both_engines("test_podman.py asks Podman as well")
CONNECTIONS = 4
NOTICE_S = 10.0  # how soon the sidecar should know


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    made = Network(engine, "web")
    yield made
    made.remove()


def _state(stack: Stack) -> str:
    return str(stack.status()["docker"]["state"])


def test_restarted_under_load(engine: Engine, stack: Stack, network: Network) -> None:
    with Stopwatch() as watch:
        network.start_client("client", "web", connections=CONNECTIONS)
        wait_until("spliced", lambda: stack.count_spliced("web") == CONNECTIONS, pause=0.1)
        before = {flow["local"]: flow for flow in stack.flows("web")}
        engine.stop_service()
        wait_until("it says so", lambda: _state(stack) == "lost", timeout=NOTICE_S)
        # What was known of the containers stays known.
        assert stack.count_spliced("web") == CONNECTIONS
        assert stack.policy("web")["mode"] == "adaptive"
        engine.start_service()
        wait_until("connected again", lambda: _state(stack) == "connected", timeout=NOTICE_S)
        after = {flow["local"]: flow for flow in stack.flows("web")}
        assert after.keys() == before.keys()
        for key, flow in after.items():
            assert flow["state"] == "spliced"
            assert flow["passed_messages"] == before[key]["passed_messages"]
            assert flow["redirected_messages"] > before[key]["redirected_messages"]
        tally = network.finish_load("client")["web"]
    assert (tally["failed"], tally["retries"]) == (0, 0)
    assert tally["longest_s"] < 1 + watch.paused


def test_what_changed_meanwhile_is_found(engine: Engine, stack: Stack, network: Network) -> None:
    engine.stop_service()
    wait_until("it says so", lambda: _state(stack) == "lost", timeout=NOTICE_S)
    engine.start_service()
    network.serve("late", "--label=splicer.mode=off")
    wait_until("found", lambda: stack.policy("late").get("mode") == "off", timeout=NOTICE_S)
