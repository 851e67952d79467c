# SPDX-License-Identifier: Apache-2.0
"""A hold: one at a time, for a while, and whoever has it is the only one to end it before its time."""

from __future__ import annotations

import pytest

from splicer.errors import SplicerError
from splicer.policy.holds import LONGEST, Holds


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def holds(clock: Clock) -> Holds:
    return Holds(clock)


def test_it_ends_by_itself(holds: Holds, clock: Clock) -> None:
    assert holds.current is None and holds.describe() == {}
    holds.take("a", 20, None)
    assert holds.describe() == {"holder": "a", "seconds": 20, "containers": None}
    assert not holds.drop_expired()
    clock.now += 19.9
    assert holds.current is not None
    clock.now += 0.1
    assert holds.current is None and holds.describe() == {}
    assert holds.drop_expired(), "the policy is to be applied"
    assert not holds.drop_expired(), "once"


def test_it_goes_on_as_long_as_somebody_asks(holds: Holds, clock: Clock) -> None:
    for _ in range(5):
        holds.take("a", 20, frozenset({"web"}))
        clock.now += 15
        assert holds.current is not None
    assert holds.describe()["containers"] == ["web"]


def test_two_would_mix_what_they_measure(holds: Holds, clock: Clock) -> None:
    holds.take("a", 20, None)
    with pytest.raises(SplicerError, match=r"another measurement .*\(a\)"):
        holds.take("b", 20, None)
    assert not holds.release("b")
    assert holds.release("a")
    assert not holds.release("a")
    holds.take("b", 20, None)
    clock.now += 20
    holds.take("a", 20, None)


@pytest.mark.parametrize(("holder", "seconds"), [("", 1.0), ("a", 0.0), ("a", -1.0), ("a", LONGEST + 1)])
def test_what_is_no_hold(holds: Holds, holder: str, seconds: float) -> None:
    with pytest.raises(SplicerError):
        holds.take(holder, seconds, None)
    assert holds.current is None
