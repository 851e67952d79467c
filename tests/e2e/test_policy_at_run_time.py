# SPDX-License-Identifier: Apache-2.0
"""A container is switched off and on under load: within two seconds, for nobody else, and nothing fails."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import pauses
from support.daemon import wait_until
from support.docker import Engine
from support.pauses import Stopwatch
from support.podman import on_both_engines
from support.stack import Network, Stack
from support.tiers import thorough

pytestmark = on_both_engines(
    "labels and the way to the engine: test_dockerd.py; the rest is not the engine's"
)
CONNECTIONS = 4
# So long may it take, from the command to the last connection.
SECONDS = 2.0
HEADERS = 14 + 20 + 20  # bytes
PAYLOAD = "tcp port 8080 and (ip[2:2] - ((ip[0] & 0xf) << 2) - ((tcp[12] & 0xf0) >> 2)) != 0"


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    """Two servers, `web` and `other`, each with a client of its own."""
    made = Network(engine, "web")
    made.serve("other")
    yield made
    if any(part["source"] == "override" for part in stack.policy("web")["parts"]):
        stack.splicer("unset", "web")
    made.remove()
    stack.config.write_text("")
    engine.docker("kill", "--signal", "HUP", stack.sidecar)


def _count_payload(engine: Engine, container: str, seconds: float = 1.0) -> int:
    """How many packets with data tcpdump sees in a container's namespace."""
    pid = engine.inspect(container)["State"]["Pid"]
    enter = ["nsenter", f"--net=/proc/{pid}/ns/net"]
    # Immediately: otherwise packets wait in the kernel, and are lost at the end. Cut off: its buffer holds a
    # number of slots, each for the longest packet.
    options = ["-nn", "-i", "eth0", "--immediate-mode", "-s", str(HEADERS), "-w", "-", "-U"]
    command = [*enter, "tcpdump", *options, PAYLOAD]
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as capture,
    ):
        assert capture.stdout is not None
        # The header of the file: it captures from here on.
        assert len(capture.stdout.read(24)) == 24
        # A pipe that is full would stop it.
        packets = pool.submit(capture.stdout.read)
        try:
            pauses.sleep(seconds)
        finally:
            capture.terminate()
        return len(packets.result()) // (16 + HEADERS)


def _start(stack: Stack, network: Network) -> None:
    for name in ("web", "other"):
        network.start_client(f"to-{name}", name, connections=CONNECTIONS)
    for name in ("web", "other"):
        wait_until(
            f"{name} is spliced", lambda name=name: stack.count_spliced(name) == CONNECTIONS, pause=0.1
        )


def _finish(network: Network) -> float:
    """Have both clients end; seconds that the longest of their requests took."""
    longest = 0.0
    for name in ("web", "other"):
        tally = network.finish_load(f"to-{name}")[name]
        assert tally["requests"] > 500
        assert (tally["failed"], tally["retries"]) == (0, 0), (name, tally)
        longest = max(longest, tally["longest_s"])
    return longest


def _in_sockhash(stack: Stack, name: str) -> list[str]:
    return [flow["state"] for flow in stack.flows(name) if flow["state"] != "paired"]


def _check_flip(stack: Stack, network: Network, off: Callable[[], object], on: Callable[[], object]) -> None:
    engine = stack.engine
    with Stopwatch() as watch:
        _start(stack, network)
        assert _count_payload(engine, "web") <= 2
        others = {flow["local"]: flow for flow in stack.flows("other")}

        off()
        wait_until("drained", lambda: not _in_sockhash(stack, "web"), timeout=SECONDS)
        assert _count_payload(engine, "web") > 100
        assert {flow["reason"] for flow in stack.flows("web")} == {"policy_off"}
        assert stack.count_spliced("other") == CONNECTIONS
        assert stack.policy("web")["mode"] == "off"

        on()
        wait_until("adopted", lambda: stack.count_spliced("web") == CONNECTIONS, timeout=SECONDS)
        assert _count_payload(engine, "web") <= 2
        # The other's connections are the same as ever, and were never out.
        after = {flow["local"]: flow for flow in stack.flows("other")}
        assert after.keys() == others.keys()
        for key, flow in after.items():
            assert flow["state"] == "spliced"
            assert flow["passed_messages"] == others[key]["passed_messages"]
        longest = _finish(network)
    assert longest < 1 + watch.paused


def test_set_and_unset(stack: Stack, network: Network) -> None:
    _check_flip(
        stack, network, lambda: stack.splicer("set", "web", "off"), lambda: stack.splicer("unset", "web")
    )


def test_a_rule_in_the_configuration_file(stack: Stack, network: Network) -> None:
    def configure(text: str) -> None:
        stack.config.write_text(text)
        stack.engine.docker("kill", "--signal", "HUP", stack.sidecar)

    rule = '[[policy]]\ncontainer = "web"\nmode = "off"\n'
    _check_flip(stack, network, lambda: configure(rule), lambda: configure(""))


@thorough("unit/policy has overrides of an earlier run")
def test_an_override_survives_the_sidecar(engine: Engine, stack: Stack, network: Network) -> None:
    wait_until("web is known", lambda: stack.policy("web"))
    stack.splicer("set", "web", "off")
    engine.docker("restart", stack.sidecar)
    stack.wait_answering()
    wait_until("the override is back", lambda: stack.policy("web").get("mode") == "off", pause=0.1)
    assert stack.policy("web")["mode_source"] == "override"
    stack.splicer("unset", "web")
    assert stack.policy("web")["mode"] == "adaptive"


@thorough("kernel/test_policy.py has a cgroup made anew, unit/containers the restart")
def test_a_container_is_restarted_under_load(engine: Engine, stack: Stack, network: Network) -> None:
    """Whoever spoke to it tries again and is spliced again; nobody else notices."""
    _start(stack, network)
    engine.docker("restart", "--time", "2", "web")
    wait_until("spliced again", lambda: stack.count_spliced("web") == CONNECTIONS, timeout=20)
    to_web = network.finish_load("to-web")["web"]
    to_other = network.finish_load("to-other")["other"]
    assert to_web["failed"] == 0
    assert to_web["retries"] > 0
    assert (to_other["failed"], to_other["retries"]) == (0, 0)
