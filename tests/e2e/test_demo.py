# SPDX-License-Identifier: Apache-2.0
"""`docker compose --profile demo up`: the demonstration runs, and shows what was promised."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator

import pytest
from support.docker import Engine
from support.stack import Stack

PAIRS, SECONDS = 5, 1
# The promise of the project for keep-alive requests between two containers.
LEAST_RATIO = 1.5


@pytest.fixture
def demo(engine: Engine) -> Iterator[Stack]:
    stack = Stack(engine)
    try:
        stack.up("web", "proxy", "load", DEMO_PAIRS=str(PAIRS), DEMO_SECONDS=str(SECONDS), DEMO_JSON="1")
        yield stack
    finally:
        stack.down()


def test_it_pays_off_between_containers(engine: Engine, demo: Stack) -> None:
    load = demo.container("load")
    code = int(engine.docker("wait", load, timeout=150))
    said = demo.logs("load")
    assert code == 0, said
    assert "failed requests: 0" in said
    results = json.loads(said.strip().splitlines()[-1])
    for name, least in (("web", LEAST_RATIO), ("proxy, web", 1.0)):
        pairs = results[name]
        assert len(pairs) == PAIRS
        ratio = statistics.median(pair["spliced"]["rate"] / pair["plain"]["rate"] for pair in pairs)
        assert ratio >= least, f"{name}: {pairs}"
        assert statistics.median(pair["spliced"]["p50_us"] / pair["plain"]["p50_us"] for pair in pairs) < 1
    # It leaves everything as it was.
    assert "override" not in {part["source"] for part in demo.policy("web")["parts"]}
