# SPDX-License-Identifier: Apache-2.0
"""The command line of the runner."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.leftovers import remove_orphans
from support.requirements import name_missing

from apps.case import Case
from apps.catalogue import CASES, find_cases
from apps.disturb import tabulate as tabulate_reports
from apps.disturb import try_subject
from apps.report import tabulate, to_json
from apps.stage import Network
from apps.subjects import SUBJECTS
from apps.trial import NOT_INSTALLED, Trial, Tryout

FAILURE, USAGE, UNSUPPORTED, INTERRUPTED = 1, 2, 4, 130

EPILOG = """\
exit codes:
  0 every program that ran had the same outcome plain and spliced, and was
  spliced where it should be (with --all: and all are installed); 1 not so,
  2 usage, 4 this machine cannot run splicer, 130 interrupted
"""


def main() -> int:
    options = _parse()
    if options.list:
        for case in SUBJECTS if options.disturb else CASES:
            missing = case.name_missing()
            print(f"{case.name:28}not installed: {', '.join(missing)}" if missing else case.name)
        return 0
    if options.disturb:
        return _disturb(options)
    found = {each: find_cases(each) for each in options.only}
    wanted = {case.name for cases in found.values() for case in cases}
    cases = [case for case in CASES if not options.only or case.name in wanted]
    unknown = [each for each, cases in found.items() if not cases]
    if unknown:
        return _complain(USAGE, f"no such program ({', '.join(unknown)})", "tests/apps/run --list")
    missing = name_missing()
    if missing:
        return _complain(UNSUPPORTED, f"missing: {', '.join(missing)}", "sudo scripts/setup.sh apps")
    signal.signal(signal.SIGTERM, _interrupt)
    start = time.monotonic()
    trials = _try(cases, options)
    if options.json:
        print(json.dumps(to_json(trials, time.monotonic() - start), indent=2))
    else:
        print(tabulate(trials))
    accepted = [trial.agrees or (trial.verdict == NOT_INSTALLED and not options.all) for trial in trials]
    return 0 if all(accepted) else FAILURE


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/apps/run",
        description="Run real programs over plain TCP, then with splicer attached to a cgroup of their own,"
        " and compare the outcomes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a program, or a group of them; may be repeated",
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="how long load lasts, where it is timed (default: 4)"
    )
    parser.add_argument("--all", action="store_true", help="a program that is not installed is a failure")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--disturb",
        action="store_true",
        help="instead: disturb programs that wait for bytes, plain and spliced with --blocking=allow; prints"
        " the table of KNOWN_ISSUES.md",
    )
    parser.add_argument("--list", action="store_true", help="the names, and what is not installed")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION",
        help="for splicer run, such as --set=--mode=eager",
    )
    return parser.parse_args()


def _try(cases: list[Case], options: argparse.Namespace) -> list[Trial]:
    trials = []
    with _prepared() as (network, directory):
        tryout = Tryout(network, directory, options.seconds, tuple(options.set))
        for case in cases:
            trials.append(tryout.try_case(case))
            _tell(trials[-1])
    return trials


def _disturb(options: argparse.Namespace) -> int:
    names = {subject.name for subject in SUBJECTS}
    if unknown := set(options.only) - names:
        return _complain(USAGE, f"no such program ({', '.join(unknown)})", "tests/apps/run --disturb --list")
    if missing := name_missing():
        return _complain(UNSUPPORTED, f"missing: {', '.join(missing)}", "sudo scripts/setup.sh apps")
    signal.signal(signal.SIGTERM, _interrupt)
    reports = []
    with _prepared() as (network, directory):
        shared = directory / "shared"
        shared.mkdir(mode=0o755)
        for subject in SUBJECTS:
            if not options.only or subject.name in options.only:
                report = try_subject(subject, network, directory / "run", shared, tuple(options.set))
                reports.append(report)
                print(f"{subject.name}: {report.summary}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"schema": 1, "programs": [each.to_json() for each in reports]}, indent=2))
    else:
        print(tabulate_reports(reports))
    accepted = [each.complete or (each.missing and not options.all) for each in reports]
    return 0 if all(accepted) else FAILURE


@contextlib.contextmanager
def _prepared() -> Iterator[tuple[Network, Path]]:
    """A network, and a directory for files that programs that run as nobody can go through."""
    remove_orphans(Path(tempfile.gettempdir()))
    directory = Path(tempfile.mkdtemp(prefix=f"splicer-test-{os.getpid()}-apps-"))
    directory.chmod(0o711)
    try:
        network = Network()
        try:
            yield network, directory
        finally:
            network.remove()
    finally:
        shutil.rmtree(directory)


def _tell(trial: Trial) -> None:
    """Progress goes to stderr, where the data is not."""
    times = [f"{run.seconds:.1f} s" for run in (trial.plain, trial.spliced) if run]
    print(f"{trial.case.name}: {trial.verdict} {' + '.join(times)}".rstrip(), file=sys.stderr, flush=True)


def _complain(code: int, what: str, hint: str) -> int:
    print(f"tests/apps/run: {what}\nhint: {hint}", file=sys.stderr)
    return code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
