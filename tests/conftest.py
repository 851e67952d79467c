# SPDX-License-Identifier: Apache-2.0
"""Options of the test run, and the way to the package `support`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

# Ignored in the background of a shell (POSIX, 2.11) or under nohup(1), they would be by all that tests start,
# too: what is caught is not handed on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order-seconds",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="how long the ordering tests exchange data altogether (default: 8)",
    )
    parser.addoption(
        "--all",
        action="store_true",
        help="also what `make test` leaves to `make test-all` (support/tiers.py)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from support.tiers import select

    select(config, items)
