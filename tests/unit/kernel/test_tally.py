# SPDX-License-Identifier: Apache-2.0
"""Records are added up by state and by who talks to whom, however they are cut into batches."""

from __future__ import annotations

import pytest

from splicer.kernel.layout import PAIR, STATE_DRAINING, STATE_PAIRED, STATE_SPLICED
from splicer.kernel.tally import Amount, Tally


def _record(state: int, cgroups: tuple[int, int], sent: tuple[int, int], answered: tuple[int, int]) -> bytes:
    client, server = ((*[0] * 13, cgroup, *[0] * 6) for cgroup in cgroups)
    directions = (*sent, *[0] * 11, *answered, *[0] * 11)
    return PAIR.pack(1, 2, state, 0, *client, *server, *[0] * 14, *directions)


RECORDS = [
    _record(STATE_SPLICED, (7, 8), (100, 10), (50, 5)),
    _record(STATE_SPLICED, (7, 8), (0, 0), (1, 1)),
    _record(STATE_PAIRED, (7, 8), (0, 0), (0, 0)),
    _record(STATE_DRAINING, (8, 7), (1 << 40, 3), (0, 0)),
    _record(STATE_SPLICED, (9, 9), (0, 0), (0, 0)),
]


@pytest.mark.parametrize("size", [1, 2, 3, len(RECORDS)])
def test_batches_make_no_difference(size: int) -> None:
    tally = Tally()
    for start in range(0, len(RECORDS), size):
        tally.add(memoryview(b"".join(RECORDS[start : start + size])))
    assert dict(tally.states) == {STATE_SPLICED: 3, STATE_PAIRED: 1, STATE_DRAINING: 1}
    assert tally.amounts == {(7, 8): Amount(2, 151, 16), (8, 7): Amount(1, 1 << 40, 3)}


def test_the_young_are_plain() -> None:
    tally = Tally()
    tally.add_young(3)
    tally.add(memoryview(b"".join(RECORDS)))
    assert tally.states[STATE_PAIRED] == 4
