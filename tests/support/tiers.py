# SPDX-License-Identifier: Apache-2.0
"""Two sizes of a run: what every change passes (`make test`), and everything (`make test-all`).

Each guarantee has its test in the small one. What is left to the large one are further moments, orders and
places of the same scene, and scenes that take long; each says why it is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

MARK = "thorough"


def thorough(reason: str) -> pytest.MarkDecorator:
    """Leave a test to `make test-all`."""
    mark: pytest.MarkDecorator = getattr(pytest.mark, MARK)(reason)
    return mark


def spread(values: Iterable[Any], always: Collection[Any], reason: str) -> list[Any]:
    """Parameters of a test: those not in `always` are left to `make test-all`."""
    values = list(values)
    unknown = [value for value in always if value not in values]
    assert not unknown, f"no such parameters: {unknown}"
    return [value if value in always else pytest.param(value, marks=thorough(reason)) for value in values]


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take what is left to the large run out of a small one; whoever names a test gets it all the same."""
    if config.getoption("all") or any("::" in argument for argument in config.args):
        return
    left = [item for item in items if item.get_closest_marker(MARK)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker(MARK)]
