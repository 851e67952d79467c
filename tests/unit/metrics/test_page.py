# SPDX-License-Identifier: Apache-2.0
"""Names, the page, and the tables in docs/metrics.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.documents import read_document

from splicer.errors import FAILURE, SplicerError
from splicer.metrics import page
from splicer.metrics.catalogue import METRICS, Metric, Samples
from splicer.metrics.histogram import Histogram
from splicer.metrics.services import MOST_NAMES, MOST_PAIRS


def fill() -> dict[str, Samples]:
    """A value of each metric."""
    histogram = Histogram()
    for seconds in (0.0001, 0.0002, 0.05, 100.0):
        histogram.observe(seconds)
    return {
        metric.name: [(metric.labels, histogram.read() if metric.kind == "histogram" else 7)]
        for metric in METRICS
    }


def test_the_document_lists_what_there_is() -> None:
    (rows,) = [
        rows
        for head, rows in read_document("docs/metrics.md").tables()
        if head == ["metric", "type", "labels", "meaning"]
    ]
    assert rows == [
        [f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help]
        for each in METRICS
    ]


def test_the_document_has_the_limits() -> None:
    text = read_document("docs/metrics.md").prose
    assert f"{MOST_NAMES} names, or {MOST_PAIRS} pairs" in text


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert re.fullmatch(r"splicer_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|milliseconds|kb|kib|mib|percent|ratio)(_|$)", metric.name)
    assert metric.help.endswith(".")
    assert not {"address", "ip", "port", "pid", "cgroup", "netns", "cookie", "id"} & set(metric.labels)


def test_everything_is_on_the_page() -> None:
    kind, text = page.Page(fill).render("")
    assert kind.startswith("text/plain")
    lines = text.decode().splitlines()
    for metric in METRICS:
        assert f"# HELP {metric.name} {metric.help}" in lines
        assert f"# TYPE {metric.name} {metric.kind}" in lines
        labels = ",".join(f'{name}="{name}"' for name in sorted(metric.labels))
        if metric.kind != "histogram":
            assert (f"{metric.name}{{{labels}}} 7.0" if labels else f"{metric.name} 7.0") in lines
    assert 'splicer_loop_turn_seconds_bucket{le="0.0001"} 1.0' in lines
    assert 'splicer_loop_turn_seconds_bucket{le="10.0"} 3.0' in lines
    assert 'splicer_loop_turn_seconds_bucket{le="+Inf"} 4.0' in lines
    assert "splicer_loop_turn_seconds_count 4.0" in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


def test_the_newer_format() -> None:
    kind, text = page.Page(fill).render("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_what_is_not_known_is_not_there() -> None:
    _, text = page.Page(dict).render("")
    assert b"splicer_" not in text


def test_labels_are_escaped() -> None:
    reading: dict[str, Samples] = {"splicer_table_entries": [(('a"b\\c\nd',), 1)]}
    assert rb'{table="a\"b\\c\nd"}' in page.Page(lambda: reading).render("")[1]


def test_a_metric_that_is_not_in_the_catalogue_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="splicer_surprise"):
        page.Page(lambda: {"splicer_surprise": [((), 1)]}).render("")


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SplicerError, match="prometheus_client") as raised:
        page.require()
    assert "python3-prometheus-client" in (raised.value.hint or "")
    assert raised.value.exit_code == FAILURE


def test_the_package_says_which_library() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert text.count('"prometheus-client>=0.16"') == 2
