# SPDX-License-Identifier: Apache-2.0
"""What the conftest files of the tests that need root share: marking them, and getting ready for a run."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

from support.leftovers import remove_orphans
from support.pauses import SLOWNESS
from support.requirements import decide


def mark_kernel_tests(
    items: Iterable[pytest.Item], here: Path, timeout: int, anywhere: Collection[str] = ()
) -> None:
    """Mark the tests below `here`, but for the files that need no root (`anywhere`); `timeout` in seconds."""
    decision, reason = decide()
    for item in items:
        if not item.path.is_relative_to(here) or item.path.name in anywhere:
            continue
        item.add_marker(pytest.mark.kernel)
        item.add_marker(pytest.mark.timeout(timeout * SLOWNESS))
        if decision == "skip":
            item.add_marker(pytest.mark.skip(reason=reason))


def prepare_kernel_tests() -> None:
    """Fail if something is missing that must be there; remove what killed runs left."""
    decision, reason = decide()
    if decision == "fail":
        pytest.fail(reason, pytrace=False)
    if decision == "run":
        end_on_sigterm()
        remove_orphans(Path(tempfile.gettempdir()))


def end_on_sigterm() -> None:
    """Otherwise SIGTERM, as from timeout(1), would leave everything where it is."""
    signal.signal(signal.SIGTERM, _end_run)


def _end_run(number: int, frame: object) -> None:
    pytest.exit(f"signal {number}", returncode=128 + number)
