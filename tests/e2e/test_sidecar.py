# SPDX-License-Identifier: Apache-2.0
"""The sidecar from docker-compose.yml: what it may do, how it stops, what its crash does to connections."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from support.bpf import list_objects, list_pinned
from support.daemon import call, wait_until
from support.docker import Engine
from support.pauses import Stopwatch
from support.stack import Network, Stack

CONNECTIONS = 8
KEPT_ALIVE = 4


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    made = Network(engine, "web")
    yield made
    made.remove()


# An adoption that finds a connection busy is tried again after a quarter of a second, then after twice as
# long, and so on: five such refusals in a row take 8 s.
ADOPTED_WITHIN = 20.0


def _wait_spliced(stack: Stack, count: int = CONNECTIONS) -> None:
    wait_until(
        f"{count} spliced connections",
        lambda: stack.status()["connections"]["spliced"] >= count,
        timeout=ADOPTED_WITHIN,
        pause=0.1,
    )


def test_it_is_healthy_with_little(stack: Stack) -> None:
    stack.wait_healthy()
    found = stack.engine.inspect(stack.sidecar)
    host = found["HostConfig"]
    assert found["State"]["Health"]["Status"] == "healthy"
    assert host["ReadonlyRootfs"]
    assert not host["Privileged"]
    assert (host["PidMode"], host["NetworkMode"]) == ("host", "none")
    assert host["CapDrop"] == ["ALL"]
    assert "seccomp:unconfined" not in host["SecurityOpt"]
    writable = {mount["Destination"] for mount in found["Mounts"] if mount["RW"]}
    assert writable == {"/sys/fs/bpf", "/run/splicer", "/var/cache/splicer"}


def test_the_host_can_ask_it(stack: Stack) -> None:
    for arguments in (("status",), ("status", "--brief"), ("flows",), ("policy",)):
        assert call(*arguments, f"--run-dir={stack.run_dir}").code == 0, arguments
    assert "Running" in stack.splicer("status")


def test_containers_are_spliced(stack: Stack, network: Network) -> None:
    network.start_load("load", "http://web:8080/")
    _wait_spliced(stack)
    wait_until("load is known", lambda: len(stack.flows("load")) >= CONNECTIONS, pause=0.1)
    flows = stack.flows("web")
    assert {flow["state"] for flow in flows} == {"spliced"}
    assert {flow["server"]["container"] for flow in flows} == {"web"}
    assert {flow["client"]["container"] for flow in flows} == {"load"}
    assert {flow["client"]["process"] for flow in flows} == {"wrk"}
    assert network.finish_load("load")["errors"] == 0
    assert stack.status()["totals"]["redirected_messages"] > 1000


def test_stop_drains_and_leaves_nothing(engine: Engine, stack: Stack, network: Network) -> None:
    network.start_load("load", "http://web:8080/")
    _wait_spliced(stack)
    ours = list_pinned(engine.bpffs.path)
    assert {kind for kind, _ in ours} == {"prog", "map", "link"}
    # `docker stop` waits for 10 s by default, and must not have to.
    with Stopwatch() as watch:
        engine.docker("stop", stack.sidecar)
    assert watch.seconds < 9
    state = engine.inspect(stack.sidecar)["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert not stack.is_attached()
    assert stack.count_pins() == 0
    assert not stack.run_dir.joinpath("control.sock").exists()
    after_stop = network.finish_load("load")
    assert after_stop["errors"] == 0
    wait_until("the kernel has let go of all of it", lambda: not ours & list_objects().keys())
    engine.docker("start", stack.sidecar)
    stack.wait_answering()
    assert stack.is_attached()
    # What the first start had compiled is in the volume.
    starts = [line for line in stack.logs().splitlines() if '"event": "ready"' in line]
    compilations = [line for line in stack.logs().splitlines() if '"event": "compiling"' in line]
    assert len(starts) > len(compilations)
    stack.wait_healthy()
    network.start_load("again", "http://web:8080/")
    _wait_spliced(stack)
    assert network.finish_load("again")["errors"] == 0


def test_a_crash_disturbs_nobody(engine: Engine, stack: Stack, network: Network) -> None:
    """SIGKILL under load: splices go on, Docker restarts the sidecar, and it takes them over."""
    network.start_load("load", "http://web:8080/")
    network.start_client("client", "web", connections=KEPT_ALIVE)
    _wait_spliced(stack, CONNECTIONS + KEPT_ALIVE)
    before = engine.inspect(stack.sidecar)["State"]["Pid"]
    messages = stack.status()["totals"]["redirected_messages"]
    os.kill(before, signal.SIGKILL)
    wait_until(
        "a new process",
        lambda: engine.inspect(stack.sidecar)["State"]["Pid"] not in (0, before),
        timeout=10,
        pause=0.1,
    )
    stack.wait_answering()
    status = stack.status()
    # The same programs and the same connections: nothing was counted anew.
    assert status["totals"]["redirected_messages"] > messages
    assert status["connections"]["spliced"] >= CONNECTIONS
    _wait_spliced(stack, CONNECTIONS + KEPT_ALIVE)
    assert network.finish_load("load")["errors"] == 0
    tally = network.finish_load("client")["web"]
    assert tally["requests"] > 100
    assert (tally["failed"], tally["retries"]) == (0, 0)
    stack.wait_healthy()
