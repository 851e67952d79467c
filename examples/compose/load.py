# SPDX-License-Identifier: Apache-2.0
"""The demonstration's load: `splicer bench --url` on two services, through the sidecar's control socket.

Only the two services are kept plain for the plain legs. What else runs on the host stays spliced.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence

# Every connection of the demonstration has one of these at its server end.
SERVICES = ("web", "proxy")
TARGETS = {"web": "http://web:8080/", "proxy, web": "http://proxy:8080/"}
PATIENCE = 30.0  # seconds


def wait_for_sidecar(service: str) -> None:
    """It hears of containers a moment after they have started."""
    deadline = time.monotonic() + PATIENCE
    while True:
        command = [sys.executable, "-m", "splicer", "policy", service]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return
        if time.monotonic() > deadline:
            sys.exit(done.stderr.strip())
        time.sleep(0.2)


def wait_for_service(url: str) -> None:
    """Names resolve and servers listen a moment after the containers start."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{url} does not answer: {error}")
        time.sleep(0.2)


def measure(url: str, options: argparse.Namespace) -> tuple[int, str]:
    """Exit code and JSON of `splicer bench`; its table goes where ours does."""
    command = [sys.executable, "-m", "splicer", "bench", "--url", url]
    command += [word for service in SERVICES for word in ("--container", service)]
    for name in ("pairs", "seconds", "connections"):
        command += [f"--{name}", str(getattr(options, name))]
    if not options.json:
        return subprocess.run(command, check=False).returncode, ""
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


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
        help="all results as one line of JSON, and nothing else",
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    for service in SERVICES:
        wait_for_sidecar(service)
    results: dict[str, object] = {}
    worst = 0
    for name, url in TARGETS.items():
        wait_for_service(url)
        code, text = measure(url, options)
        if text:
            results[name] = json.loads(text)
        worst = max(worst, code)
    if options.json:
        print(json.dumps(results), flush=True)
    else:
        print("docker compose --profile demo down  ends the demonstration")
    return worst


if __name__ == "__main__":
    sys.exit(main())
