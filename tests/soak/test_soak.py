# SPDX-License-Identifier: Apache-2.0
"""A short soak. `make soak` runs a long one."""

from __future__ import annotations

import random

import pytest

from soak.chaos import TO_DAEMON, TO_RULES, TO_WORKERS, plan_phases
from soak.plans import EXACT, READS
from soak.report import judge, to_json, to_text
from soak.soak import Options, Soak

SECONDS = 34.0  # and as long again as the daemon's starts and the end take
CONNECTIONS = 100
# Those that trust FIONREAD have a soak of their own, and are in `make soak`.
READS_JUDGED = tuple(each for each in READS if each != EXACT)


def test_short_soak(_prerequisites: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything happens once or more, and every promise is kept."""
    seed = random.SystemRandom().randrange(1 << 32)
    soak = Soak(Options(seed=seed, seconds=SECONDS, connections=CONNECTIONS, reads=READS_JUDGED))
    with soak:
        findings = soak.run()
    promises = judge(findings)
    text = to_text(to_json(findings, promises))
    with capsys.disabled():
        # The seed is wanted when something else fails later, or does not.
        print(f"(seed {seed}) ", end="", flush=True)
    print(text)
    broken = [promise for promise in promises if not promise.kept]
    assert not broken, f"make soak ARGS='--seed {seed} --minutes 1':\n{text}"
    wanted = set(TO_RULES) | set(TO_DAEMON) | set(TO_WORKERS)
    missing = wanted - set(findings.chaos) - set(findings.not_done)
    assert not missing, f"did not happen: {missing}"


def test_the_same_seed_gives_the_same_chaos() -> None:
    assert plan_phases(5, 600.0) == plan_phases(5, 600.0)
    assert plan_phases(5, 600.0) != plan_phases(6, 600.0)
