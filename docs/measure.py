#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes bench-url.html and bench-url.png: `splicer bench --url` on a service with a proxy in front of it.

    docs/measure.py         the same as `sudo make bench-example`; about two minutes on a quiet machine

The service is nginx behind nginx, in network namespaces of its own with a splicer of its own. What the
command prints is what it prints here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from splicer.bench import nginx
from splicer.bench.splicing import Splicer, find_splicer, refuse_company
from splicer.bench.testbed import SERVER_ADDRESS, Testbed, interrupt_on_signals
from splicer.errors import SplicerError

HERE = Path(__file__).resolve().parent
URL = f"http://{SERVER_ADDRESS}:{nginx.PROXY_PORT}/20k"
PAIRS = 7


def measure() -> int:
    """The exit code of the command. Raises SplicerError."""
    command = find_splicer(None)
    refuse_company(command)
    with Testbed() as bed:
        splicer = Splicer(bed, command)
        with splicer.running(), nginx.running(bed, workers=1):
            words = ["bench", "--url", URL, "--pairs", str(PAIRS), "--run-dir", str(splicer.run_dir)]
            words += ["--html", str(HERE / "bench-url.html"), "--png", str(HERE / "bench-url.png")]
            run = bed.start([*command, *words], bed.client, stdout=subprocess.PIPE)
            said, _ = run.communicate()
            sys.stdout.write(said.decode())
            return bed.stop(run)


if __name__ == "__main__":
    interrupt_on_signals()
    try:
        sys.exit(measure())
    except SplicerError as error:
        sys.exit("\n".join(error.lines()))
