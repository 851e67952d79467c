# SPDX-License-Identifier: Apache-2.0
"""Whether the programs run is decided as for the kernel tests (see support/requirements.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import mark_kernel_tests, prepare_kernel_tests

TEST_TIMEOUT = 440  # seconds, more than the run itself may take
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_kernel_tests(items, HERE, TEST_TIMEOUT, anywhere=("test_setup.py",))


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    prepare_kernel_tests()
