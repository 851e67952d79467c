# SPDX-License-Identifier: Apache-2.0
"""The plan of what goes wrong: from the seed alone, each event in its place, all of them in a run."""

from __future__ import annotations

import pytest

from soak.chaos import KINDS, TO_DAEMON, TO_RULES, TO_WORKERS, USUAL, WITHHELD, Event, Phase, plan_phases
from soak.mischief import Mischief

SHORT, LONG = 34.0, 1800.0  # seconds


def list_events(phases: list[Phase]) -> list[tuple[Phase, Event]]:
    return [(phase, event) for phase in phases for event in phase.events]


def test_the_same_seed_gives_the_same_chaos() -> None:
    assert plan_phases(5, 600.0) == plan_phases(5, 600.0)
    assert plan_phases(5, 600.0) != plan_phases(6, 600.0)


@pytest.mark.parametrize("seed", range(20))
def test_everything_usual_happens_even_in_a_short_run(seed: int) -> None:
    assert {event.kind for _, event in list_events(plan_phases(seed, SHORT))} == set(USUAL)


def test_what_is_withheld_happens_only_if_it_is_named() -> None:
    assert set(WITHHELD) < set(KINDS)
    assert not {event.kind for _, event in list_events(plan_phases(1, LONG))} & set(WITHHELD)
    for kind in WITHHELD:
        planned = [event.kind for _, event in list_events(plan_phases(1, LONG, frozenset({kind})))]
        assert set(planned) == {kind}
        assert len(planned) > 50


def test_the_daemon_is_restarted_only_where_it_runs_and_is_not_judged() -> None:
    """`restart_while_paused` is one of the events that end a daemon: in spliced phases, not in quiet ones."""
    assert "restart_while_paused" in TO_DAEMON
    for phase, event in list_events(plan_phases(3, LONG, frozenset(KINDS))):
        if event.kind in TO_DAEMON:
            assert phase.spliced and not phase.quiet, event
        elif event.kind in TO_RULES:
            assert phase.spliced, event


def test_plain_phases_are_disturbed_alike() -> None:
    """Else plain TCP's stalls were no measure for the others'."""
    plain = {event.kind for phase, event in list_events(plan_phases(3, LONG)) if not phase.spliced}
    assert plain == set(TO_WORKERS) - set(WITHHELD)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_carried_out(kind: str) -> None:
    assert callable(getattr(Mischief, f"_do_{kind}"))
