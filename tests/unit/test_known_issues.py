# SPDX-License-Identifier: Apache-2.0
"""KNOWN_ISSUES.md explains every reason that `splicer flows` can show."""

from __future__ import annotations

import re
from pathlib import Path

from splicer.model import REASONS

KNOWN_ISSUES = Path(__file__).parents[2] / "KNOWN_ISSUES.md"


def _explained() -> list[str]:
    """The first cells of the table of reasons."""
    _, _, rest = KNOWN_ISSUES.read_text().partition("\n## Reasons\n")
    section, _, _ = rest.partition("\n## ")
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_every_reason_is_explained_once() -> None:
    """The table under "Reasons" has a row for each reason of the code, and none for another."""
    assert sorted(_explained()) == sorted(REASONS)


def test_what_is_named_in_the_table_of_services_is_a_reason() -> None:
    """Where a service stays plain, the reason beside it is one that `splicer flows` shows."""
    _, _, rest = KNOWN_ISSUES.read_text().partition("\n## Is it safe for my service?\n")
    section, _, _ = rest.partition("\n## ")
    named = re.findall(r"^\|[^|]*\| plain, `(\w+)` \|", section, re.MULTILINE)
    assert len(named) > 10
    assert set(named) <= set(REASONS)
