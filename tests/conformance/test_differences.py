# SPDX-License-Identifier: Apache-2.0
"""The table of expected differences and KNOWN_ISSUES.md name the same probes."""

from __future__ import annotations

import re
from pathlib import Path

from conformance.differences import DIFFERENCES
from conformance.probes import load

KNOWN_ISSUES = Path(__file__).resolve().parents[2] / "KNOWN_ISSUES.md"


def _named() -> list[str]:
    text = KNOWN_ISSUES.read_text()
    groups = re.findall(r"[( ]probes? ((?:`\w+`(?:, )?)+)\)", text)
    return [name for group in groups for name in re.findall(r"`(\w+)`", group)]


def test_every_difference_is_documented_once() -> None:
    """A user finds each difference that the suite expects in KNOWN_ISSUES.md, and nothing else under that
    name."""
    named = _named()
    assert sorted(named) == sorted(DIFFERENCES)


def test_every_difference_is_of_a_probe() -> None:
    """No entry outlives its probe, and none is for a connection that is never spliced."""
    probes = load()
    assert set(DIFFERENCES) <= set(probes)
    assert [name for name in DIFFERENCES if probes[name].reason] == []
