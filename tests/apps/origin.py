# SPDX-License-Identifier: Apache-2.0
"""What web clients and proxies are tried with: bodies from 1 byte to 50 MB, an nginx that serves and takes
them, and curl, which asks for all of them on one connection."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.case import Failed, Outcome
from apps.stage import Running, Stage, hash_file

SIZES = (1, 17, 1000, 4096, 65535, 65536, 1_000_000, 5_000_000, 50_000_000)
# So many small requests come first that the connection is hot and spliced when the large bodies follow; fewer
# where load is to last shorter than two seconds.
SMALL_REQUESTS = 3000
PORT, PLAIN_PORT, H2C_PORT, TCP_PORT, TLS_PORT = 8080, 8081, 8082, 8083, 8443

CONFIGURATION = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    default_type application/octet-stream;
    sendfile on;
    client_max_body_size 0;
    keepalive_requests 1000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{servers}
}}
"""

ORIGIN = """
    server {{
        listen {address}:{port};
        location / {{ root {blobs}; }}
        location /up/ {{ root {directory}; dav_methods PUT; create_full_put_path on; }}
    }}
"""


def make_blobs(stage: Stage) -> Path:
    """The directory with a file for each size, named by it; the same bytes each time."""
    directory = stage.shared / "blobs"
    if not directory.exists():
        directory.mkdir(mode=0o755)
        for size in SIZES:
            (directory / str(size)).write_bytes(random.Random(size).randbytes(size))
    return directory


def start_nginx(stage: Stage, name: str, servers: str, host: str, port: int) -> tuple[Running, Path]:
    """Start an nginx with the `server` blocks given; it and its directory. Raises Failed."""
    directory = stage.place(name)
    file = stage.write(f"{name}.conf", CONFIGURATION.format(directory=directory, servers=servers))
    running = stage.start("nginx", "-c", file, "-e", "stderr", "-p", directory, host=host)
    stage.wait_listening(running, port, host)
    return running, directory


@dataclass(frozen=True)
class Origin:
    """An nginx that serves the bodies at / and takes them at /up/."""

    stage: Stage
    host: str
    blobs: Path
    directory: Path

    @classmethod
    def start(cls, stage: Stage, host: str = "b") -> Origin:
        blobs = make_blobs(stage)
        directory = stage.directory / "origin"
        block = ORIGIN.format(address=stage.address(host), port=PORT, blobs=blobs, directory=directory)
        start_nginx(stage, "origin", block, host, PORT)
        return cls(stage, host, blobs, directory)

    @property
    def url(self) -> str:
        return f"http://{self.stage.address(self.host)}:{PORT}"

    def find_wrong_uploads(self, prefix: str, sizes: Sequence[int]) -> list[str]:
        """Those of `sizes` whose upload as /up/`prefix`-size is not there or is not what was sent."""
        wrong = []
        for size in set(sizes):
            path = self.directory / "up" / f"{prefix}-{size}"
            if not path.exists() or hash_file(path) != hash_file(self.blobs / str(size)):
                wrong.append(str(size))
        return wrong


@dataclass(frozen=True)
class Transfer:
    """What curl did in one call."""

    requests: int
    bytes: int
    connections: int
    seconds: float


def fetch(
    origin: Origin,
    url: str,
    *options: str,
    host: str = "b",
    small: int = 0,
    order: Sequence[int] = (),
) -> Transfer:
    """Ask for `small` small bodies, then one of each size, and all of it again; or for the sizes in `order`.

    All on one connection. Raises Failed.
    """
    small = small or int(min(SMALL_REQUESTS, SMALL_REQUESTS * origin.stage.seconds / 2))
    order = order or ([1, 17, 1000] * (small // 3) + list(SIZES)) * 2
    lines = [f'url = "{url}/{size}"\noutput = "-"' for size in order]
    file = origin.stage.write("fetch.curl", "\n".join(lines))
    trace = origin.stage.write("connects", "")
    # Where the bodies go to stdout, the codes and connections go to stderr, which is a file.
    form = "%{stderr}%{http_code} %{num_connects}\\n"
    start = time.monotonic()
    size, checksum = origin.stage.digest(
        *("sh", "-c", 'curl "$@" 2>"$0" || { code=$?; tail -n 3 "$0" >&2; exit $code; }', trace),
        *("--silent", "--show-error", "--fail", "--insecure", "--write-out", form),
        *(*options, "--config", file),
        host=host,
    )
    seconds = round(time.monotonic() - start, 3)
    wanted, right = sum(order), hashlib.sha256()
    bodies = {each: (origin.blobs / str(each)).read_bytes() for each in SIZES}
    for each in order:
        right.update(bodies[each])
    if (size, checksum) != (wanted, right.hexdigest()):
        raise Failed(f"wrong bytes from {url}: {size} instead of {wanted}")
    answers = [line.split() for line in trace.read_text().splitlines()]
    wrong = [line for line in answers if line[0] != "200"]
    if wrong or len(answers) != len(order):
        raise Failed(f"{len(answers)} answers for {len(order)} requests, not 200: {wrong[:3]}")
    return Transfer(len(order), size, sum(int(line[1]) for line in answers), seconds)


def upload(
    origin: Origin,
    url: str,
    prefix: str,
    *options: str,
    host: str = "b",
    small: int = 600,
    order: Sequence[int] = (),
) -> Transfer:
    """Send `small` small bodies, then one of each size, or the sizes in `order`, on one connection.

    Looks at what arrived. Raises Failed.
    """
    order = order or [1, 17, 1000] * (small // 3) + list(SIZES)
    lines = [f'upload-file = "{origin.blobs}/{size}"\nurl = "{url}/up/{prefix}-{size}"' for size in order]
    file = origin.stage.write("upload.curl", "\n".join(lines))
    start = time.monotonic()
    output = origin.stage.call(
        *("curl", "--silent", "--show-error", "--fail", "--insecure"),
        *("--write-out", "%{http_code} %{num_connects}\\n", *options, "--config", file),
        host=host,
    )
    seconds = round(time.monotonic() - start, 3)
    answers = [line.split() for line in output.splitlines()]
    wrong = [line for line in answers if line[0] not in ("201", "204")]
    if wrong or len(answers) != len(order):
        raise Failed(f"{len(answers)} answers for {len(order)} uploads, not 201 or 204: {wrong[:3]}")
    damaged = origin.find_wrong_uploads(prefix, order)
    if damaged:
        raise Failed(f"uploads through {url} did not arrive as they were sent: {', '.join(damaged)}")
    return Transfer(len(order), sum(order), sum(int(line[1]) for line in answers), seconds)


def summarize(transfers: dict[str, Transfer]) -> Outcome:
    """The outcome of transfers that are all right."""
    total = sum(each.bytes for each in transfers.values())
    requests = sum(each.requests for each in transfers.values())
    facts = {name: (each.requests, each.bytes, each.connections) for name, each in transfers.items()}
    measures = {name: each.seconds for name, each in transfers.items()}
    return Outcome(f"{requests} bodies, {total / 1e6:.0f} MB right", facts, {"seconds": measures})
