# SPDX-License-Identifier: Apache-2.0
"""Pictures of ratios: every pair of legs as a dot, and those of plain against plain beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splicer.bench.results import Row
from splicer.bench.suite import Comparison
from splicer.bench.verdict import find_direction, find_noise
from splicer.errors import SplicerError

# With more metrics than that in one picture each comparison has its first one only.
MOST_ROWS = 40
_COLOURS = {"better": "#0a7d55", "worse": "#b42318", "same": "#57606a"}
_PLAIN = "#8c959f"


def require() -> None:
    """Raises SplicerError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SplicerError(
            "pictures need matplotlib, which is not installed",
            hint="apt-get install python3-matplotlib, or: pip install 'splicer[bench]'",
        ) from error


def draw(comparisons: Sequence[Comparison], title: str) -> Any:
    """A figure with a line for each metric, on a logarithmic scale of ratios. Raises SplicerError."""
    require()
    from matplotlib.figure import Figure

    rows = [(comparison, row) for comparison in comparisons for row in comparison.rows]
    if len(rows) > MOST_ROWS:
        rows = [(comparison, comparison.rows[0]) for comparison in comparisons]
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=_PLAIN, linewidth=1)
    for place, (_, row) in enumerate(rows):
        _draw_row(axes, place, row)
    axes.set_yticks(range(len(rows)), [f"{comparison.name}: {row.metric.label}" for comparison, row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _scale(axes, [row for _, row in rows])
    axes.set_xlabel("ratio to plain TCP; grey: plain TCP to plain TCP, and how far that reaches")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_row(axes: Any, place: int, row: Row) -> None:
    """The band is the noise; dots are pairs of legs, the line is their median."""
    noise = find_noise(row)
    axes.barh(place, 1 + noise - 1 / (1 + noise), left=1 / (1 + noise), height=0.8, color="#eaeef2", zorder=0)
    colour = _COLOURS[find_direction(row)]
    for offset, values, shade in ((0.18, row.noises.values, _PLAIN), (-0.12, row.ratios.values, colour)):
        axes.plot(values, [place + offset] * len(values), "o", color=shade, markersize=4.5, alpha=0.8)
    middle = row.ratios.median
    axes.plot([middle, middle], [place - 0.32, place + 0.08], color=colour, linewidth=2)
    axes.annotate(
        f"{middle:.2f}", (middle, place - 0.2), (6, 2), textcoords="offset points", color=colour, fontsize=8
    )


def _scale(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = [value for row in rows for value in (*row.ratios.values, *row.noises.values) if value > 0]
    low, high = min([0.9, *values]) / 1.05, max([1.1, *values]) * 1.1
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    steps = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
    axes.xaxis.set_major_locator(FixedLocator([step for step in steps if low <= step <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save_png(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", dpi=100)


def make_svg(figure: Any) -> str:
    """An element that can stand in a page; letters stay letters."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
