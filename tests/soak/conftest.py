# SPDX-License-Identifier: Apache-2.0
"""The decision whether the soak runs (see support/requirements.py). The checker's own tests always do."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest
from support.leftovers import remove_orphans
from support.requirements import decide

HERE = Path(__file__).parent
NEEDS_ROOT = "test_soak.py"
TEST_TIMEOUT = 150  # seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    decision, reason = decide()
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.timeout(TEST_TIMEOUT))
        if item.path.name == NEEDS_ROOT:
            item.add_marker(pytest.mark.kernel)
            if decision == "skip":
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def _prerequisites() -> None:
    decision, reason = decide()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
    signal.signal(signal.SIGTERM, _end_run)
    remove_orphans(Path(tempfile.gettempdir()))


def _end_run(number: int, frame: object) -> None:
    pytest.exit(f"signal {number}", returncode=128 + number)
