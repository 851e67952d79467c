# SPDX-License-Identifier: Apache-2.0
"""An nginx for the length of a leg: an origin, and a proxy in front of it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splicer.bench.testbed import Namespace, Testbed, TestbedError

ORIGIN_PORT = 8080
PROXY_PORT = 8081
LOOPBACK = "127.0.0.1"
SMALL_BODY = "0123456789abcdef" * 4
FOR_EVER = 1_000_000_000
BODIES = {"100b": 100, "20k": 20_000, "300k": 300_000, "1m": 1_000_000}

CONF = """\
daemon off;
user root;
worker_processes {workers};
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    open_file_cache max=16 inactive=1h;
    open_file_cache_valid 1h;
    keepalive_requests {requests};
    keepalive_timeout 1h;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    proxy_max_temp_file_size 0;
    server {{
        listen {origin} backlog=4096;
        root files;
        location = /small {{ default_type text/plain; return 200 "{small}"; }}
    }}
    upstream origin {{
        server 127.0.0.1:{origin};
        keepalive 64;
        keepalive_requests {requests};
    }}
    server {{
        listen {proxy} backlog=4096;
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


@contextlib.contextmanager
def running(
    bed: Testbed,
    workers: int,
    *,
    requests: int = FOR_EVER,
    watched: bool = True,
    cpu: int | None = None,
) -> Iterator[None]:
    """In the server's namespace. A connection ends after so many `requests`; if it is not `watched`, nginx is
    outside the cgroup that splicer looks at."""
    prefix = bed.directory / "nginx"
    files = prefix / "files"
    if not files.exists():
        files.mkdir(parents=True)
        for name, size in BODIES.items():
            (files / name).write_bytes(b"x" * size)
    settings: dict[str, Any] = {"origin": ORIGIN_PORT, "proxy": PROXY_PORT, "small": SMALL_BODY}
    (prefix / "nginx.conf").write_text(CONF.format(workers=workers, requests=requests, **settings))
    command = ["nginx", "-p", f"{prefix}/", "-c", "nginx.conf", "-e", "stderr"]
    with (prefix / "log").open("wb") as log:
        nginx = bed.start(command, bed.server, stderr=log, cpu=cpu, watched=watched)
    try:
        await_listener(bed.server, PROXY_PORT, "nginx", nginx, prefix / "log")
        yield
    finally:
        bed.stop(nginx)


def await_listener(
    namespace: Namespace,
    port: int,
    name: str,
    program: subprocess.Popen[bytes],
    log: Path | None = None,
    address: str = LOOPBACK,
) -> None:
    """Raises TestbedError if the program ends before it listens, or takes 10 s."""
    deadline = time.monotonic() + 10
    while not _listens(namespace, port, address):
        if program.poll() is not None or time.monotonic() > deadline:
            said = f": {log.read_text().strip()}" if log else ""
            raise TestbedError(f"{name} does not start{said}")
        time.sleep(0.01)


def _listens(namespace: Namespace, port: int, address: str) -> bool:
    with namespace.entered(), socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0
