# SPDX-License-Identifier: Apache-2.0
"""A census is taken in steps, and told about."""

from __future__ import annotations

import errno
import math
from collections.abc import Generator

from splicer.daemon.census import EARLIER, OFF, CensusTaker
from splicer.kernel.census import CensusReport
from splicer.kernel.libbpf import KernelError

from ..conftest import Log

Steps = Generator[CensusReport | None, None, None]
REPORT = CensusReport(3, {"outside": 1}, 2, 5, 0, 0.25)


def test_one_step_at_a_time_and_then_the_report() -> None:
    begun = []

    def steps() -> Steps:
        for number in range(2):
            begun.append(number)
            yield None
        yield REPORT

    log = Log()
    taker = CensusTaker(steps(), log)
    for number in range(2):
        assert taker.deadline == 0
        taker.work()
        assert begun[-1] == number
        assert taker.describe()["state"] == "running"
    taker.work()
    assert taker.deadline == math.inf
    said = taker.describe()
    assert (said["state"], said["found"], said["left"], said["single"]) == ("done", 3, {"outside": 1}, 2)
    taker.work()


def test_none_is_taken() -> None:
    for why in (OFF, EARLIER):
        taker = CensusTaker(None, Log(), instead=why)
        taker.work()
        assert taker.deadline == math.inf
        assert taker.describe()["state"] == why
        taker.close()


def test_a_kernel_that_refuses_ends_it() -> None:
    def steps() -> Steps:
        yield None
        raise KernelError(errno.EPERM, "make an iterator")

    taker = CensusTaker(steps(), Log())
    taker.work()
    taker.work()
    assert taker.describe()["state"] == "failed"
    assert taker.deadline == math.inf


def test_closed_half_way_it_cleans_up() -> None:
    cleaned = []

    def steps() -> Steps:
        try:
            yield None
            yield REPORT
        finally:
            cleaned.append(True)

    taker = CensusTaker(steps(), Log())
    taker.work()
    taker.close()
    assert cleaned == [True]
    assert taker.deadline == math.inf
