# SPDX-License-Identifier: Apache-2.0
"""Which connections lose their network."""

from __future__ import annotations

import pytest

from splicer.kernel.layout import Place
from splicer.kernel.sweep import NO_LOSSES, Losses

HERE, THERE, ELSEWHERE = 1, 2, 3


def _at(netns: int, address: int) -> Place:
    return netns, 0, address


def _removed(*places: Place) -> Losses:
    return Losses(removed=frozenset(places))


def _cut(*places: Place) -> Losses:
    return Losses(cut=frozenset(places))


@pytest.mark.parametrize(
    ("losses", "server", "concerned"),
    [
        # The client is at address 5 of HERE.
        (_removed(_at(HERE, 5)), _at(THERE, 6), True),
        (_removed(_at(THERE, 6)), _at(THERE, 6), True),
        (_removed(_at(HERE, 5)), _at(HERE, 6), True),
        (_removed(_at(HERE, 6)), _at(THERE, 6), False),
        (_removed(_at(ELSEWHERE, 5)), _at(THERE, 6), False),
        (_cut(_at(HERE, 5)), _at(THERE, 6), True),
        (_cut(_at(THERE, 6)), _at(THERE, 6), True),
        (_cut(_at(THERE, 7)), _at(THERE, 6), False),
        # Within a namespace the link that has the address plays no part.
        (_cut(_at(HERE, 5)), _at(HERE, 5), False),
        (_cut(_at(HERE, 5), _at(HERE, 6)), _at(HERE, 6), False),
        (Losses(silent=frozenset({HERE})), _at(HERE, 6), True),
        (Losses(silent=frozenset({HERE})), _at(THERE, 6), False),
        (NO_LOSSES, _at(THERE, 6), False),
    ],
)
def test_whom_a_loss_concerns(losses: Losses, server: Place, concerned: bool) -> None:
    client = _at(HERE, 5)
    assert losses.concern(client, server) == concerned
    assert losses.concern(server, client) == concerned
    assert bool(losses) == (losses != NO_LOSSES)
    assert losses | NO_LOSSES == NO_LOSSES | losses == losses
