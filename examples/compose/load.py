# SPDX-License-Identifier: Apache-2.0
"""The demonstration's load generator: wrk on two services, plain and spliced by turns, then a table.

It switches splicing off with `splicer set` and on again with `splicer unset`, through the sidecar's control
socket. The legs of a pair follow each other and every other pair begins with the spliced one, so that what
drifts on the machine drifts for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
# What is switched: every connection of the demonstration has one of these services at its server end.
SERVICES = ("web", "proxy")
TARGETS = {"web": "http://web:8080/", "proxy, web": "http://proxy:8080/"}


@dataclass(frozen=True)
class Leg:
    """One run of wrk. `p50` is in microseconds; `redirected` are messages of the host that went past TCP."""

    requests: int
    rate: float
    p50: float
    errors: int
    redirected: int = 0


@dataclass(frozen=True)
class Pair:
    """Two legs, one after the other."""

    plain: Leg
    spliced: Leg


def splicer(*arguments: str, patience: float = 0.0) -> str:
    """Call the command line; what it prints. Ends the program with its message when it fails, and goes on
    failing for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "splicer", *arguments], capture_output=True, text=True, check=False
        )
        if not done.returncode:
            return done.stdout
        if time.monotonic() >= deadline:
            sys.exit(f"splicer {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr.strip()}")
        time.sleep(0.2)


def switch(spliced: bool) -> None:
    for service in SERVICES:
        splicer(*(("unset", service) if spliced else ("set", service, "off")))


def count_redirected() -> int:
    """Messages that went past TCP so far."""
    return int(json.loads(splicer("status", "--json"))["totals"]["redirected_messages"])


def run_wrk(url: str, seconds: int, connections: int) -> Leg:
    done = subprocess.run(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "10s"),
            *("-s", str(HERE / "report.lua"), url),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"wrk {url}: {done.stderr.strip() or done.stdout.strip()}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    requests = found["requests"]
    return Leg(requests, requests * 1e6 / found["duration"], found["p50"], found["errors"])


def run_leg(url: str, spliced: bool, options: argparse.Namespace) -> Leg:
    switch(spliced)
    before = count_redirected()
    leg = run_wrk(url, options.seconds, options.connections)
    leg = replace(leg, redirected=count_redirected() - before)
    if spliced and not leg.redirected:
        sys.exit(f"nothing was spliced on the way to {url}; splicer flows says why")
    return leg


def run_pair(url: str, number: int, options: argparse.Namespace) -> Pair:
    order = (True, False) if number % 2 else (False, True)
    legs = {spliced: run_leg(url, spliced, options) for spliced in order}
    return Pair(plain=legs[False], spliced=legs[True])


def wait_for(url: str, timeout: float = 30.0) -> None:
    """Names resolve and servers listen a moment after the containers start."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{url} does not answer: {error}")
        time.sleep(0.2)


def tabulate(results: dict[str, list[Pair]]) -> list[str]:
    """The table: medians, and the ratio of the medians."""
    lines = [f"{'TO':<12} {'WHAT':<12} {'PLAIN':>10} {'SPLICED':>10} {'RATIO':>7}"]
    for name, pairs in results.items():
        rows = (
            ("requests/s", [pair.plain.rate for pair in pairs], [pair.spliced.rate for pair in pairs]),
            ("p50, us", [pair.plain.p50 for pair in pairs], [pair.spliced.p50 for pair in pairs]),
        )
        for title, plain, spliced in rows:
            before, after = statistics.median(plain), statistics.median(spliced)
            lines.append(f"{name:<12} {title:<12} {before:>10.0f} {after:>10.0f} {after / before:>7.2f}")
    return lines


def summarize(results: dict[str, list[Pair]]) -> dict[str, object]:
    """The same for programs."""

    def show(leg: Leg) -> dict[str, object]:
        return {
            "requests": leg.requests,
            "rate": round(leg.rate),
            "p50_us": leg.p50,
            "redirected_messages": leg.redirected,
        }

    return {
        name: [{"plain": show(pair.plain), "spliced": show(pair.spliced)} for pair in pairs]
        for name, pairs in results.items()
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    environ = os.environ.get
    parser.add_argument("--pairs", type=int, default=int(environ("DEMO_PAIRS") or 5))
    parser.add_argument("--seconds", type=int, default=int(environ("DEMO_SECONDS") or 3))
    parser.add_argument("--connections", type=int, default=int(environ("DEMO_CONNECTIONS") or 16))
    parser.add_argument(
        "--json",
        action="store_true",
        default=bool(environ("DEMO_JSON")),
        help="also print all results as one line of JSON",
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    results: dict[str, list[Pair]] = {}
    failed = 0
    for service in SERVICES:
        # The sidecar hears of containers a moment after they have started.
        splicer("policy", service, patience=30.0)
    try:
        for name, url in TARGETS.items():
            wait_for(url)
            results[name] = []
            for number in range(options.pairs):
                pair = run_pair(url, number, options)
                results[name].append(pair)
                failed += pair.plain.errors + pair.spliced.errors
                print(
                    f"{name}: pair {number + 1} of {options.pairs}: plain {pair.plain.rate:.0f}, "
                    f"spliced {pair.spliced.rate:.0f} requests/s",
                    flush=True,
                )
    finally:
        switch(spliced=True)
    print("", *tabulate(results), "", sep="\n")
    print(f"{options.connections} connections, {options.seconds} s a leg, medians of {options.pairs} pairs")
    print(f"failed requests: {failed}")
    print("docker compose --profile demo down  ends the demonstration")
    if options.json:
        print(json.dumps(summarize(results)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
