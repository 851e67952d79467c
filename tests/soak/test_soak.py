# SPDX-License-Identifier: Apache-2.0
"""A short soak. `make soak` runs a long one."""

from __future__ import annotations

import random

import pytest
from support.tiers import thorough

from soak.chaos import USUAL
from soak.findings import Options
from soak.plans import EXACT, READS
from soak.report import judge, to_json, to_text
from soak.soak import Soak

SECONDS = 34.0  # and as long again as the daemon's starts and the end take
CONNECTIONS = 100
# Those that trust FIONREAD have a soak of their own, and are in `make soak`.
READS_JUDGED = tuple(each for each in READS if each != EXACT)


@thorough("a minute; `make test-all` ends with ten of them")
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
    missing = set(USUAL) - set(findings.chaos) - set(findings.not_done)
    assert not missing, f"did not happen: {missing}"
    assert findings.stops >= 1
