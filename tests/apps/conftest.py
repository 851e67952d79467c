# SPDX-License-Identifier: Apache-2.0
"""Whether the programs run is decided as for the kernel tests (see support/requirements.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.requirements import decide
from support.running import mark_kernel_tests

TEST_TIMEOUT = 300  # seconds
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_kernel_tests(items, HERE, TEST_TIMEOUT)


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    decision, reason = decide()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
