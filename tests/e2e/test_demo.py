# SPDX-License-Identifier: Apache-2.0
"""The demonstration of examples/compose runs, and what it compares is what it says. And the commands by which
README and examples/compose tell a newcomer to start and end all of it.

How much faster the spliced legs are is for the demonstration and for `make bench` to show: a ratio of two
times is no test. That a leg is plain or spliced, request by request, is one.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Iterator

import pytest
from support.docker import Engine
from support.documents import read_document
from support.images import DEMO, SPLICER
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


README, PAGE = "README.md", "examples/compose/README.md"


def _do(stack: Stack, document: str, command: str, *, terminal: tuple[str, ...] = (), **changes: str) -> str:
    """What Compose says to a command that the document has. `terminal` are options for who has none."""
    read = read_document(document)
    assert command in [piece.text.strip() for piece in (*read.commands, *read.spans)], (
        f"{document}: {command}"
    )
    words = shlex.split(command)[shlex.split(command).index("compose") + 1 :]
    if terminal:
        place = 1 + next(place for place, word in enumerate(words) if word in ("exec", "run"))
        words[place:place] = terminal
    return stack.compose(*words, timeout=600.0, **changes)


@thorough("the sidecar and the demonstration once more, started as documented")
@pytest.mark.timeout(600)
def test_from_nothing(engine: Engine) -> None:
    """No image is there: Compose builds them. The sidecar splices the demonstration's connections, and at the
    end nothing is left."""
    stack = Stack(engine)
    # What was built for the other tests stays, so that it is not built twice.
    engine.docker("rmi", "--no-prune", SPLICER, DEMO)
    try:
        _do(stack, PAGE, "docker compose up -d")
        stack.wait_healthy()
        without = ("-T",)
        assert "Running" in _do(stack, PAGE, "docker compose exec splicer splicer status", terminal=without)
        _do(stack, PAGE, "docker compose exec splicer splicer doctor", terminal=without)
        said = _do(
            stack,
            README,
            "sudo docker compose --profile demo run --rm load",
            terminal=without,
            DEMO_PAIRS="1",
            DEMO_SECONDS="2",
        )
        spliced = [int(number) for number in re.findall(r"(\d+) connections spliced", said)]
        assert len(spliced) == len(HOPS) and all(spliced), said
        assert "docker compose --profile demo down" in said
        _do(stack, PAGE, "docker compose --profile demo down")
        assert not stack.is_attached()
        assert stack.count_pins() == 0
        assert engine.docker("ps", "--all", "--quiet") == ""
    finally:
        stack.down()
