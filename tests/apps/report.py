# SPDX-License-Identifier: Apache-2.0
"""The table and the JSON object of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from apps.trial import NOT_INSTALLED, SAME, Trial

HEADER = ("PROGRAM", "PLAIN", "SPLICED", "REDIRECTED MESSAGES", "VERDICT")
WIDEST = 34


def tabulate(trials: Sequence[Trial]) -> str:
    """The table, with what there is to say about each program below it."""
    rows = [HEADER, *(_row(trial) for trial in trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [line for trial in trials for line in _notes(trial)]
    return "\n".join([*(line.rstrip() for line in lines), *([""] if notes else []), *notes])


def to_json(trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
    return {
        "schema": 1,
        "agree": all(trial.agrees or trial.verdict == NOT_INSTALLED for trial in trials),
        "seconds": round(seconds, 1),
        "programs": [trial.to_json() for trial in trials],
    }


def _row(trial: Trial) -> tuple[str, ...]:
    splicing = trial.spliced.splicing if trial.spliced else None
    return (
        trial.case.name,
        _shorten(trial.plain.summary if trial.plain else "-"),
        _shorten(trial.spliced.summary if trial.spliced else "-"),
        str(splicing.redirected_messages) if splicing else "-",
        trial.verdict,
    )


def _notes(trial: Trial) -> Iterator[str]:
    remark = trial.case.remark
    if trial.verdict == NOT_INSTALLED:
        remark = ""
    parts = [*trial.notes, *([remark] if remark else [])]
    if parts:
        yield f"{trial.case.name}: {'; '.join(parts)}"
    for name, run in (("plain", trial.plain), ("spliced", trial.spliced)):
        if run and run.error and trial.verdict != SAME:
            yield f"    {name}: {run.error}"


def _shorten(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
