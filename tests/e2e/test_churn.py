# SPDX-License-Identifier: Apache-2.0
"""Two hundred containers come and go: the daemon keeps nothing of them, and is right about each in time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from support.daemon import wait_until
from support.docker import Engine
from support.images import DEMO
from support.pauses import Stopwatch
from support.stack import Network, Stack
from support.tiers import thorough

CONTAINERS = 200
STAYING = ("sidecar", "web", "client")
PARALLEL = 4
# From the moment the container runs until `splicer policy` is right about it.
SECONDS = 1.0
# A leak goes on, in every batch of containers; arenas, caches and stacks grow in steps, now and then.
BATCH = 50
LEAK = 20 << 10  # bytes for each container


@pytest.fixture
def network(engine: Engine, stack: Stack) -> Iterator[Network]:
    made = Network(engine, "web")
    yield made
    made.remove()


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def _count_descriptors(pid: int) -> Counter[str]:
    """Descriptors by what they are: socket, pipe, anon_inode and so on."""
    kinds: Counter[str] = Counter()
    for fd in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(fd.path).partition(":[")[0]] += 1
    return kinds


def _count_namespaces(pid: int) -> int:
    """Network namespaces that threads of a process are in."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(task / "ns/net"))
    return len(found)


def _count_rules(stack: Stack) -> int:
    pin = next(path for path in stack.pin_dir.rglob("rules") if path.is_file())
    done = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", str(pin)], capture_output=True, text=True, check=True
    )
    return len(json.loads(done.stdout))


def _take_stock(stack: Stack, pid: int) -> dict[str, int]:
    return {
        **_count_descriptors(pid),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "namespaces": _count_namespaces(pid),
        "rules": _count_rules(stack),
        "containers": stack.status()["docker"]["containers"],
    }


def _settle(stack: Stack, pid: int, wanted: dict[str, int] | None = None) -> dict[str, int]:
    """Stock once it is what is wanted, or the same several times: a thread that answered a question may take
    a moment to end. After 15 seconds it is whatever was found last."""
    found = [_take_stock(stack, pid)]
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if found[-1] == wanted or (wanted is None and len(found) > 3 and found[-4:] == [found[-1]] * 4):
            break
        time.sleep(0.5)
        found.append(_take_stock(stack, pid))
    return found[-1]


def _live(stack: Stack, number: int) -> float:
    """One container's life; seconds until the policy was right about it, without the machine's pauses."""
    engine = stack.engine
    name = f"short-{number}"
    wanted = "off" if number % 2 else "adaptive"
    labels = ["--label=splicer.mode=off"] if number % 2 else []
    engine.run_container(DEMO, "sleep", "60", options=["--name", name, "--network=none", *labels])
    with Stopwatch() as watch:
        wait_until(
            f"the policy of {name}", lambda: stack.policy(name).get("mode") == wanted, timeout=20, pause=0.05
        )
    engine.remove_containers(name)
    return watch.seconds


@pytest.mark.timeout(600)
@thorough("it takes a minute; unit/containers has the same storm of events without an engine")
def test_two_hundred_containers(engine: Engine, stack: Stack, network: Network) -> None:
    pid = engine.inspect(stack.sidecar)["State"]["Pid"]
    with ThreadPoolExecutor(PARALLEL) as pool:
        network.start_client("client", "web")
        wait_until("spliced", lambda: stack.count_spliced("web") == 4, pause=0.1)
        # The first ones fill caches and arenas.
        list(pool.map(lambda number: _live(stack, number), range(12)))
        wait_until("they are forgotten", lambda: stack.status()["docker"]["containers"] == len(STAYING))
        before = _settle(stack, pid)
        took: list[float] = []
        resident = [_resident(pid)]
        for first in range(12, 12 + CONTAINERS, BATCH):
            took += pool.map(lambda number: _live(stack, number), range(first, first + BATCH))
            resident.append(_resident(pid))
        # Nobody else's connection was touched.
        assert stack.count_spliced("web") == 4

    assert max(took) <= SECONDS, sorted(took)[-5:]
    assert _settle(stack, pid, before) == before
    grown = [later - earlier for earlier, later in pairwise(resident)]
    assert min(grown) < BATCH * LEAK, f"{[each >> 10 for each in grown]} KiB"
