# SPDX-License-Identifier: Apache-2.0
"""An nginx whose sockets are below the attached cgroup."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.daemon import wait_until
from support.host import Host
from support.lab import Lab

START_TIMEOUT = 10.0  # seconds
CONFIGURATION = """
user root;
daemon off;
worker_processes 1;
pid {place}/pid;
error_log stderr warn;
events {{ worker_connections 256; }}
http {{
    access_log off;
    keepalive_requests 1000000;
    client_body_temp_path {place}/body;
    proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi;
    scgi_temp_path {place}/scgi;
    {servers}
}}
"""


@contextmanager
def running_nginx(host: Host, lab: Lab, where: str, port: int, place: Path, servers: str) -> Iterator[None]:
    """With these blocks of configuration, on a host of the lab, until the block is left; it listens on the
    port. `place` is made for it."""
    place.mkdir()
    file = place / "nginx.conf"
    file.write_text(CONFIGURATION.format(place=place, servers=servers))
    command = ["nginx", "-c", str(file), "-e", "stderr", "-p", f"{place}/"]
    listening = ["nsenter", f"--net=/run/netns/{lab.namespace(where)}", "ss", "-Hltn", f"sport = :{port}"]
    # SIGKILL would leave its worker behind.
    with host.running(lab, where, command, end_by=signal.SIGTERM) as process:

        def is_up() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return bool(subprocess.run(listening, capture_output=True, text=True, check=True).stdout)

        wait_until(f"nginx listens on port {port}", is_up, timeout=START_TIMEOUT)
        yield
