# SPDX-License-Identifier: Apache-2.0
"""What a run is handed out as: JSON, lines for a terminal, and a page with pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from splicer import __version__
from splicer.bench.results import format_number
from splicer.bench.suite import Findings, Options
from splicer.bench.verdict import Verdict, find_noise, judge, sum_up
from splicer.bench.workloads import describe_nginx
from splicer.errors import SplicerError
from splicer.model import SCHEMA


@dataclass(frozen=True)
class Report:
    """A run. `suite` is the suite's name, `command` how it was asked for."""

    suite: str
    command: str
    machine: dict[str, Any]
    options: Options
    findings: Findings
    verdicts: Sequence[Verdict]

    @property
    def summary(self) -> list[str]:
        """The verdicts, for the end of a run; then what else is to be said."""
        return [*sum_up(self.verdicts), *self.findings.notes]

    def to_json(self) -> dict[str, Any]:
        load = {
            **self.findings.load,
            "alternations": self.options.pairs,
            "mode": self.options.mode or "default",
        }
        return {
            "schema": SCHEMA,
            "ok": not self.findings.failures,
            "suite": self.suite,
            "command": self.command,
            "version": __version__,
            "machine": self.machine,
            "load": load,
            self.findings.key: self.findings.document,
            "verdicts": [each.to_json() for each in self.verdicts],
            "notes": self.findings.notes,
            "failures": self.findings.failures,
        }

    def to_html(self, picture: str) -> str:
        """A page that needs nothing else; `picture` is an SVG element, or nothing."""
        machine = self.machine
        about = f"Linux {machine['kernel']}, {machine['cpus']} CPUs, splicer {__version__}"
        rows = "\n".join(_make_row(row) for row in self._list_rows())
        words = "".join(f"<li>{escape(line)}</li>" for line in self.summary)
        return _PAGE.format(
            title=escape(self.command),
            about=escape(about),
            words=words,
            picture=picture,
            rows=rows,
            pairs=self.options.pairs,
        )

    def _list_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                comparison.name,
                row.metric.label,
                format_number(row.plain),
                format_number(row.spliced),
                str(row.ratios),
                str(row.noises),
                f"{find_noise(row):.0%}",
            )
            for comparison in self.findings.comparisons
            for row in comparison.rows
        ]


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #d0d7de; text-align: right; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<ul>{words}</ul>
{picture}
<table>
<tr><th></th><th></th><th>plain</th><th>spliced</th>
<th>ratio (min - max)</th><th>plain/plain</th><th>noise</th></tr>
{rows}
</table>
<p>Legs alternate: plain, spliced, plain, spliced, ..., plain; {pairs} of them are spliced. Plain and
spliced are medians of the legs. A ratio is that of a spliced leg to the mean of the plain ones before and
after it; plain/plain is the ratio of a plain leg to the plain one before it. A ratio that is no further from
1 than the noise says nothing.</p>
</body>
</html>
"""


def _make_row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "nginx": describe_nginx(),
    }


def make_report(suite: str, command: str, options: Options, findings: Findings) -> Report:
    """With the verdicts about everything that was compared."""
    verdicts = [judge(comparison) for comparison in findings.comparisons]
    return Report(suite, command, describe_machine(), options, findings, verdicts)


def check_path(path: str) -> Path:
    """Where a file is to be written: known to be possible before minutes are spent. Raises SplicerError."""
    found = Path(path)
    if not found.parent.is_dir():
        raise SplicerError(f"no such directory ({found.parent})", hint=f"mkdir -p {found.parent}")
    if found.is_dir() or not os.access(found if found.exists() else found.parent, os.W_OK):
        raise SplicerError(f"cannot write there ({path})", hint="name a file in a directory of yours")
    return found
