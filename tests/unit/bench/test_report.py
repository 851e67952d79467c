# SPDX-License-Identifier: Apache-2.0
"""What a run is handed out as: JSON, a page, pictures, and a line that shows how far it is."""

from __future__ import annotations

import io
import json
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from splicer.bench import plots, report
from splicer.bench.progress import Progress
from splicer.bench.suite import Comparison, Findings, Options
from splicer.errors import SplicerError

from ..conftest import Terminal
from .conftest import Compare

PLAINS = [100.0, 104.0, 100.0, 104.0]


def _report(comparisons: list[Comparison], **changes: object) -> report.Report:
    findings = Findings("workloads", [], comparisons, **changes)  # type: ignore[arg-type]
    return report.make_report("wrk", "splicer bench wrk <b>", Options(pairs=3), findings)


@pytest.fixture
def comparison(compare: Compare) -> Comparison:
    return compare(rate=(PLAINS, [200, 210, 190]), p50_us=(PLAINS, [50, 50, 50]))


def test_as_json(comparison: Comparison) -> None:
    document = _report([comparison], notes=["a note"], failures=["it failed"]).to_json()
    assert json.loads(json.dumps(document)) == document
    assert (document["schema"], document["ok"], document["suite"]) == (1, False, "wrk")
    assert document["verdicts"][0]["direction"] == "better"
    assert document["load"]["alternations"] == 3
    assert document["machine"]["cpus"] >= 1
    assert (document["notes"], document["failures"]) == (["a note"], ["it failed"])


def test_the_summary_is_verdicts_and_notes(comparison: Comparison) -> None:
    summary = _report([comparison], notes=["16 of 16 connections: cold."]).summary
    assert summary == ["2.0 times the requests, half the latency, noise 4 %", "16 of 16 connections: cold."]
    assert _report([]).summary == []


def test_as_a_page(comparison: Comparison) -> None:
    """It stands by itself, and what the user has typed is text in it."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.links: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    text = _report([comparison]).to_html(plots.make_svg(plots.draw([comparison], "a title")))
    reader = Reader()
    reader.feed(text)
    assert {"svg", "table", "h1"} <= set(reader.tags)
    assert "b" not in reader.tags and "splicer bench wrk &lt;b&gt;" in text
    assert not [link for link in reader.links if not link.startswith("#")]
    assert "2.0 times the requests" in text
    assert reader.tags.count("tr") == 1 + len(comparison.rows)


def test_the_picture_has_all_pairs(comparison: Comparison) -> None:
    """A dot for each ratio of a spliced leg, and one for each of plain legs."""
    axes = plots.draw([comparison], "a title").axes[0]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    wanted = [values for row in comparison.rows for values in (row.noises.values, row.ratios.values)]
    assert [list(each) for each in dots] == [list(each) for each in wanted]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["web: requests/s", "web: p50 us"]
    low, high = axes.get_xlim()
    assert all(low < value < high for values in wanted for value in values)


def test_many_metrics_are_one_for_each(comparison: Comparison) -> None:
    axes = plots.draw([comparison] * 32, "a title").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["web: requests/s"] * 32


def test_pictures_are_files(comparison: Comparison, tmp_path: Path) -> None:
    figure = plots.draw([comparison] * 3, "a title")
    plots.save_png(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    svg = plots.make_svg(figure)
    assert ET.fromstring(svg).tag.endswith("svg")


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SplicerError, match="matplotlib") as raised:
        plots.require()
    assert "python3-matplotlib" in (raised.value.hint or "")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert report.check_path(str(tmp_path / "x.png")) == tmp_path / "x.png"
    with pytest.raises(SplicerError, match="no such directory"):
        report.check_path(str(tmp_path / "nowhere/x.png"))
    with pytest.raises(SplicerError, match="cannot write there"):
        report.check_path(str(tmp_path))


# -- progress ------------------------------------------------------------------------------------------------


def test_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now, stream = [0.0], Terminal()
    progress = Progress(stream, lambda: now[0])
    progress.begin(4)
    for _ in range(4):
        progress.step("web: plain")
        now[0] += 30
    drawn = stream.getvalue().split("\r\x1b[K")[1:]
    assert drawn[0] == "[........................]   0%  web: plain"
    assert drawn[1] == "[######..................]  25%, 1m30s left  web: plain"
    assert drawn[3] == "[##################......]  75%, 30s left  web: plain"
    progress.step("x" * 200)
    assert len(stream.getvalue().split("\r\x1b[K")[-1]) < 80
    progress.clear()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_no_bar_where_nobody_looks() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.begin(2)
    progress.step("web")
    progress.clear()
    assert stream.getvalue() == ""
