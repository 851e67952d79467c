# SPDX-License-Identifier: Apache-2.0
"""The demonstration of examples/compose runs, and what it compares is what it says.

How much faster the spliced legs are is for the demonstration and for `make bench` to show: a ratio of two
times is no test. That a leg is plain or spliced, request by request, is one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator

import pytest
from support.docker import Engine
from support.stack import Stack
from support.tiers import thorough

PAIRS, SECONDS = 3, 3
# Connections on the way, each of which carries a request and its answer.
HOPS = {"web": 1, "proxy, web": 2}


@pytest.fixture
def demo(engine: Engine) -> Iterator[Stack]:
    stack = Stack(engine)
    try:
        stack.up("web", "proxy", "load", DEMO_PAIRS=str(PAIRS), DEMO_SECONDS=str(SECONDS), DEMO_JSON="1")
        yield stack
    finally:
        stack.down()


def _share_redirected(requests: list[int], redirected: list[int], hops: int) -> float:
    """Of the messages of a leg those that went past TCP; the median of the legs."""
    pairs = zip(requests, redirected, strict=True)
    return statistics.median(messages / (2 * hops * number) for number, messages in pairs)


@thorough("a minute of load; that its containers are spliced is in test_sidecar.py")
def test_plain_and_spliced_by_turns(engine: Engine, demo: Stack) -> None:
    load = demo.container("load")
    code = int(engine.docker("wait", load, timeout=180))
    said = demo.logs("load")
    assert code == 0, said
    results = json.loads(said.strip().splitlines()[-1])
    assert results.keys() == HOPS.keys()
    for name, hops in HOPS.items():
        (found,) = results[name]["workloads"]
        requests = found["requests"]
        assert len(requests["spliced"]) == PAIRS
        assert found["errors"] == {"plain": {}, "spliced": {}}
        spliced = [leg["redirected_messages"] for leg in found["splicing"]]
        # A connection says some things before it is spliced; one that was kept alive is not back at once.
        assert _share_redirected(requests["spliced"], spliced, hops) > 0.8, found
        assert _share_redirected(requests["plain"], found["redirected_in_plain_legs"], hops) < 0.05, found
    # It leaves everything as it was.
    assert "override" not in {part["source"] for part in demo.policy("web")["parts"]}
    assert not demo.status()["hold"]
