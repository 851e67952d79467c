# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the conformance suite; whether it runs is decided as for tests/kernel
(support/requirements.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.host import Host
from support.lab import Lab
from support.running import mark_kernel_tests, prepare_kernel_tests

from conformance.stage import Stage

TEST_TIMEOUT = 90  # seconds
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_kernel_tests(items, HERE, TEST_TIMEOUT, anywhere=("test_differences.py",))


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    prepare_kernel_tests()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the daemon's log to the report of a failed test."""
    outcome: Any = yield
    report = outcome.get_result()
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and isinstance(host, Host) and host.has_run:
        report.sections.append(("splicer log", host.daemon.tail(20)))


@pytest.fixture(scope="session")
def lab(_prerequisites: None) -> Iterator[Lab]:
    made = Lab()
    yield made
    made.remove()


@pytest.fixture(scope="session")
def host(_prerequisites: None) -> Iterator[Host]:
    with Host() as made:
        yield made


@pytest.fixture(scope="module")
def stage(host: Host, lab: Lab) -> Iterator[Stage]:
    made = Stage(host, lab)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _daemon_lives(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    host = request.node.funcargs.get("host")
    if isinstance(host, Host) and host.has_run:
        assert host.daemon.alive, f"splicer run has ended:\n{host.daemon.tail()}"
