# SPDX-License-Identifier: Apache-2.0
"""What a guest found, judged by what is expected of its kernel; the tables of it, here and in docs/."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vm.kernels import AREAS, BY_NAME, RUNS, Kernel
from vm.packages import Image

HERE = Path(__file__).resolve().parent
SAVED = HERE / "results.json"
DOCUMENT = HERE.parents[1] / "docs/kernels.md"
BEGIN, END = "<!-- by tests/vm/run --save -->", "<!-- end -->"

# What a kernel says when something is wrong with it. That a CPU stood still is emulation's doing (guest.py).
TROUBLE = re.compile(
    r"WARNING:|BUG:|Oops|Kernel panic|general protection fault|unable to handle|Call Trace:"
    r"|refcount_t:|corruption|KASAN|UBSAN|suspicious RCU"
)
REFUSED_CODE = 4
CUT = "the guest did not get to its end"


def find_trouble(log: str) -> list[str]:
    """Lines of the kernel's log that must not be there."""
    return [line.strip() for line in log.splitlines() if line.startswith("[") and TROUBLE.search(line)]


def read_junit(file: Path) -> dict[str, Any]:
    """Counts of one run of pytest, and the names of the tests that failed."""
    counted: dict[str, Any] = {"passed": 0, "skipped": [], "failed": []}
    for case in ET.parse(file).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            if name not in counted["failed"]:
                counted["failed"].append(name)
        elif "skipped" in outcomes:
            counted["skipped"].append(name)
        else:
            counted["passed"] += 1
    return counted


def read_found(results: Path) -> dict[str, Any]:
    """What the guest said last; nothing if it said nothing."""
    file = results / "found.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def gather(kernel: Kernel, image: Image, results: Path, command: str) -> dict[str, Any]:
    """The row of a kernel: what it is, what splicer said of it, what was run, and what is wrong with that."""
    row: dict[str, Any] = {
        "kernel": kernel.name,
        "package": f"{image.package} {image.version}",
        "expected": kernel.expected,
        "command": command,
    }
    found = read_found(results)
    ended = (results / "dmesg.txt").exists()
    log = (results / ("dmesg.txt" if ended else "console.txt")).read_text(errors="replace")
    cut = [] if ended else [CUT]
    if "start" not in found:
        return row | {"wrong": [*cut, *find_trouble(log)[:5]]}
    start, steps = found["start"], {step["name"]: step for step in found.get("steps", ())}
    status = start.get("status", {})
    row |= {
        "release": found["release"],
        "class": found["class"],
        "adoption": status.get("adoption", ""),
        "older": status.get("census", {}).get("state", ""),
        "start": {name: start[name] for name in ("code", "said", "left", "start_seconds")},
        "areas": {},
        "trouble": find_trouble(log),
    }
    if doctor := found.get("doctor"):
        row["doctor"] = {name: doctor[name] for name in ("code", "verdict")} | {
            "not_ok": {
                each["name"]: f"{each['state']}: {each['text']}"
                for each in doctor["checks"]
                if each["state"] != "ok"
            }
        }
    for name, step in steps.items():
        file = results / f"{name}.xml"
        counted = read_junit(file) if file.exists() else {"passed": 0, "skipped": [], "failed": ["no result"]}
        row["areas"][name] = counted | {"code": step["code"], "seconds": step["seconds"]}
    return row | {"wrong": [*cut, *judge(kernel, row)]}


def judge(kernel: Kernel, row: dict[str, Any]) -> list[str]:
    """What is not as expected, in words."""
    wrong = [f"kernel: {line}" for line in row["trouble"]]
    start = row["start"]
    if start["left"]:
        wrong.append(f"left behind: {', '.join(start['left'])}")
    if kernel.expected == RUNS and start["code"] != 0:
        wrong.append(f"splicer run ended with {start['code']}: {' '.join(start['said'])}")
    if kernel.expected != RUNS:
        if start["code"] != REFUSED_CODE:
            wrong.append(f"splicer run ended with {start['code']}, not {REFUSED_CODE}")
        elif not any(line.startswith("hint: ") for line in start["said"]):
            wrong.append("it was refused without a hint")
    doctor = row.get("doctor")
    if doctor and doctor["code"] != start["code"]:
        wrong.append(f"splicer doctor ended with {doctor['code']}, splicer run with {start['code']}")
    for name, area in row["areas"].items():
        wrong += [f"{name}: {test}" for test in area["failed"]]
        if area["code"] and not area["failed"]:
            wrong.append(f"{name}: exit code {area['code']}")
        wrong += [f"{name}: skipped {test}" for test in area["skipped"]]
    return wrong


def _tell_areas(row: dict[str, Any]) -> str:
    areas = row.get("areas") or {}
    if not areas:
        return "-"
    return " ".join(f"{name} {area['passed']}/{_count(area)}" for name, area in areas.items())


def _count(area: dict[str, Any]) -> int:
    return int(area["passed"]) + len(area["failed"]) + len(area["skipped"])


def _line(*cells: str) -> str:
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, (14, 30, 7, 8, 10, 10, 8, 0), strict=True))


def tabulate(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a run, and below it what is wrong."""
    lines = [_line("KERNEL", "RUNNING", "CLASS", "PUT IN", "OLDER", "EXPECTED", "AND", "TESTS")]
    for row in rows:
        cells = (
            row["kernel"],
            row.get("release", "?"),
            row.get("class", "?")[:1],
            row.get("adoption") or "-",
            row.get("older") or "-",
            row["expected"],
            "not so" if row["wrong"] else "so",
            _tell_areas(row),
        )
        lines.append(_line(*cells))
    for row in rows:
        lines += [f"{row['kernel']}: {each}" for each in row["wrong"]]
    return "\n".join(lines)


# -- what is kept of it ------------------------------------------------------------------------------------


def load_saved() -> list[dict[str, Any]]:
    return list(json.loads(SAVED.read_text())["kernels"]) if SAVED.exists() else []


def save(rows: Sequence[dict[str, Any]]) -> None:
    """Put these in the place of earlier ones, in the order of KERNELS, and draw the document's table anew."""
    merged = {row["kernel"]: row for row in [*load_saved(), *rows]}
    ordered = [merged[name] for name in BY_NAME if name in merged]
    SAVED.write_text(json.dumps({"schema": 1, "kernels": ordered}, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{draw(ordered)}\n{END}{after}")


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/kernels.md."""
    lines = ["| kernel | class | `splicer run` | put in | tests that passed |", "|---|---|---|---|---|"]
    for row in rows:
        told = ", ".join(f"{name} {area['passed']} of {_count(area)}" for name, area in row["areas"].items())
        code = row["start"]["code"]
        cells = (
            f"{row['release']}, {BY_NAME[row['kernel']].described}",
            row["class"] if len(row["class"]) == 1 else "-",
            "runs" if code == 0 else f"refuses, exit code {code}",
            f"by {row['adoption']}" if row["adoption"] else "-",
            told or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def name_areas(kernel: Kernel, only: Sequence[str] = ()) -> list[str]:
    """The areas of tests that are run in a guest with this kernel."""
    return [name for name in AREAS if name not in kernel.without and (not only or name in only)]
