# SPDX-License-Identifier: Apache-2.0
"""Nothing is left out of `make test` because nobody had installed it: scripts/setup.sh e2e names all. And
KNOWN_ISSUES.md has all programs that were disturbed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from apps.catalogue import CHEAP, find_cases
from apps.disturb import Subject
from apps.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "scripts/setup.sh"
LISTS = ("pieces", "test_pieces", "small_pieces", "e2e_pieces")
# What need not be installed, and what comes with something of another name.
ALWAYS_THERE = {"/usr/bin/python3", sys.executable}
COMES_WITH = {
    "redis-cli": "redis-benchmark",
    "mariadb": "mariadbd",
    "mariadb-install-db": "mariadbd",
    "java": "javac",
}


def _read_pieces(*lists: str) -> set[str]:
    """What these lists of scripts/setup.sh name."""
    found = re.findall(r"^(\w+)\+?=\(([^)]*)\)", SETUP.read_text(), re.MULTILINE)
    return {piece for name, pieces in found if name in lists for piece in pieces.split()}


def _name_pieces(programs: Iterable[str]) -> set[str]:
    return {COMES_WITH.get(program, program) for program in programs} - ALWAYS_THERE


@pytest.mark.parametrize("name", CHEAP)
def test_setup_installs_what_it_needs(name: str) -> None:
    (case,) = find_cases(name)
    wanted = _name_pieces(case.programs)
    if name.startswith("cpython-"):
        wanted.add("testsuite")
    assert wanted <= _read_pieces(*LISTS)
    if name.startswith("grpc-python"):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert any(each.startswith("grpcio") for each in project["optional-dependencies"]["dev"])


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_setup_installs_what_is_disturbed(subject: Subject) -> None:
    wanted = _name_pieces(("strace", *subject.programs))
    assert wanted <= _read_pieces("pieces", "test_pieces", "small_pieces", "apps_pieces")


def test_known_issues_has_a_row_for_each_program() -> None:
    """The table of KNOWN_ISSUES.md is the one that `--disturb` prints: its first cells are these."""
    _, _, rest = (ROOT / "KNOWN_ISSUES.md").read_text().partition("\n### What it means for programs\n")
    section, _, _ = rest.partition("\n#")
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    assert rows[0] == "program"
    assert rows[2:] == [subject.title for subject in SUBJECTS]
