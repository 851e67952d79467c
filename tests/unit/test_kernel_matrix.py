# SPDX-License-Identifier: Apache-2.0
"""The kernel matrix (tests/vm) without a guest: the table in docs/kernels.md is what its last runs found,
each kernel is found among Debian's names, and what is not as expected is noticed."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from support import pauses
from vm import report
from vm.kernels import AREAS, BY_NAME, KERNELS, REFUSED, RUNS, Kernel

REPOSITORY = Path(__file__).parents[2]
# Names of Debian's packages, and the kernel that each is for.
PACKAGES = {
    "linux-image-5.10.0-35-cloud-amd64": "5.10",
    "linux-image-6.1.0-56-cloud-amd64": "6.1",
    "linux-image-6.12.57+deb12-cloud-amd64": "6.12",
    "linux-image-6.12.115+deb13.1-cloud-amd64": "6.12",
    "linux-image-6.18.15+deb13-cloud-amd64": "6.18",
    "linux-image-7.3.4+deb13-cloud-amd64": "7",
}
OTHERS = (
    "linux-image-6.1.0-56-cloud-amd64-unsigned",
    "linux-image-6.1.0-56-amd64",
    "linux-image-6.1.0-56-rt-amd64",
    "linux-image-cloud-amd64",
    "linux-image-6.12-cloud-amd64",
)
GOOD = {"passed": 3, "skipped": [], "failed": [], "code": 0, "seconds": 1}
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.kernel.test_a" name="test_one"/>
<testcase classname="tests.kernel.test_a" name="test_two"><failure message="x">y</failure></testcase>
<testcase classname="tests.kernel.test_a" name="test_two"><error message="x">y</error></testcase>
<testcase classname="tests.kernel.test_a" name="test_three"><skipped/></testcase>
</testsuite></testsuites>
"""


def _row(code: int, **changes: Any) -> dict[str, Any]:
    start = {"code": code, "said": ["splicer: no", "hint: another kernel"], "left": []}
    return {"trouble": [], "start": start, "areas": {"order": GOOD}} | changes


def _kernel(expected: str) -> Kernel:
    return Kernel("x", "6.1", ("stable",), expected, "one")


def test_the_table_is_what_the_last_runs_found() -> None:
    saved = report.load_saved()
    assert [row["kernel"] for row in saved] == [
        name for name in BY_NAME if name in {r["kernel"] for r in saved}
    ]
    text = report.DOCUMENT.read_text()
    between = text.partition(report.BEGIN)[2].partition(report.END)[0]
    assert between.strip() == report.draw(saved), "sudo tests/vm/run --save"


def test_what_is_saved_is_what_is_expected_now() -> None:
    """Whoever changes what is expected of a kernel has run it again."""
    for row in report.load_saved():
        kernel = BY_NAME[row["kernel"]]
        assert row["expected"] == kernel.expected
        assert row["wrong"] == report.judge(kernel, row)
        assert list(row["areas"]) == report.name_areas(kernel, list(row["areas"]) or ["none"])
        assert bool(row["areas"]) is (kernel.expected == RUNS)


def test_saving_keeps_the_others_and_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "SAVED", tmp_path / "results.json")
    monkeypatch.setattr(report, "DOCUMENT", document)
    rows = {
        name: _row(4, kernel=name, release=f"{name}.x", adoption="", **{"class": "A"})
        for name in list(BY_NAME)[:3]
    }
    one, two, three = rows
    report.save([rows[three], rows[one]])
    report.save([rows[two], rows[one] | {"release": "newer"}])
    saved = json.loads((tmp_path / "results.json").read_text())["kernels"]
    assert [row["kernel"] for row in saved] == [one, two, three]
    assert document.read_text().startswith(f"before\n{report.BEGIN}\n| kernel |")
    assert document.read_text().endswith(f"{report.END}\nafter\n")
    assert "| newer, " in document.read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_for_one_kernel(package: str) -> None:
    kernels = [name for name, kernel in BY_NAME.items() if re.fullmatch(kernel.pattern, package)]
    assert PACKAGES[package] in kernels
    assert {name.split(".")[0] for name in kernels} == {PACKAGES[package].split(".")[0]}


@pytest.mark.parametrize("package", OTHERS)
def test_other_packages_are_for_none(package: str) -> None:
    found = [kernel.name for kernel in KERNELS if re.fullmatch(kernel.pattern, package)]
    assert found == []


def test_the_tests_that_are_run_exist() -> None:
    for arguments in AREAS.values():
        assert (REPOSITORY / arguments[0]).exists()
    for kernel in KERNELS:
        assert set(kernel.without) < set(AREAS)


@pytest.mark.parametrize(
    ("expected", "row", "wrong"),
    [
        (RUNS, _row(0), ""),
        (RUNS, _row(4), "splicer run ended with 4: splicer: no hint: another kernel"),
        (RUNS, _row(0, trouble=["WARNING: CPU: 0"]), "kernel: WARNING: CPU: 0"),
        (RUNS, _row(0, areas={"order": GOOD | {"failed": ["test_a.test_b"]}}), "order: test_a.test_b"),
        (
            RUNS,
            _row(0, areas={"order": GOOD | {"skipped": ["test_a.test_b"]}}),
            "order: skipped test_a.test_b",
        ),
        (RUNS, _row(0, areas={"order": GOOD | {"code": 143}}), "order: exit code 143"),
        (RUNS, _row(0, doctor={"code": 0}), ""),
        (RUNS, _row(0, doctor={"code": 4}), "splicer doctor ended with 4, splicer run with 0"),
        (REFUSED, _row(4, areas={}), ""),
        (REFUSED, _row(0), "splicer run ended with 0, not 4"),
        (
            REFUSED,
            _row(4, start={"code": 4, "said": ["splicer: no"], "left": []}),
            "it was refused without a hint",
        ),
        (
            REFUSED,
            _row(4, start={"code": 4, "said": ["hint: x"], "left": ["map 3 pairs"]}),
            "left behind: map 3 pairs",
        ),
    ],
)
def test_what_is_not_as_expected_is_named(expected: str, row: dict[str, Any], wrong: str) -> None:
    assert report.judge(_kernel(expected), row) == ([wrong] if wrong else [])


def test_what_is_waited_for_may_take_longer_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "SLOWNESS", 8.0)
    begun = time.monotonic()
    with pauses.Stopwatch() as watch:
        time.sleep(0.1)
    assert watch.seconds <= (time.monotonic() - begun) / 8


def test_results_of_pytest_are_counted(tmp_path: Path) -> None:
    """A test that fails and whose fixture fails too is one test."""
    file = tmp_path / "order.xml"
    file.write_text(JUNIT)
    assert report.read_junit(file) == {
        "passed": 1,
        "skipped": ["test_a.test_three"],
        "failed": ["test_a.test_two"],
    }


def test_a_guest_that_did_not_end_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "console.txt").write_text("booting\n[    3.1] Kernel panic - not syncing: no root\n")
    image = report.Image("linux-image-x", "1", tmp_path, tmp_path)
    row = report.gather(_kernel(RUNS), image, tmp_path, "make test-vm")
    assert row["wrong"] == [
        "the guest did not get to its end",
        "[    3.1] Kernel panic - not syncing: no root",
    ]
    assert "not so" in report.tabulate([row])


@pytest.mark.parametrize(
    ("line", "is_trouble"),
    [
        ("[ 12.3] WARNING: CPU: 1 PID: 4 at net/core/skmsg.c:10 x+0x1/0x2", True),
        ("[ 12.3] BUG: kernel NULL pointer dereference, address: 0000000000000008", True),
        ("[ 12.3] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!", True),
        (
            "[ 12.3] x[7] is installing a program with bpf_probe_write_user helper that may corrupt",
            False,
        ),
        ("[ 12.3] br0: port 2(vd) entered forwarding state", False),
    ],
)
def test_trouble_in_the_kernels_log(line: str, is_trouble: bool) -> None:
    assert bool(report.find_trouble(line)) is is_trouble
