#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what the documents show: datapath.svg, before-after.svg, and the table in performance.md.

    docs/draw.py            the same as `make pictures`

The figures are in figures.json: {"runs": [...]}. Each run is what `make bench ARGS=--json` prints. It may say
by which "command" it was made, and in a "note" what else to know of the machine. Where two runs have the same
workload, the later one counts. The output of one run may stand there by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH = 960

# The colours of each class, light and dark. A picture has a background of its own, so that it can be read
# wherever it is shown. It follows the reader's choice where the viewer tells it.
COLOURS = {
    "page": ("fill", "#ffffff", "#161b22"),
    "frame": ("stroke", "#d0d7de", "#3d444d"),
    "box": ("fill", "#eaeef2", "#2b323b"),
    "pill": ("fill", "#ffffff", "#161b22"),
    "text": ("fill", "#1f2328", "#e6edf3"),
    "faint": ("fill", "#59636e", "#9da7b3"),
    "plain": ("fill", "#8c959f", "#7d8590"),
    "spliced": ("fill", "#0a7d55", "#3fb981"),
    "plain-line": ("stroke", "#6e7781", "#9198a1"),
    "spliced-line": ("stroke", "#0a7d55", "#3fb981"),
}
FONT = "font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def style(shade: int) -> str:
    """Rules for the light shade (0) or the dark one (1)."""
    return " ".join(f".{name} {{ {rule[0]}: {rule[1 + shade]} }}" for name, rule in COLOURS.items())


def picture(height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG document."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img">',
        f"<title>{escape(title)}</title>",
        "<!-- Drawn by docs/draw.py; change that and say: make pictures -->",
        "<style>",
        f"text {{ {FONT}; font-size: 14px }}",
        ".large { font-size: 18px; font-weight: 600 }",
        ".strong { font-weight: 600 }",
        ".small { font-size: 12.5px }",
        ".line { fill: none; stroke-linejoin: round }",
        style(0),
        f"@media (prefers-color-scheme: dark) {{ {style(1)} }}",
        "</style>",
        f'<rect class="page frame" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, look: str = "text", anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, look: str = "box", radius: float = 5) -> str:
    return f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def line(points: Sequence[tuple[float, float]], look: str, more: str = 'stroke-width="5"') -> str:
    track = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="line {look}" points="{track}" {more}/>'


def extend(element: str, attributes: str) -> str:
    return element.replace("/>", f" {attributes}/>")


# -- the data path ------------------------------------------------------------------------------------------

LAYERS = ("TCP", "IP, netfilter", "veth")
COLUMN, BOX, STEP, TOP = 168, 34, 43, 92


def draw_stacks(left: float, right: float, faded: bool) -> Iterator[str]:
    """Two containers, and the bridge between them. `faded`: what splicing goes past."""
    bottom = TOP + 5 * STEP
    for x, name in ((left, "container A"), (right, "container B")):
        frame = box(x - 10, TOP - 32, COLUMN + 20, bottom - TOP + 32, "frame", 8)
        yield extend(frame, 'fill="none" stroke-dasharray="4 4"')
        yield text(x + COLUMN / 2, TOP - 12, name, "faint small", "middle")
    rows = (("send()", "recv()"), ("socket", "receive queue"), *zip(LAYERS, LAYERS, strict=True))
    for row, names in enumerate(rows):
        y = TOP + row * STEP
        fade = ' opacity="0.45"' if faded and row > 1 else ""
        yield f"<g{fade}>"
        yield box(left, y, COLUMN, BOX) + text(left + 14, y + 22, names[0])
        yield box(right, y, COLUMN, BOX) + text(right + COLUMN - 14, y + 22, names[1], anchor="end")
        yield "</g>"
    yield '<g opacity="0.45">' if faded else "<g>"
    yield box(left, bottom + 12, right + COLUMN - left, BOX)
    yield text(left + 14, bottom + 34, "bridge")
    yield "</g>"


def draw_arrow(x: float, y: float, look: str) -> str:
    """Points up, and ends at y."""
    return f'<path class="{look}" d="M {x:g} {y:g} l 9 15 h -18 z"/>'


def draw_datapath() -> str:
    parts: list[str] = []
    middle, end = BOX / 2, TOP + BOX - 2
    for left, spliced in ((34, False), (518, True)):
        right = left + 240
        start, goal = left + COLUMN - 26, right + 26
        parts.append(text(left - 10, 38, "Spliced" if spliced else "Plain TCP", "text large"))
        parts += draw_stacks(left, right, spliced)
        bridge = TOP + 5 * STEP + 12 + BOX - 8
        long_way = [(start, TOP + middle), (start, bridge), (goal, bridge), (goal, end + 12)]
        if spliced:
            queue = TOP + STEP + middle
            parts.append(
                line(long_way, "plain-line", 'stroke-width="2" stroke-dasharray="3 5" opacity="0.7"')
            )
            parts.append(
                line([(start, TOP + middle), (start, queue), (goal, queue), (goal, end + 12)], "spliced-line")
            )
            centre = (start + goal) / 2
            parts.append(
                extend(box(centre - 29, queue - 14, 58, 28, "pill spliced-line", 14), 'stroke-width="2"')
            )
            parts.append(text(centre, queue + 5, "BPF", "text strong", "middle"))
        else:
            parts.append(line(long_way, "plain-line"))
        colour = "spliced" if spliced else "plain"
        parts.append(f'<circle class="{colour}" cx="{start:g}" cy="{TOP + middle:g}" r="6"/>')
        parts.append(draw_arrow(goal, end, colour))
    y = TOP + 5 * STEP + 12 + BOX + 32
    parts.append(text(24, y, "Each send goes down one network stack and up another.", "text"))
    parts.append(text(508, y, "Each send goes straight into the peer's receive queue.", "text"))
    parts.append(
        text(508, y + 21, "Handshake, close and what is not redirected go the long way.", "faint small")
    )
    return picture(y + 40, "The way of a message between two containers: plain TCP and spliced", parts)


# -- before and after ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A figure that is shown: metric `key` of a workload of the benchmark."""

    workload: str
    key: str
    what: str
    measure: str
    more_is_better: bool = True

    def format(self, value: float) -> str:
        if self.key == "rate":
            return f"{value:,.0f}".replace(",", " ")
        return f"{value:.0f} us" if self.key == "p50_us" else f"{value:.1f} us"


SHOWN = (
    Shown("keep-alive", "rate", "nginx over a bridge, keep-alive", "requests per second"),
    Shown("keep-alive", "p50_us", "nginx over a bridge, keep-alive", "latency, p50", False),
    Shown("keep-alive", "cpu_us", "nginx over a bridge, keep-alive", "CPU time per request", False),
    Shown("proxy-20k", "rate", "nginx to nginx on loopback, 20 kB", "requests per second"),
    Shown("proxy-1m", "rate", "nginx to nginx on loopback, 1 MB", "requests per second"),
    Shown("close", "rate", "nginx, a connection per request", "requests per second"),
)


@dataclass(frozen=True)
class Figure:
    """One of SHOWN as it was measured: medians, the median of the ratios of the pairs, and their range."""

    shown: Shown
    plain: float
    spliced: float
    ratio: float
    least: float
    most: float
    noise: dict[str, float]
    run: dict[str, Any]

    @property
    def spread(self) -> str:
        return f"{self.least:.2f} - {self.most:.2f}"

    @property
    def quiet(self) -> str:
        """What one plain leg was of the plain one before it: the noise of the machine."""
        return "{median:.2f} ({min:.2f} - {max:.2f})".format(**self.noise)

    @property
    def command(self) -> str:
        return str(self.run.get("command", "sudo make bench"))

    @property
    def pairs(self) -> str:
        return f"{self.run['load']['alternations']} of {self.run['load']['seconds']:g} s"


def read_figures(document: dict[str, Any]) -> list[Figure]:
    """What is shown and was measured, in the order of SHOWN."""
    measured = {
        (workload["name"], key): (metric, run)
        for run in document.get("runs", [document])
        for workload in run["workloads"]
        for key, metric in workload["metrics"].items()
    }
    found = []
    for shown in SHOWN:
        if (shown.workload, shown.key) in measured:
            metric, run = measured[shown.workload, shown.key]
            ratio = metric["ratio"]
            values = metric["plain"], metric["spliced"], ratio["median"], ratio["min"], ratio["max"]
            found.append(Figure(shown, *values, metric["noise"], run))
    return found


def draw_figures(figures: Sequence[Figure]) -> str:
    """Bars in pairs, each pair to its own scale."""
    bars, longest, row = 288, 430, 64
    parts = [text(24, 38, "Plain TCP and spliced, measured", "text large")]
    for x, look, name in ((bars + 190, "plain", "plain TCP"), (bars + 300, "spliced", "spliced")):
        parts += [box(x, 27, 14, 14, look, 3), text(x + 21, 39, name)]
    parts.append(text(WIDTH - 24, 39, "ratio (least - most)", "faint small", "end"))
    y = 62
    for figure in figures:
        shown, scale = figure.shown, longest / max(figure.plain, figure.spliced)
        direction = "more is better" if shown.more_is_better else "less is better"
        parts.append(text(24, y + 18, shown.what, "text"))
        parts.append(text(24, y + 37, f"{shown.measure}; {direction}", "faint small"))
        for offset, look, value in ((0, "plain", figure.plain), (24, "spliced", figure.spliced)):
            length = round(value * scale)
            parts.append(box(bars, y + offset, length, 20, look, 3))
            parts.append(text(bars + length + 8, y + offset + 15, shown.format(value), "text small"))
        parts.append(text(WIDTH - 24, y + 18, f"{figure.ratio:.2f}", "text strong", "end"))
        parts.append(text(WIDTH - 24, y + 37, figure.spread, "faint small", "end"))
        y += row
    machine = figures[0].run["machine"]
    note = figures[0].run.get("note")
    about = f"Linux {machine['kernel']}, {machine['cpus']} CPUs, nginx {machine['nginx']}"
    parts.append(
        text(
            24, y + 12, f"{about}{f'; {note}' if note else ''}. docs/performance.md says how.", "faint small"
        )
    )
    return picture(y + 32, "Plain TCP and spliced: requests per second, latency and CPU time", parts)


# -- the table ----------------------------------------------------------------------------------------------

BEGIN, END = "<!-- table: make pictures -->", "<!-- end of table -->"


def make_table(figures: Sequence[Figure]) -> list[str]:
    """The same figures as a table, each with the command that measured it."""
    lines = [
        "| | plain TCP | spliced | ratio (least - most) | plain/plain | pairs | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        shown = figure.shown
        cells = (
            f"{shown.what}: {shown.measure}",
            shown.format(figure.plain),
            shown.format(figure.spliced),
            f"{figure.ratio:.2f} ({figure.spread})",
            figure.quiet,
            figure.pairs,
            f"`{figure.command}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def put_table(document: str, figures: Sequence[Figure]) -> str:
    """The document with the table between its two marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} and {END} in the document")
    return "\n".join([before + begin, "", *make_table(figures), "", end]) + after


def draw_all() -> dict[Path, str]:
    """Each file, and what has to be in it."""
    figures = read_figures(json.loads((HERE / "figures.json").read_text()))
    table = HERE / "performance.md"
    return {
        HERE / "datapath.svg": draw_datapath(),
        HERE / "before-after.svg": draw_figures(figures),
        table: put_table(table.read_text(), figures),
    }


if __name__ == "__main__":
    for path, content in draw_all().items():
        path.write_text(content)
        print(path)
