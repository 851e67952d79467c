# SPDX-License-Identifier: Apache-2.0
"""Every probe on plain TCP, spliced, and in the middle of a transition: the transcripts are the same.

`make test` plays each probe plain, spliced and in one of the transitions, by turns, so that each transition
meets probes of every kind; `make test-all` plays all of them.
"""

from __future__ import annotations

import itertools

import pytest
from support.pauses import Stopwatch
from support.tiers import spread, thorough

from conformance.differences import DIFFERENCES
from conformance.probes import Probe, load
from conformance.stage import Run, Stage, compare, raise_harness_errors

PROBES = load()
SPLICED = {name: each for name, each in PROBES.items() if not each.reason}
EACH = pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)

# By turns within each module of probes, which are of one kind.
TRANSITIONS = ("eager", "cut", "drain", "storm")
CHOSEN = {
    name: TRANSITIONS[number % len(TRANSITIONS)]
    for _, names in itertools.groupby(SPLICED, lambda name: SPLICED[name].play.__module__)
    for number, name in enumerate(names)
}


def _each_spliced(transition: str) -> pytest.MarkDecorator:
    chosen = [probe for name, probe in SPLICED.items() if CHOSEN[name] == transition]
    reason = "another transition of this probe is in make test"
    return pytest.mark.parametrize("probe", spread(SPLICED.values(), chosen, reason), ids=SPLICED)


def _play_plain(stage: Stage, probe: Probe) -> Run:
    """What plain TCP does; that it does so each time is for test_plain to say."""
    __tracebackhide__ = True
    run = stage.plain(probe)
    raise_harness_errors([run])
    assert run.ended == "ok", f"{run.ended}\n" + "\n".join(run.lines)
    return run


LONG = 0.05  # seconds; a drain that finds no rest for 0.1 s is a hard one, whoever took the time


def _is_expected(probe: Probe, plain: Run, other: Run, hard: bool = False) -> bool:
    """True if a transition shows what plain TCP or a splice does, or what is known to lie between them.

    `hard`: drains may have been as hard as the guard's, because the machine stood still.
    """
    if not compare(plain, other):
        return True
    difference = DIFFERENCES.get(probe.name)
    if difference is None or other.ended != plain.ended:
        return False
    if difference.spliced is not None and other.lines == difference.spliced(plain.lines):
        return True
    if difference.between is None or (difference.only_guard and other.cut.how != "guard" and not hard):
        return False
    return difference.between(plain.lines, other.lines)


def _check_transition(probe: Probe, plain: Run, runs: list[Run], hard: bool = False) -> None:
    __tracebackhide__ = True
    raise_harness_errors(runs)
    wrong = [compare(plain, run) for run in runs if not _is_expected(probe, plain, run, hard)]
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(runs)} differ:\n" + "\n".join(wrong[:4]), pytrace=False)


@thorough("whether a probe can tell anything does not change with splicer")
@EACH
def test_plain(stage: Stage, probe: Probe) -> None:
    """The probe does on plain TCP what it does each time: otherwise it could not tell anything."""
    one, other = _play_plain(stage, probe), stage.play_plain(probe)
    raise_harness_errors([other])
    difference = compare(one, other)
    assert not difference, f"the probe is not deterministic:\n{difference}"


def _check_spliced(probe: Probe, plain: Run, run: Run) -> None:
    __tracebackhide__ = True
    raise_harness_errors([run])
    difference = DIFFERENCES.get(probe.name)
    if difference is not None and difference.spliced is not None:
        plain = Run(difference.spliced(plain.lines), plain.cut, plain.ended)
    text = compare(plain, run)
    if text and not (difference is not None and difference.chance and _is_expected(probe, plain, run)):
        pytest.fail(text, pytrace=False)
    if probe.redirects and not probe.reason and run.redirected is not None:
        assert run.redirected > 0, "nothing was redirected: the probe has shown nothing"


@EACH
def test_spliced(stage: Stage, probe: Probe) -> None:
    """On a connection that is spliced (or is not, for the documented reason): plain TCP's transcript."""
    [run] = stage.spliced(probe)
    _check_spliced(probe, _play_plain(stage, probe), run)


@_each_spliced("eager")
def test_spliced_from_the_first_byte(stage: Stage, probe: Probe) -> None:
    """The same under the policy `eager`."""
    [run] = stage.eager(probe)
    _check_spliced(probe, _play_plain(stage, probe), run)


@_each_spliced("cut")
def test_taken_back_at_any_call(stage: Stage, probe: Probe) -> None:
    """Taken back to plain TCP right before any of its calls, or a little earlier: no difference."""
    runs = stage.cut(probe)
    _check_transition(probe, _play_plain(stage, probe), runs)
    # An option that was taken back again does not keep a connection plain for ever.
    assert {run.state for run in runs} != {"spliced"}, "it was not taken back"


@_each_spliced("drain")
def test_drained_at_some_calls(stage: Stage, probe: Probe) -> None:
    """Drained by the operator's command around some of its calls: no difference."""
    with Stopwatch() as watch:
        runs = stage.drain(probe)
    hard = any(end - begin > LONG for begin, end in watch.pauses)
    _check_transition(probe, _play_plain(stage, probe), runs, hard)


@_each_spliced("storm")
def test_drained_again_and_again(stage: Stage, probe: Probe) -> None:
    """While the operator drains everything again and again, and it is adopted again: no difference."""
    _check_transition(probe, _play_plain(stage, probe), stage.storm(probe))


def test_the_storm_was_one(stage: Stage) -> None:
    """The tests above are worth something only if connections did change their state."""
    if stage.tally.runs < 20:
        pytest.skip("only a part of the suite was run")
    assert stage.tally.drained > stage.tally.runs / 4
    assert stage.tally.spliced > stage.tally.runs / 4
