# SPDX-License-Identifier: Apache-2.0
"""What is asked of measure, and what becomes of its answers."""

from __future__ import annotations

import errno

import pytest

from splicer.kernel import gauge, libbpf
from splicer.kernel.layout import MEASURE_REQUEST, Direction, End, EndFlag, Pair
from splicer.model import Unread

CLIENT_REDIRECTED, SERVER_REDIRECTED, CLIENT_TCP, SERVER_TCP, ANYTHING = range(5)


class FakeRun:
    """measure, which knows of one pair."""

    answers: dict[tuple[int, int], int]

    def __init__(self, program: int, size: int) -> None:
        assert (program, size) == (7, MEASURE_REQUEST.size)
        self.context = bytearray(size)

    def run(self) -> int:
        if not self.answers:
            raise libbpf.KernelError(errno.EPERM, "run a program")
        name, what = MEASURE_REQUEST.unpack(self.context)
        return self.answers[name, what]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> type[FakeRun]:
    monkeypatch.setattr(libbpf, "TestRun", FakeRun)
    FakeRun.answers = {}
    return FakeRun


def make_pair(flags: int) -> Pair:
    end = End("10.0.0.1:1", "10.0.0.2:2", 1, 2, 3, 4, flags)
    sent = Direction(0, 0, 0)
    return Pair((5, 6), 2, 0, end, end, 0, 0, 0, sent, sent)


def test_both_ends_and_both_kinds(run: type[FakeRun]) -> None:
    pair = make_pair(EndFlag.IN_MAP)
    counts = {CLIENT_REDIRECTED: 10, SERVER_REDIRECTED: 20, CLIENT_TCP: 30, SERVER_TCP: 1 << 31}
    run.answers = {(pair.name, what): count for what, count in {**counts, ANYTHING: 1}.items()}
    assert gauge.Gauge(7).read(pair) == (Unread(10, 30), Unread(20, 1 << 31))


def test_where_nothing_waits_it_is_asked_once(run: type[FakeRun]) -> None:
    pair = make_pair(EndFlag.IN_MAP)
    run.answers = {(pair.name, ANYTHING): 0}
    assert gauge.Gauge(7).read(pair) == (Unread(0, 0), Unread(0, 0))


def test_what_is_plain_is_not_looked_at(run: type[FakeRun]) -> None:
    assert gauge.Gauge(7).read(make_pair(0)) is None


def test_a_kernel_that_runs_it_no_more(run: type[FakeRun]) -> None:
    assert gauge.Gauge(7).read(make_pair(EndFlag.IN_MAP)) is None
