# SPDX-License-Identifier: Apache-2.0
"""Whether the soak runs is decided as for tests/kernel (support/requirements.py). Its checker's tests do."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import mark_kernel_tests, prepare_kernel_tests

TEST_TIMEOUT = 300  # seconds; where the machine is busy most of it are starts of the daemon
HERE = Path(__file__).parent
NEEDS_ROOT = "test_soak.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    others = {path.name for path in HERE.glob("test_*.py")} - {NEEDS_ROOT}
    mark_kernel_tests(items, HERE, TEST_TIMEOUT, anywhere=others)


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    prepare_kernel_tests()
