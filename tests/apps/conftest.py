# SPDX-License-Identifier: Apache-2.0
"""Whether the programs run is decided as for the kernel tests (see support/requirements.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.requirements import decide

TEST_TIMEOUT = 300  # seconds
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    decision, reason = decide()
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.kernel)
        item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))
        if decision == "skip":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    decision, reason = decide()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
