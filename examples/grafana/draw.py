#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the panels of dashboard.json from what a Prometheus has, for who has no Grafana at hand.

    draw.py http://127.0.0.1:9090 dashboard.png [MINUTES]

It needs matplotlib. MINUTES is how far back it goes, 60 if not given.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 120
COLUMNS = 3
SCALES = {"percentunit": (100, "%"), "Bps": (1e-6, "MB/s"), "bytes": (1e-6, "MB"), "s": (1e3, "ms")}


def fetch(server: str, query: str, seconds: float) -> list[dict[str, Any]]:
    """Series of a query over the last so many seconds."""
    now = time.time()
    # As Grafana does it: not shorter than four scrapes of the example.
    interval = f"{max(20, round(seconds / STEPS))}s"
    query = query.replace("$__rate_interval", interval).replace("$instance", ".*")
    asked = {"query": query, "start": now - seconds, "end": now, "step": seconds / STEPS}
    with urllib.request.urlopen(f"{server}/api/v1/query_range?{urllib.parse.urlencode(asked)}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found


def name(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend


def draw_panel(axes: Any, panel: dict[str, Any], server: str, seconds: float) -> None:
    """A line for each series; of several by label, those that are not 0 all the time."""
    factor, unit = SCALES.get(panel["fieldConfig"]["defaults"]["unit"], (1, ""))
    for target in panel["targets"]:
        for series in fetch(server, target["expr"], seconds):
            points = [(float(when), factor * float(value)) for when, value in series["values"]]
            if "{{" not in target["legendFormat"] or any(value for _, value in points):
                label = name(target["legendFormat"], series["metric"])
                times = [(when - time.time()) / 60 for when, _ in points]
                axes.plot(times, [value for _, value in points], label=label, linewidth=1)
    axes.set_title(panel["title"], fontsize=8)
    axes.set_ylabel(unit, fontsize=7)
    axes.set_xlim(-seconds / 60, 0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        axes.legend(handles[:8], labels[:8], fontsize=5, loc="upper left")


def main(server: str, output: str, minutes: str = "60") -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = json.loads((HERE / "dashboard.json").read_text())["panels"]
    rows = -(-len(panels) // COLUMNS)
    figure, places = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 2.2 * rows))
    for axes, panel in zip(places.flat, panels, strict=False):
        draw_panel(axes, panel, server, 60 * float(minutes))
    for axes in list(places.flat)[len(panels) :]:
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=65)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: draw.py PROMETHEUS OUTPUT.png [MINUTES]")
    main(*sys.argv[1:])
