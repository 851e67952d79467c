# SPDX-License-Identifier: Apache-2.0
"""A share of a CPU that follows how many CPUs are idle, on a machine that is made up."""

from __future__ import annotations

import pytest

from splicer.host.sparing import LEAST_SHARE, Sparing

PORTION = 0.0005  # seconds of work between two rests


class Machine:
    """Others want so many of its CPUs, and get them first."""

    def __init__(self, cpus: int, wanted: float) -> None:
        self.cpus, self.wanted = cpus, wanted
        self.now = self.used = self.idle = 0.0
        self.sparing = Sparing(
            clock=lambda: self.now,
            read_used=lambda: self.used,
            read_idle=lambda: self.idle,
            sleep=self._sleep,
        )

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self._pass(seconds, 0.0)

    def _pass(self, seconds: float, own: float) -> None:
        self.now += seconds
        self.idle += max(0.0, seconds * (self.cpus - self.wanted) - own)

    def measure(self, seconds: float, portion: float = PORTION) -> float:
        """What share of a CPU was used meanwhile, where there is more to do than that."""
        begun, before = self.now, self.used
        while self.now < begun + seconds:
            self.used += portion
            self._pass(portion, portion)
            self.sparing.rest()
        return (self.used - before) / (self.now - begun)


@pytest.mark.parametrize(
    ("cpus", "wanted", "least", "most"),
    [
        (2, 0.0, 1.0, 1.0),
        (64, 60.0, 1.0, 1.0),
        (2, 1.0, 0.5, 0.8),
        (1, 0.2, 0.3, 0.7),
        (2, 2.0, LEAST_SHARE, LEAST_SHARE),
        (1, 3.0, LEAST_SHARE, LEAST_SHARE),
    ],
)
def test_it_takes_what_nobody_wants(cpus: int, wanted: float, least: float, most: float) -> None:
    machine = Machine(cpus, wanted)
    machine.measure(2)
    assert 0.99 * least <= machine.measure(2) <= 1.01 * most


def test_it_gives_way_at_once() -> None:
    machine = Machine(2, 0.0)
    machine.measure(2)
    machine.wanted = 2.0
    assert machine.measure(0.5) < 0.5
    assert machine.measure(1) == pytest.approx(LEAST_SHARE, rel=0.01)
    machine.wanted = 0.0
    machine.measure(1)
    assert machine.measure(1) == pytest.approx(1.0)


def test_nothing_to_do() -> None:
    machine = Machine(2, 2.0)
    machine.measure(1)
    before = machine.now
    machine.sparing.rest()
    assert machine.now == before
