# SPDX-License-Identifier: Apache-2.0
"""The pictures and the table in docs/ are what docs/draw.py makes of docs/figures.json."""

from __future__ import annotations

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the annotations of their fields.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


draw = _load(DOCS / "draw.py")
FIGURES: dict[str, Any] = json.loads((DOCS / "figures.json").read_text())
WANTED: dict[Path, str] = draw.draw_all()


@pytest.mark.parametrize("path", WANTED, ids=lambda path: path.name)
def test_what_is_checked_in_is_what_the_source_draws(path: Path) -> None:
    assert path.read_text() == WANTED[path], "make pictures"


@pytest.mark.parametrize(
    "path", [path for path in WANTED if path.suffix == ".svg"], ids=lambda path: path.name
)
def test_pictures_are_well_formed_and_stay_inside(path: Path) -> None:
    root = ET.fromstring(WANTED[path])
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    for element in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w <= width and y + h <= height
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 < float(element.attrib["x"]) < width and 0 < float(element.attrib["y"]) < height


def test_everything_that_is_shown_was_measured() -> None:
    figures = draw.read_figures(FIGURES)
    assert [figure.shown for figure in figures] == list(draw.SHOWN)
    assert all(figure.least <= figure.ratio <= figure.most for figure in figures)


def test_what_the_benchmark_prints_can_be_drawn() -> None:
    """The format is the benchmark's own: one run by itself, with more in it than is drawn."""
    from splicer.bench import model, results
    from splicer.bench.workloads import WRK_WORKLOADS as workloads

    metrics = {"rate": 10.0, "p50_us": 4.0, "p99_us": 5.0, "max_us": 9.0, "cpu_us": 2.0}
    plains = [model.Sample(metrics)] * 4
    splices = [
        results.Leg(model.Sample({key: value * factor for key, value in metrics.items()}), None)
        for factor in (1, 2, 4)
    ]
    document = {
        "schema": 1,
        "ok": True,
        "machine": {"kernel": "6.18.44", "architecture": "x86_64", "cpus": 2, "nginx": "1.22.1"},
        "load": {
            "seconds": 3.0,
            "connections": 16,
            "threads": 1,
            "workers": 1,
            "alternations": 3,
            "mode": "default",
        },
        "workloads": [results.Result(workload, plains, splices).to_json(False) for workload in workloads],
    }
    figures = draw.read_figures(json.loads(json.dumps(document)))
    assert [figure.shown for figure in figures] == list(draw.SHOWN)
    first = figures[0]
    assert (first.plain, first.spliced, first.ratio, first.least, first.most) == (10, 20, 2, 1, 4)
    assert ET.fromstring(draw.draw_figures(figures)).tag.endswith("svg")
    # What a later run measured anew takes the place of what an earlier one had.
    again = draw.read_figures({"runs": [*FIGURES.get("runs", [FIGURES]), document]})
    assert [figure.plain for figure in again] == [figure.plain for figure in figures]


def test_a_document_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table"):
        draw.put_table("# Performance\n", draw.read_figures(FIGURES))
