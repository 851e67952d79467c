# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests with containers, and the decision whether they run (see support/requirements.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.docker import TEMPORARY, Engine
from support.images import DEMO, SPLICER, build_all
from support.leftovers import remove_orphans
from support.pauses import Stopwatch, count_explained_rescues
from support.podman import Podman
from support.requirements import decide_e2e
from support.running import end_on_sigterm
from support.stack import Stack

TEST_TIMEOUT = 240  # seconds; the first test waits for the images as well
BUILD_TIMEOUT = 900
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    decision, reason = decide_e2e()
    first = True
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.timeout(TEST_TIMEOUT + (BUILD_TIMEOUT if first else 0)))
        first = False
        if decision == "skip":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the sidecar's log and dockerd's to the report of a failed test."""
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed:
        return
    for value in getattr(item, "funcargs", {}).values():
        try:
            if isinstance(value, Stack):
                report.sections.append(("sidecar log", value.logs()))
            elif isinstance(value, Engine):
                report.sections.append(("the engine's log", value.tail()))
        except (AssertionError, OSError):
            continue  # it is not there (any more)


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Engine]:
    """A dockerd with the images; shared by all tests, which remove their containers."""
    decision, reason = decide_e2e()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
    end_on_sigterm()
    remove_orphans(TEMPORARY)
    with Engine() as made:
        build_all(made)
        yield made


@pytest.fixture(scope="session")
def podman(dockerd: Engine) -> Iterator[Podman]:
    """A Podman with the same images."""
    with Podman() as made:
        made.take_images(dockerd, SPLICER, DEMO)
        yield made


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Engine:
    """dockerd, unless a module is run with several: see on_both_engines."""
    made: Engine = request.getfixturevalue(getattr(request, "param", "dockerd"))
    return made


@pytest.fixture(scope="module")
def shared_stack(engine: Engine) -> Iterator[Stack]:
    stack = Stack(engine)
    try:
        stack.up("splicer")
        yield stack
    finally:
        stack.down()


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The sidecar from docker-compose.yml, shared by a module's tests; other containers live for one test."""
    rescued = shared_stack.status()["totals"]["rescued"]
    with Stopwatch() as watch:
        yield shared_stack
        engine = shared_stack.engine
        containers = engine.docker("ps", "--all", "--quiet", "--no-trunc").split()
        others = [name for name in containers if name != shared_stack.sidecar]
        if others:
            engine.remove_containers(*others)
    rescued = shared_stack.status()["totals"]["rescued"] - rescued
    explained = count_explained_rescues(shared_stack.logs(), watch)
    assert rescued <= explained, "a connection had to be rescued"
