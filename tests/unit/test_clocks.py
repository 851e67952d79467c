# SPDX-License-Identifier: Apache-2.0
"""The wall clock may jump by hours at any moment, and nothing but the time in a log line depends on it:
all waiting and all ages are by clocks that only go forward."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted((REPOSITORY / "splicer").rglob("*.py"))
SOURCES = sorted([*(REPOSITORY / "bpf").glob("*.c"), *(REPOSITORY / "bpf").glob("*.h")])

# What splicer may use of the module time.
MONOTONIC = {"monotonic", "monotonic_ns", "perf_counter", "thread_time", "sleep"}
CLOCKS = {"CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "CLOCK_MONOTONIC_RAW"}
ALLOWED = MONOTONIC | CLOCKS | {"clock_gettime", "clock_gettime_ns"}
# The engine is told since when events are wanted, in its own time: once, and nothing is decided by it here.
# And a moment is shown to people as the time of day that it was, in a packet too.
WALL_CLOCK = {
    "feed.py": 1,
    "coverage.py": 3,
    "journal.py": 1,
    "events.py": 3,
    "bundle.py": 2,
    "capture.py": 4,
}
# Modules that look at the wall clock by themselves.
OTHERS = {"datetime", "sched", "calendar"}
# bpf-helpers(7): CLOCK_MONOTONIC, a coarse one, CLOCK_BOOTTIME, and ticks. bpf_ktime_get_tai_ns can be set.
HELPERS = {
    "bpf_ktime_get_ns",
    "BPF_FUNC_ktime_get_coarse_ns",
    "bpf_ktime_get_boot_ns",
    "BPF_FUNC_jiffies64",
}


def _names_of_time(tree: ast.Module) -> list[str]:
    """What a module uses of `time`, however it imports it, as often as it does."""
    aliases: set[str] = set()
    used: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {name.asname or name.name for name in node.names if name.name == "time"}
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            used += [name.name for name in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            used.append(node.attr)
    return used


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: path.relative_to(REPOSITORY / "splicer").as_posix()
)
def test_modules_use_monotonic_clocks_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not _imports(tree) & OTHERS
    others = [name for name in _names_of_time(tree) if name not in ALLOWED]
    assert len(others) <= WALL_CLOCK.get(path.name, 0), others


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_programs_use_monotonic_clocks_only(path: Path) -> None:
    helpers = set(re.findall(r"\b(?:bpf|BPF_FUNC)_(?:ktime|jiffies)\w*", path.read_text()))
    assert helpers <= HELPERS


def test_the_check_sees_a_wall_clock() -> None:
    for source in ("import time\ntime.time()", "import time as t\nt.time_ns()", "from time import time"):
        assert not set(_names_of_time(ast.parse(source))) <= ALLOWED
    assert _imports(ast.parse("def f():\n    from datetime import datetime")) & OTHERS
