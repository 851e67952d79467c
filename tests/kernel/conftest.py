# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests, and the decision whether they run (see support/requirements.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.disk import mount_small
from support.host import Host
from support.lab import Lab
from support.pauses import Stopwatch, count_explained_rescues
from support.running import mark_kernel_tests, prepare_kernel_tests
from support.wire import Wire

TEST_TIMEOUT = 90  # seconds
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_kernel_tests(items, HERE, TEST_TIMEOUT)


@pytest.fixture(scope="session", autouse=True)
def _prerequisites() -> None:
    prepare_kernel_tests()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the daemon's log to the report of a failed test."""
    outcome: Any = yield
    report = outcome.get_result()
    if not report.failed:
        return
    for name, value in getattr(item, "funcargs", {}).items():
        if isinstance(value, Host) and value.has_run:
            report.sections.append((f"splicer log ({name})", value.daemon.tail()))


@pytest.fixture(scope="session")
def lab(_prerequisites: None) -> Iterator[Lab]:
    """Two hosts on a bridge and one beyond a router."""
    made = Lab()
    yield made
    made.remove()


@pytest.fixture(scope="session")
def second_lab(_prerequisites: None) -> Iterator[Lab]:
    """The same network with the same addresses once more."""
    made = Lab()
    yield made
    made.remove()


@pytest.fixture(scope="session")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    """One for all modules that do not make their own: to compile and load takes longer than most tests."""
    with Host() as made:
        yield made


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """splicer with the services of support/host.py, shared by many tests; peers live for one test."""
    assert shared_host.daemon.alive, f"splicer run has ended:\n{shared_host.daemon.tail()}"
    shared_host.expected_rescues = 0
    rescued = shared_host.daemon.totals()["rescued"]
    with Stopwatch() as watch:
        yield shared_host
        shared_host.stop_peers()
    rescued = shared_host.daemon.totals()["rescued"] - rescued
    explained = count_explained_rescues(shared_host.daemon.log.read_text(), watch)
    assert rescued - explained <= shared_host.expected_rescues, "a connection had to be rescued"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mount_small(tmp_path / "disk") as place:
        yield place


@pytest.fixture(params=["plain", "spliced"])
def wire(request: pytest.FixtureRequest, host: Host, lab: Lab) -> Wire:
    """Each test with this fixture runs twice, and must find the same."""
    return Wire(host, lab, request.param == "spliced")
