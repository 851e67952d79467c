# SPDX-License-Identifier: Apache-2.0
"""A sidecar in a cgroup namespace of its own, as Docker makes them on hosts with cgroup v2 only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import pauses
from support.daemon import wait_until
from support.docker import Engine
from support.stack import Network, Stack

CONNECTIONS = 8


@pytest.fixture
def confined(engine: Engine) -> Iterator[Stack]:
    engine.stop_service()
    engine.start_service("--default-cgroupns-mode=private")
    stack = Stack(engine)
    try:
        stack.up("splicer")
        assert "/../" in engine.docker("exec", stack.sidecar, "cat", "/proc/1/cgroup")
        yield stack
    finally:
        stack.down()
        engine.stop_service()
        engine.start_service()


def test_containers_are_found_all_the_same(engine: Engine, confined: Stack) -> None:
    network = Network(engine, "web")
    try:
        network.serve("unwilling", "--label=splicer.mode=off")
        wait_until("found", lambda: confined.policy("unwilling").get("mode") == "off", pause=0.1)
        assert confined.policy("web")["cgroup"].endswith(engine.inspect("web")["Id"])
        network.start_load("load", "http://web:8080/", connections=CONNECTIONS)
        wait_until("spliced", lambda: confined.count_spliced("web") == CONNECTIONS, pause=0.1)
        assert network.finish_load("load")["errors"] == 0
        network.start_load("load", "http://unwilling:8080/", connections=CONNECTIONS)
        wait_until("connections", lambda: len(confined.flows("unwilling")) >= CONNECTIONS, pause=0.1)
        pauses.sleep(1.0)  # long enough for them to be spliced, were they to be
        assert confined.count_spliced("unwilling") == 0
        assert network.finish_load("load")["errors"] == 0
    finally:
        network.remove()
