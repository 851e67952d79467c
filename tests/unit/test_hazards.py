# SPDX-License-Identifier: Apache-2.0
"""HAZARDS.md: its rows can be found, and what it calls shown is shown by `make test`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TESTS = re.compile(r"([\w/]+\.py)?::(test_\w+)|\b(probes?) ")
PROBES = "conformance/test_probes.py::test_spliced"


def _read_rows() -> list[tuple[int, str]]:
    """Number and last cell of the rows of hazards; the tables below them are about rows already listed."""
    text = (TOP / "HAZARDS.md").read_text().partition("## Not shown by any test")[0]
    cells = (line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d+ \|", line))
    return [(int(row[0]), row[-1]) for row in cells]


def _find_tests(cell: str) -> set[str]:
    found, file = set(), ""
    for path, name, probe in TESTS.findall(cell):
        file = path or file
        found.add(PROBES if probe else f"{file}::{name}")
    return found


def _collect() -> set[str]:
    """The tests of `make test`, without parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    said = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True).stdout
    return {
        line.partition("[")[0].removeprefix("tests/")
        for line in said.splitlines()
        if line.startswith("tests/")
    }


def test_rows_are_in_order() -> None:
    numbers = [number for number, _ in _read_rows()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_each_hazard_is_shown_by_make_test() -> None:
    collected = _collect()
    assert PROBES in collected
    rows = {number: _find_tests(cell) for number, cell in _read_rows()}
    left = {number: tests for number, tests in rows.items() if tests and not tests & collected}
    assert not left, f"only `make test-all` shows these rows: {left}"
    assert len([tests for tests in rows.values() if tests]) > 60
