# SPDX-License-Identifier: Apache-2.0
"""What is posted is done once, and wakes whoever waits for it."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator

import pytest

from splicer.daemon.mailbox import Mailbox, Task


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with contextlib.closing(Mailbox()) as made:
        yield made


def wakes(mailbox: Mailbox) -> bool:
    return bool(select.select([mailbox.read_fd], [], [], 0)[0])


def test_each_task_is_taken_once(mailbox: Mailbox) -> None:
    assert not any(map(mailbox.take, Task))
    mailbox.post(Task.DRAIN_ALL)
    mailbox.post(Task.DRAIN_ALL)
    assert [task for task in Task if mailbox.take(task)] == [Task.DRAIN_ALL]
    assert not any(map(mailbox.take, Task))


def test_it_wakes_and_loses_nothing(mailbox: Mailbox) -> None:
    mailbox.empty_pipe()
    assert not wakes(mailbox)
    for task in Task:
        mailbox.post(task)
    assert wakes(mailbox)
    mailbox.empty_pipe()
    assert not wakes(mailbox)
    assert all(map(mailbox.take, Task))


def test_how_long_a_task_waits(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since it was first asked for, until it is taken."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert mailbox.read_lag(Task.APPLY_POLICY) == 0
    mailbox.post(Task.APPLY_POLICY)
    now[0] += 3
    mailbox.post(Task.APPLY_POLICY)
    now[0] += 2
    assert mailbox.read_lag(Task.APPLY_POLICY) == 5
    assert mailbox.read_lag(Task.DRAIN_ALL) == 0
    mailbox.take(Task.APPLY_POLICY)
    assert mailbox.read_lag(Task.APPLY_POLICY) == 0


def test_a_full_pipe_does_not_block(mailbox: Mailbox) -> None:
    for _ in range(70_000):
        mailbox.post(Task.APPLY_POLICY)
    assert wakes(mailbox)
    assert mailbox.take(Task.APPLY_POLICY)


def test_nobody_minds_a_late_one() -> None:
    made = Mailbox()
    made.close()
    made.post(Task.APPLY_POLICY)
