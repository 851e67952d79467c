# SPDX-License-Identifier: Apache-2.0
"""Plain against spliced TCP, alternately, in one run. See README.md beside this file."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import adopting
import census
import connecting
import services
import stack
import watching
from cells import matrix, streams
from model import Load, Workload
from relays import RELAY_WORKLOADS, missing_relays
from results import TABLE_HEAD, Leg, Result
from splicing import Splicer, cpu_seconds, find_splicer, refuse_company
from testbed import Interrupted, Testbed, TestbedError, interrupt_on_signals
from workloads import (
    LIFE_WORKLOADS,
    REFUSED_WORKLOADS,
    WRK_WORKLOADS,
    busy_seconds,
    describe_nginx,
    missing_programs,
)

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
# Workloads that are measured instead of the default ones.
GROUPS = {
    "refused": "what splicer does not splice, and what ends early",
    "matrix": "ping-pong and stream on one connection",
    "streams": "streams that are always redirected, by size of message",
    "relays": "Varnish, lighttpd and socat in front of nginx, which splicer may leave plain",
    "lives": "nginx proxying to nginx, connections that end after some requests",
}
# What is measured by itself, and is no workload.
ALONE = ("watch", "census", "adoption", "connecting", "stack")
# A line for each workload.
TABLES = ("matrix", "streams")


def measure(splicer: Splicer | None, workload: Workload, bed: Testbed, load: Load, number: int) -> Result:
    """So many spliced legs, with a plain one before and after each."""
    plains = [workload.measure(bed, load)]
    splices = []
    for turn in range(number):
        _progress(f"{workload.name} {turn + 1}/{number}")
        if splicer is None:
            splices.append(Leg(workload.measure(bed, load), None))
        else:
            splices.append(Leg(*splicer.measure(workload, load)))
        plains.append(workload.measure(bed, load))
    _progress("")
    return Result(workload, plains, splices)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Measures plain and spliced TCP alternately, in network namespaces of its own.",
        epilog="wrk's legs are rounded up to whole seconds. Exit code 1: wrk reported errors, "
        "a leg that should be spliced was not, splicer failed, or --check did.",
    )
    add = parser.add_argument
    add("-n", "--alternations", type=_positive_int, default=5, metavar="N", help="spliced legs (5)")
    add("-t", "--seconds", type=_positive, metavar="T", help="length of a leg (3; 2 in a table)")
    add("--only", action="append", metavar="NAME", help="these of all workloads; shell patterns, repeatable")
    # Named one by one, so that they are found where documents name them.
    add("--refused", action="store_true", help=f"instead of the default: {GROUPS['refused']}")
    add("--relays", action="store_true", help=f"instead of the default: {GROUPS['relays']}")
    add("--matrix", action="store_true", help=f"instead of the default: {GROUPS['matrix']}")
    add("--streams", action="store_true", help=f"instead of the default: {GROUPS['streams']}")
    add("--lives", action="store_true", help=f"instead of the default: {GROUPS['lives']}")
    add("--watch", action="store_true", help="what looking after spliced connections costs the daemon")
    add("--census", action="store_true", help="how soon older connections are found, and what they notice")
    add("--adoption", action="store_true", help="how soon busy connections are spliced")
    add("--connecting", action="store_true", help="what a connection of one request pays for being seen")
    add(
        "--stack",
        action="store_true",
        help="which part of a stack's bytes is redirected, and why not the rest",
    )
    add("--list", action="store_true", help="list the workloads and stop")
    add("--check", action="store_true", help="fail where a ratio is worse than the workload's bound")
    add("--baseline", action="store_true", help="the spliced legs plain as well")
    add("--programs", action="store_true", help="time the BPF programs as well (some 40 ns a call)")
    add("--json", action="store_true", help="the result as JSON")
    add("--splicer", metavar="PATH", help="the command to test (the repository's .venv/bin/splicer)")
    add("--mode", choices=("adaptive", "eager"), help="passed on to splicer run")
    add(
        "--connections",
        type=_positive_int,
        metavar="N",
        help="wrk's connections (16; 10000 with --watch, 5000 with --census)",
    )
    add("--driver", choices=tuple(services.DRIVERS), default="mysqlclient", help="for --stack (mysqlclient)")
    add("--python", metavar="PATH", default=services.PYTHON, help="for --stack, with the clients that it has")
    add("--threads", type=_positive_int, default=1, metavar="N", help="wrk's threads (1)")
    add("--workers", type=_positive_int, default=1, metavar="N", help="nginx's workers (1)")
    options = parser.parse_args(arguments)
    if options.programs and options.baseline:
        parser.error("--programs is not for --baseline, which loads none")
    groups = [name for name in GROUPS if getattr(options, name)]
    alone = [
        name for name in ("watch", "census", "adoption", "connecting", "stack") if getattr(options, name)
    ]
    if alone and (groups or options.baseline or options.only or len(alone) > 1):
        parser.error(f"--{alone[0]} is measured by itself")
    if len(groups) > 1:
        parser.error(f"one of {', '.join(f'--{name}' for name in GROUPS)} at a time")
    options.group = groups[0] if groups else ""
    if options.connections is None:
        many = {"watch": watching.CONNECTIONS, "census": census.CONNECTIONS}
        options.connections = many[alone[0]] if alone and alone[0] in many else 16
    return options


def _positive(text: str) -> float:
    if (value := float(text)) <= 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _positive_int(text: str) -> int:
    return int(_positive(str(int(text))))


def list_groups() -> dict[str, list[Workload]]:
    """The default is the group without a name."""
    return {
        "": list(WRK_WORKLOADS),
        "refused": list(REFUSED_WORKLOADS),
        "matrix": list(matrix()),
        "streams": list(streams()),
        "relays": list(RELAY_WORKLOADS),
        "lives": list(LIFE_WORKLOADS),
    }


def select_workloads(options: argparse.Namespace) -> list[Workload]:
    """Raises TestbedError for a pattern that names nothing."""
    groups = list_groups()
    if not options.only:
        return groups[options.group]
    # What is printed in the same way as the default is found without its flag.
    every = groups[options.group] if options.group else groups[""] + groups["refused"] + groups["lives"]
    for pattern in options.only:
        if not fnmatch.filter([workload.name for workload in every], pattern):
            raise TestbedError(f"no workload is called {pattern}; --list names them")
    return [w for w in every if any(fnmatch.fnmatch(w.name, pattern) for pattern in options.only)]


def print_list(options: argparse.Namespace) -> None:
    one = options.group or options.only
    found = {"": select_workloads(options)} if one else list_groups()
    for group, workloads in found.items():
        if group:
            print(f"\n--{group}: {GROUPS[group]}")
        for workload in workloads:
            print(f"{workload.name:<33}{workload.title}")


def describe_machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "nginx": describe_nginx(),
    }


def run(options: argparse.Namespace) -> int:
    workloads = select_workloads(options)
    if options.list:
        print_list(options)
        return OK
    names = [workload.name for workload in workloads]
    if missing := missing_programs() + missing_relays(names):
        raise TestbedError(f"missing: {', '.join(missing)}; try: make setup-test")
    if options.watch:
        return run_watch(options)
    if options.census:
        return run_census(options)
    if options.adoption:
        return run_adoption(options)
    if options.connecting:
        return run_connecting(options)
    if options.stack:
        return run_stack(options)
    as_table = options.group in TABLES
    load = Load(
        options.seconds or (2.0 if as_table else 3.0), options.connections, options.threads, options.workers
    )
    machine = describe_machine()
    results: list[Result] = []
    splicer: Splicer | None = None
    with Testbed() as bed:
        if not options.baseline:
            command = find_splicer(options.splicer)
            refuse_company(command)
            splicer = Splicer(
                bed, command, ["--mode", options.mode] if options.mode else [], options.programs
            )
        if not options.json:
            print_head(machine, load, options.alternations, as_table)
        for workload in workloads:
            results.append(measure(splicer, workload, bed, load, options.alternations))
            if not options.json:
                print(results[-1].to_line() if as_table else results[-1].to_text(), flush=True)
    failures = [failure for result in results for failure in result.failures(options.check)]
    failures += splicer.failures if splicer else []
    if options.json:
        document = {
            "schema": 1,
            "ok": not failures,
            "machine": machine,
            "load": {**asdict(load), "alternations": options.alternations, "mode": options.mode or "default"},
            "workloads": [result.to_json(options.check) for result in results],
        }
        print(json.dumps(document, indent=2))
    return report_failures(failures)


def print_head(machine: dict[str, Any], load: Load, number: int, as_table: bool) -> None:
    print(
        f"Linux {machine['kernel']}, {machine['cpus']} CPUs, nginx {machine['nginx']}; "
        f"{number} spliced legs of {load.seconds:g} s, a plain one before and after each"
    )
    if as_table:
        print("rr: exchanges/s; streams: Gbit/s; redirected: of the bytes of each spliced leg\n")
        print(TABLE_HEAD, flush=True)


def report_failures(failures: Sequence[str]) -> int:
    for failure in failures:
        print(f"benchmark: {failure}", file=sys.stderr)
    return FAILURE if failures else OK


def run_watch(options: argparse.Namespace) -> int:
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        room = max(options.connections * 2, 1024)
        splicer = Splicer(bed, command, ["--mode=eager", f"--max-connections={room}"], timed=True)
        seconds = options.seconds or 10.0
        found = watching.measure(splicer, bed, options.connections, seconds, cpu_seconds)
    print(watching.report(found, options.json))
    return report_failures(splicer.failures + (found.failures() if options.check else []))


def run_census(options: argparse.Namespace) -> int:
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        splicer = Splicer(bed, command, ["--mode", options.mode] if options.mode else [], timed=False)
        found = census.measure(splicer, bed, options.connections, options.seconds or 10.0)
    print(census.report(found, options.json))
    return report_failures(splicer.failures + (found.failures() if options.check else []))


def run_adoption(options: argparse.Namespace) -> int:
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        splicer = Splicer(bed, command, ["--mode", options.mode] if options.mode else [], timed=False)
        if not options.json:
            print(adopting.HEAD, flush=True)
        rows = []
        for row in adopting.Bench(splicer, bed, cpu_seconds, options.alternations).rows():
            rows.append(row.to_json())
            if not options.json:
                print(row.to_line(), flush=True)
    if options.json:
        print(json.dumps({"schema": 1, "machine": describe_machine(), "adoption": rows}, indent=2))
    return report_failures(splicer.failures)


def run_connecting(options: argparse.Namespace) -> int:
    rounds = options.alternations * connecting.ROUNDS
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        splicer = Splicer(bed, command, ["--mode", options.mode] if options.mode else [], timed=False)
        rows = [connecting.measure(splicer, bed, *row, rounds) for row in connecting.ROWS]
    print(connecting.report(rows, options.json))
    return report_failures(splicer.failures)


def run_stack(options: argparse.Namespace) -> int:
    found = stack.Measured(services.describe(options.python), options.driver, options.seconds or 5.0)
    with Testbed() as bed:
        command = find_splicer(options.splicer)
        refuse_company(command)
        splicer = Splicer(bed, command, ["--mode", options.mode] if options.mode else [], timed=False)
        programs = services.Services(bed, options.connections, options.driver, options.python)
        with programs.running():
            bench = stack.Bench(bed, programs, splicer, busy_seconds, found.seconds)
            bench.measure(found, options.connections, options.alternations, _progress)
    if options.json:
        document = {"schema": 1, "machine": describe_machine(), "stack": found.to_json()}
        print(json.dumps(document, indent=2))
    else:
        print(found.to_text())
    return report_failures(splicer.failures + found.failures())


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    interrupt_on_signals()
    try:
        return run(options)
    except TestbedError as error:
        _progress("")
        print(f"benchmark: {error}", file=sys.stderr)
        return FAILURE
    except Interrupted as signal_name:
        _progress("")
        print(f"benchmark: {signal_name}: cleaned up", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
