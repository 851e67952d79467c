# SPDX-License-Identifier: Apache-2.0
"""The command line of the soak.

Exit codes: 0 all promises were kept, 1 not, 2 usage, 4 not on this machine, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from pathlib import Path

from support.leftovers import remove_orphans
from support.requirements import name_missing

from soak.chaos import KINDS, USUAL, WITHHELD
from soak.findings import Options
from soak.plans import PATTERNS, READS
from soak.report import judge, to_json, to_text
from soak.soak import Interrupted, Soak

OK, FAILURE, USAGE, UNSUPPORTED, INTERRUPTED = 0, 1, 2, 4, 130


def main() -> int:
    options, as_json, log = _read_arguments()
    missing = name_missing()
    if missing:
        print(f"soak: this machine lacks: {', '.join(missing)}", file=sys.stderr)
        return UNSUPPORTED
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    remove_orphans(Path(tempfile.gettempdir()))
    print(f"soak: seed {options.seed}", file=sys.stderr, flush=True)
    text = ""
    soak = Soak(options)
    try:
        with soak:
            findings = soak.run()
            _ignore_signals()  # cleaning up is not to be interrupted
            if soak.host.has_run:
                text = soak.host.daemon.log.read_text(errors="replace")
    except Interrupted:
        return INTERRUPTED
    promises = judge(findings)
    document = to_json(findings, promises)
    if log is not None:
        log.write_text(text)
    print(json.dumps(document, indent=1) if as_json else to_text(document))
    if findings.interrupted:
        return INTERRUPTED
    return OK if document["ok"] else FAILURE


def _read_arguments() -> tuple[Options, bool, Path | None]:
    parser = argparse.ArgumentParser(
        prog="make soak",
        description="Connections that check themselves, with and without splicer, while things go wrong.",
        epilog="All that is random comes from the seed; what the scheduler makes of it does not.",
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=300, help="open at once (default: %(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="network namespaces (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--patterns", default="", help=f"only these, with commas: {', '.join(PATTERNS)}")
    parser.add_argument("--reads", default="", help=f"only these: {', '.join(READS)}")
    withheld = f"{', '.join(WITHHELD)} only if named here"
    parser.add_argument(
        "--chaos", default="", help=f"only these events: none, usual, or of {', '.join(KINDS)}; {withheld}"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--daemon-log", type=Path, metavar="FILE", help="keep what splicer wrote")
    parser.add_argument("--verbose", action="store_true", help="every event, as it happens")
    given = parser.parse_args()
    patterns = tuple(filter(None, given.patterns.split(",")))
    named = filter(None, given.chaos.split(","))
    kinds = tuple(kind for each in named for kind in (USUAL if each == "usual" else (each,)))
    reads = tuple(filter(None, given.reads.split(",")))
    unknown = (
        (set(patterns) - set(PATTERNS)) | (set(reads) - set(READS)) | (set(kinds) - set(KINDS) - {"none"})
    )
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if given.hosts < 2 or given.connections < given.hosts or given.minutes <= 0:
        parser.error("at least two hosts, a connection for each, and some time")
    options = Options(
        seed=random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed,
        seconds=given.minutes * 60,
        connections=given.connections,
        hosts=given.hosts,
        patterns=patterns,
        reads=reads,
        kinds=kinds,
        verbose=given.verbose,
    )
    return options, given.json, given.daemon_log


def _interrupt(number: int, frame: object) -> None:
    _ignore_signals()
    raise Interrupted


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
