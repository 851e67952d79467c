# SPDX-License-Identifier: Apache-2.0
"""Docker's kinds of networks: published ports with docker-proxy and without, shared namespaces, the host."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from support import pauses
from support.daemon import wait_until
from support.docker import Engine
from support.stack import Network, Stack

CONNECTIONS = 8


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    made = Network(engine, "web", "--publish=18080:8080")
    yield made
    made.remove()


def _load(network: Network, url: str, *options: str, where: str = "host") -> None:
    """wrk from the network of the host, or another."""
    network.start_load("load", url, *options, connections=CONNECTIONS, network=where)


def _wait_known(stack: Stack) -> None:
    """Until all connections are there, and known to be those of the container."""
    wait_until("load is known", lambda: len(stack.flows("load")) >= CONNECTIONS, pause=0.1)


def _count(stack: Stack, name: str) -> int:
    return stack.count_spliced(name)


def test_through_docker_proxy_it_stays_plain(stack: Stack, network: Network) -> None:
    """docker-proxy relays with splice(2), which does not see redirected bytes."""
    _load(network, "http://127.0.0.1:18080/")
    _wait_known(stack)
    pauses.sleep(1.0)  # long enough for them to be spliced, were they to be
    assert stack.count_spliced() == 0
    assert network.finish_load("load")["errors"] == 0


def test_without_docker_proxy_it_is_dnat_and_spliced(engine: Engine, stack: Stack) -> None:
    engine.stop_service()
    engine.start_service("--userland-proxy=false")
    made = None
    try:
        made = Network(engine, "web", "--publish=18080:8080")
        _load(made, "http://127.0.0.1:18080/")
        wait_until("spliced", lambda: _count(stack, "web") == CONNECTIONS, pause=0.1)
        _wait_known(stack)
        assert {flow["client"]["container"] for flow in stack.flows("web")} == {"load"}
        assert made.finish_load("load")["errors"] == 0
    finally:
        if made is not None:
            made.remove()
        engine.stop_service()
        engine.start_service()


def test_a_published_port_from_another_container(stack: Stack, network: Network) -> None:
    """Through the bridge's own address: DNAT whatever docker-proxy does, and both ends are containers."""
    gateway = network.engine.inspect("web")["NetworkSettings"]["Networks"]["web"]["Gateway"]
    network.engine.docker("network", "create", "elsewhere")
    try:
        _load(network, f"http://{gateway}:18080/", where="elsewhere")
        _wait_known(stack)
        assert network.finish_load("load")["errors"] == 0
    finally:
        network.engine.docker("network", "rm", "elsewhere")


def test_a_shared_namespace(stack: Stack, network: Network) -> None:
    """network_mode: container. Each has a policy of its own all the same: it goes by cgroup."""
    _load(network, "http://127.0.0.1:8080/", where="container:web")
    wait_until("spliced", lambda: _count(stack, "web") == CONNECTIONS, pause=0.1)
    _wait_known(stack)
    assert {flow["client"]["container"] for flow in stack.flows("web")} == {"load"}
    assert {flow["server"]["container"] for flow in stack.flows("web")} == {"web"}
    assert stack.policy("load")["netns"] == stack.policy("web")["netns"]
    stack.splicer("set", "load", "off")
    try:
        wait_until("drained", lambda: _count(stack, "web") == 0, timeout=2.0)
        assert stack.policy("web")["mode"] == "adaptive"
    finally:
        stack.splicer("unset", "load")
    assert network.finish_load("load")["errors"] == 0


def test_the_network_of_the_host(stack: Stack, network: Network) -> None:
    address = network.engine.inspect("web")["NetworkSettings"]["Networks"]["web"]["IPAddress"]
    _load(network, f"http://{address}:8080/", "--label=splicer.mode=off")
    _wait_known(stack)
    assert stack.policy("load")["network_mode"] == "host"
    assert stack.policy("load")["mode"] == "off"
    pauses.sleep(1.0)
    assert stack.count_spliced() == 0
    assert network.finish_load("load")["errors"] == 0
    _load(network, f"http://{address}:8080/")
    wait_until("spliced", lambda: _count(stack, "web") == CONNECTIONS, pause=0.1)
    assert network.finish_load("load")["errors"] == 0


def test_a_container_that_is_disconnected(stack: Stack, network: Network) -> None:
    """`docker network disconnect`: what is spliced stops, as plain TCP does, and nobody else's does."""
    engine = network.engine
    address = engine.inspect("web")["NetworkSettings"]["Networks"]["web"]["IPAddress"]
    for name in ("load", "witness"):
        network.start_load(name, f"http://{address}:8080/", connections=CONNECTIONS)
        wait_until("spliced", lambda name=name: _count(stack, name) == CONNECTIONS, pause=0.1)
    engine.docker("network", "disconnect", "web", "load")

    def is_plain() -> bool:
        found = {(flow["state"], flow["reason"]) for flow in stack.flows("load")}
        return found == {("paired", "network_gone")}

    wait_until("they are plain", is_plain, timeout=10.0, pause=0.1)
    before, seen = _count_received(engine, stack, "load"), _count_received(engine, stack, "witness")
    wait_until("others go on", lambda: _count_received(engine, stack, "witness") > seen + 100_000, pause=0.1)
    pauses.sleep(1.0)
    assert _count_received(engine, stack, "load") == before
    assert len(stack.flows("load")) == CONNECTIONS and is_plain()
    assert _count(stack, "witness") == CONNECTIONS
    assert network.finish_load("witness")["errors"] == 0


def _count_received(engine: Engine, stack: Stack, name: str) -> int:
    """Bytes that a client and its server have got, redirected and through TCP."""
    pid = engine.inspect(name)["State"]["Pid"]
    command = ["nsenter", "--net", f"--target={pid}", "--", "ss", "-tinH"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    through_tcp = sum(map(int, re.findall(r"bytes_(?:received|acked):(\d+)", said)))
    return through_tcp + sum(flow["redirected_bytes"] for flow in stack.flows(name))
