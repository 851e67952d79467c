# SPDX-License-Identifier: Apache-2.0
"""iperf3 in both directions at once and by turns."""

from __future__ import annotations

import json

from apps.case import Case, Failed, Outcome
from apps.stage import Stage

PORT = 5201
WAYS = {"up": (), "down": ("-R",), "both": ("--bidir",), "small": ("-l", "500")}


def _run(stage: Stage) -> Outcome:
    address = stage.address("a")
    server = stage.start("iperf3", "-s", "-B", address, "-p", str(PORT))
    stage.wait_listening(server, PORT)
    facts, rates = {}, {}
    seconds = str(max(1, round(stage.seconds / len(WAYS))))
    for name, options in WAYS.items():
        command = ("iperf3", "-c", address, "-p", str(PORT), "-J", "-P", "2", "-t", seconds, *options)
        told = json.loads(stage.call(*command))
        if "error" in told:
            raise Failed(f"{name}: {told['error']}")
        end = told["end"]
        facts[name] = {"streams": len(end["streams"]), "moved": end["sum_received"]["bytes"] > 0}
        rates[name] = round(end["sum_received"]["bits_per_second"] / 1e9, 2)
    return Outcome(f"{len(facts)} of {len(WAYS)} tests", facts, {"Gbit/s": rates})


CASES = (
    Case(
        "iperf3",
        _run,
        ("iperf3",),
        redirects=False,
        reasons=frozenset({"cold"}),
        remark="one end of each stream never reads, so it stays cold",
    ),
)
