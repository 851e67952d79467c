# SPDX-License-Identifier: Apache-2.0
"""nginx as a proxy: since 1.17.5 it reads from its upstream what ioctl(FIONREAD) says, and waits when that is
0."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.daemon import wait_until
from support.host import Host
from support.lab import Lab
from support.nginx import running_nginx
from support.pauses import SLOWNESS

ORIGIN, PROXY = 7701, 7702
SMALL = 200  # bytes
SIZES = (20_000, 70_000, 300_000, 1_000_000)
REQUESTS = 20  # of each size

SERVES = "server {{ listen {address}:{port}; root {root}; }}"
PASSES_ON = """
    upstream origin {{ server {origin}; keepalive 1; }}
    server {{
        listen {address}:{port};
        proxy_buffering {buffering};
        location / {{ proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
"""

# Asks for what it reads from stdin, on one connection.
CLIENT = """
import hashlib, http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=float(sys.argv[3]))
for line in sys.stdin:
    connection.request("GET", line.strip())
    answer = connection.getresponse()
    print(json.dumps([answer.status, hashlib.sha256(answer.read()).hexdigest()]), flush=True)
"""


class Client:
    """Outside of the cgroup, so that only the connection between the two nginx is spliced."""

    def __init__(self, lab: Lab, blobs: dict[int, bytes]) -> None:
        self._hashes = {size: hashlib.sha256(blob).hexdigest() for size, blob in blobs.items()}
        command = [sys.executable, "-I", "-S", "-c", CLIENT, lab.address("a"), str(PROXY), str(10 * SLOWNESS)]
        self.process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{lab.namespace('b')}", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def get(self, size: int) -> None:
        """Ask for a file; all of it must come."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdin.write(f"/{size}\n")
        line = self.process.stdout.readline()
        assert line, f"no answer of {size} bytes: {self.process.stderr.read().splitlines()[-1]}"
        assert json.loads(line) == [200, self._hashes[size]], size


@pytest.mark.parametrize("buffering", ["on", "off"])
def test_answers_through_a_proxy_arrive(host: Host, lab: Lab, tmp_path: Path, buffering: str) -> None:
    """Guaranteed: every answer from 200 bytes to 1 MB arrives whole, on a connection to the upstream that is
    used again and again, and is spliced."""
    assert shutil.which("nginx"), "the program nginx is missing: make setup-test installs it"
    blobs = {size: random.Random(size).randbytes(size) for size in (SMALL, *SIZES)}
    root = tmp_path / "root"
    root.mkdir()
    for size, blob in blobs.items():
        (root / str(size)).write_bytes(blob)
    serves = SERVES.format(address=lab.address("b"), port=ORIGIN, root=root)
    passes_on = PASSES_ON.format(
        origin=f"{lab.address('b')}:{ORIGIN}", address=lab.address("a"), port=PROXY, buffering=buffering
    )

    def find_upstream() -> dict[str, Any] | None:
        flows = [flow for flow in host.daemon.flows() if flow["remote"].endswith(f":{ORIGIN}")]
        return flows[-1] if flows else None

    with ExitStack() as stack:
        stack.enter_context(running_nginx(host, lab, "b", ORIGIN, tmp_path / "origin", serves))
        stack.enter_context(running_nginx(host, lab, "a", PROXY, tmp_path / "proxy", passes_on))
        client = Client(lab, blobs)
        stack.callback(client.stop)

        def is_spliced() -> bool:
            for _ in range(20):
                client.get(SMALL)
            flow = find_upstream()
            return flow is not None and flow["state"] == "spliced"

        wait_until("the connection to the upstream is spliced", is_spliced, timeout=10.0)
        for size in SIZES:
            for _ in range(REQUESTS):
                client.get(size)
        flow = find_upstream()
        assert flow is not None
        assert flow["redirected_messages"] > len(SIZES) * REQUESTS, flow
