# SPDX-License-Identifier: Apache-2.0
"""A control server in this process, for what asks the daemon for its state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from splicer.daemon.control import Server

from ..conftest import Log


@dataclass
class Answers:
    """What the daemon answers."""

    status: dict[str, Any] = field(default_factory=dict)
    flows: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def answers(run_dir: str, log: Log) -> Iterator[Answers]:
    given = Answers()
    handlers = {"status": lambda _: given.status, "flows": lambda _: given.flows}
    with Server(run_dir, handlers, log, allowed_uid=os.getuid()):
        yield given
