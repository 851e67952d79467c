# SPDX-License-Identifier: Apache-2.0
"""What is measured with --relays: wrk on nginx through programs that splicer may leave plain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from splicer.bench import nginx
from splicer.bench.model import Expected, Load, Metric, Sample
from splicer.bench.nginx import LOOPBACK, ORIGIN_PORT
from splicer.bench.testbed import Testbed
from splicer.bench.workloads import run_wrk
from splicer.bench.wrk import COST, P50, RATE

RELAY_PORT = 8082

LIGHTTPD = """\
server.modules = ("mod_proxy")
server.document-root = "{directory}"
server.bind = "127.0.0.1"
server.port = {port}
server.max-keep-alive-requests = 60000
server.stream-response-body = 2
proxy.server = ("" => (("host" => "127.0.0.1", "port" => {origin})))
"""


def _write_lighttpd(directory: Path) -> list[str]:
    path = directory / "lighttpd.conf"
    path.write_text(LIGHTTPD.format(directory=directory, port=RELAY_PORT, origin=ORIGIN_PORT))
    return ["lighttpd", "-D", "-f", str(path)]


def _write_varnish(directory: Path) -> list[str]:
    # Everything is in its cache after the first request: it writes large bodies, and reads requests.
    where = directory / "varnish"
    return [
        "varnishd",
        "-F",
        "-n",
        str(where),
        "-a",
        f"{LOOPBACK}:{RELAY_PORT}",
        "-b",
        f"{LOOPBACK}:{ORIGIN_PORT}",
    ]


def _write_socat(directory: Path) -> list[str]:
    return [
        "socat",
        f"TCP-LISTEN:{RELAY_PORT},bind={LOOPBACK},fork,reuseaddr,backlog=64",
        f"TCP:{LOOPBACK}:{ORIGIN_PORT}",
    ]


COMMANDS = {"varnish": _write_varnish, "lighttpd": _write_lighttpd, "socat": _write_socat}
PROGRAMS = {"varnish": "varnishd", "lighttpd": "lighttpd", "socat": "socat"}


@dataclass(frozen=True)
class Relay:
    """wrk on nginx through another program, all over loopback, 1 MB bodies."""

    relay: str
    metrics: tuple[Metric, ...] = (RATE, P50, COST)
    expected: Expected = "either"
    daemon_options: tuple[str, ...] = ()
    always_redirects: bool = False
    unit: str = "request"

    @property
    def programs(self) -> tuple[str, ...]:
        return ("ip", "nginx", "wrk", PROGRAMS[self.relay])

    @property
    def name(self) -> str:
        return f"{self.relay}-1m"

    @property
    def title(self) -> str:
        return f"{self.relay} in front of nginx on loopback, 1 MB bodies"

    def measure(self, bed: Testbed, load: Load) -> Sample:
        log = bed.directory / f"{self.relay}.log"
        with nginx.running(bed, load.workers), log.open("wb") as said:
            relay = bed.start(COMMANDS[self.relay](bed.directory), bed.server, stderr=said)
            try:
                nginx.await_listener(bed.server, RELAY_PORT, self.relay, relay, log)
                return run_wrk(bed, load, bed.server, f"http://{LOOPBACK}:{RELAY_PORT}/1m")
            finally:
                bed.stop(relay)


RELAY_WORKLOADS = tuple(Relay(name) for name in COMMANDS)
