# SPDX-License-Identifier: Apache-2.0
"""wrk, curl, and proxies between curl and an nginx: nginx, HAProxy, socat."""

from __future__ import annotations

import re
import time

from apps.case import Case, Failed, Outcome
from apps.origin import (
    H2C_PORT,
    PLAIN_PORT,
    SIZES,
    TCP_PORT,
    TLS_PORT,
    Origin,
    fetch,
    start_nginx,
    summarize,
    upload,
)
from apps.stage import Stage, hash_file

PROXY = """
    upstream origin {{ server {origin}; keepalive 16; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    server {{
        listen {address}:{plain};
        listen {address}:{tls} ssl http2;
        location / {{ proxy_pass http://origin; }}
        location /unbuffered/ {{
            proxy_pass http://origin/; proxy_buffering off; proxy_request_buffering off;
        }}
    }}
    server {{
        listen {address}:{h2c} http2;
        location / {{ proxy_pass http://origin; }}
    }}
"""

HAPROXY = """
global
    maxconn 200
defaults
    mode http
    timeout connect 5s
    timeout client 8s
    timeout server 8s
    {options}
frontend clients
    bind {address}:{port}
    default_backend origins
frontend clients-of-tcp
    mode tcp
    bind {address}:{tcp}
    default_backend origins-of-tcp
backend origins
    http-reuse always
    server origin {origin}
backend origins-of-tcp
    mode tcp
    server origin {origin}
"""


def _run_wrk(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    seconds = f"-d{max(1, round(stage.seconds))}"
    said = [
        stage.call(
            "wrk", "-t1", f"-c{connections}", seconds, "--timeout", "5s", f"{origin.url}/{size}", host="a"
        )
        for connections, size in ((16, 17), (8, 65536))
    ]
    errors = [
        line.strip() for text in said for line in text.splitlines() if "errors" in line or "Non-2xx" in line
    ]
    requests = sum(int(count) for text in said for count in re.findall(r"(\d+) requests in", text))
    return Outcome(
        f"{len(errors)} errors", {"errors": errors, "answered": requests > 0}, {"requests": requests}
    )


def _run_curl(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    done = {
        "download": fetch(origin, origin.url, host="a"),
        "download 4": fetch(origin, origin.url, "--limit-rate", "40M", host="a", small=300),
        "upload": upload(origin, origin.url, "sized", host="a"),
        "upload chunked": upload(origin, origin.url, "chunked", "-H", "Transfer-Encoding: chunked", host="a"),
    }
    # Several connections at a time, each with some of the bodies.
    place = stage.place("parallel")
    lines = [
        f'url = "{origin.url}/{size}"\noutput = "{place}/{n}-{size}"' for n in range(12) for size in SIZES[:8]
    ]
    file = stage.write("parallel.curl", "\n".join(lines))
    stage.call("curl", "--silent", "--fail", "-Z", "--parallel-max", "6", "--config", file, host="a")
    wrong = [
        path.name
        for path in place.iterdir()
        if hash_file(path) != hash_file(origin.blobs / path.name.partition("-")[2])
    ]
    if wrong:
        raise Failed(f"wrong bytes in parallel: {', '.join(wrong)}")
    return summarize(done)


def _start_proxy(stage: Stage, origin: Origin) -> str:
    """An nginx on host a that passes everything on; its address."""
    key, certificate = stage.directory / "key.pem", stage.directory / "certificate.pem"
    stage.call(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", key, "-out", certificate, "-subj", "/CN=apps", "-days", "2"),
    )
    address = stage.address("a")
    servers = PROXY.format(
        origin=origin.url.removeprefix("http://"),
        certificate=certificate,
        key=key,
        address=address,
        plain=PLAIN_PORT,
        tls=TLS_PORT,
        h2c=H2C_PORT,
    )
    start_nginx(stage, "proxy", servers, "a", PLAIN_PORT)
    return address


def _run_nginx(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    url = f"http://{_start_proxy(stage, origin)}:{PLAIN_PORT}"
    return summarize(
        {
            "download": fetch(origin, url),
            "download unbuffered": fetch(origin, f"{url}/unbuffered", small=900),
            "upload": upload(origin, url, "buffered"),
            "upload unbuffered": upload(origin, f"{url}/unbuffered", "unbuffered"),
        }
    )


def _run_nginx_http2(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    address = _start_proxy(stage, origin)
    tls, clear = f"https://{address}:{TLS_PORT}", f"http://{address}:{H2C_PORT}"
    done = {
        "download tls": fetch(origin, tls, "--http2", small=900),
        "upload tls": upload(origin, tls, "tls", "--http2", small=150),
    }
    # curl 7.88, which Debian 12 has, cannot use such a connection twice.
    prior = "--http2-prior-knowledge"
    for size in SIZES:
        done[f"download clear {size}"] = fetch(origin, clear, prior, order=[size])
        done[f"upload clear {size}"] = upload(origin, clear, "clear", prior, order=[size])
    outcome = summarize(done)
    # Many streams on each connection.
    for url, size, number in (
        (tls, 1000, 4000),
        (clear, 1000, 4000),
        (tls, 1_000_000, 40),
        (clear, 65536, 600),
    ):
        start = time.monotonic()
        said = stage.call("h2load", "-n", str(number), "-c4", "-m8", f"{url}/{size}")
        counts = re.findall(r"^requests: .*|\(\d+\) data$", said, re.MULTILINE)
        if f"{number} succeeded" not in said or not counts[-1].startswith(f"({number * size})"):
            raise Failed(f"h2load {url}/{size}: {' '.join(counts)}")
        outcome.facts[f"h2load {url} {size}"] = counts
        outcome.measures["seconds"][f"h2load {url} {size}"] = round(time.monotonic() - start, 3)
    return outcome


def _start_haproxy(stage: Stage, origin: Origin, *options: str) -> tuple[str, str]:
    """HAProxy on host a; where its frontends for HTTP and for plain TCP are."""
    address = stage.address("a")
    text = HAPROXY.format(
        address=address,
        port=PLAIN_PORT,
        tcp=TCP_PORT,
        origin=origin.url.removeprefix("http://"),
        options="\n    ".join(options),
    )
    running = stage.start("haproxy", "-db", "-f", stage.write("haproxy.cfg", text))
    stage.wait_listening(running, PLAIN_PORT)
    return f"http://{address}:{PLAIN_PORT}", f"http://{address}:{TCP_PORT}"


def _pass_through(origin: Origin, http: str, tcp: str) -> Outcome:
    return summarize(
        {
            "download http": fetch(origin, http),
            "upload http": upload(origin, http, "http"),
            "download tcp": fetch(origin, tcp),
            "upload tcp": upload(origin, tcp, "tcp"),
        }
    )


def _run_haproxy(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    return _pass_through(origin, *_start_haproxy(stage, origin))


def _run_haproxy_splice_auto(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    return _pass_through(origin, *_start_haproxy(stage, origin, "option splice-auto"))


def _run_haproxy_splice(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    http, tcp = _start_haproxy(stage, origin, "option splice-request", "option splice-response")
    # The first body is large enough to be read by splice(2) while the connection is cold.
    fetch(origin, http, order=[SIZES[-1]])
    return _pass_through(origin, http, tcp)


def _run_haproxy_splice_late(stage: Stage) -> Outcome:
    origin = Origin.start(stage)
    http, _ = _start_haproxy(stage, origin, "option splice-response")
    return summarize({"download": fetch(origin, http)})


def _run_socat(stage: Stage, nonblock: str = "") -> Outcome:
    origin = Origin.start(stage)
    address = stage.address("a")
    running = stage.start(
        "socat",
        f"TCP4-LISTEN:{PLAIN_PORT},bind={address},reuseaddr,fork,nodelay{nonblock}",
        f"TCP4:{origin.url.removeprefix('http://')},nodelay{nonblock}",
    )
    stage.wait_listening(running, PLAIN_PORT)
    url = f"http://{address}:{PLAIN_PORT}"
    return summarize(
        {"download": fetch(origin, url, small=900), "upload": upload(origin, url, "through", small=90)}
    )


def _run_socat_nonblock(stage: Stage) -> Outcome:
    return _run_socat(stage, ",nonblock")


CASES = (
    Case("wrk", _run_wrk, ("nginx", "wrk")),
    Case("curl", _run_curl, ("nginx", "curl")),
    Case("nginx-http1", _run_nginx, ("nginx", "curl", "openssl")),
    Case("nginx-http2", _run_nginx_http2, ("nginx", "curl", "openssl", "h2load")),
    Case("haproxy-default", _run_haproxy, ("nginx", "haproxy", "curl")),
    Case(
        "haproxy-splice-auto",
        _run_haproxy_splice_auto,
        ("nginx", "haproxy", "curl"),
        redirects=None,
        remark="`option splice-auto`: HAProxy reads by splice(2) what looks like a stream to it",
    ),
    Case(
        "haproxy-splice",
        _run_haproxy_splice,
        ("nginx", "haproxy", "curl"),
        redirects=None,
        reasons=frozenset({"splice_reader"}),
        remark="`option splice-response`: HAProxy reads bodies by splice(2)",
    ),
    Case(
        "haproxy-splice-late",
        _run_haproxy_splice_late,
        ("nginx", "haproxy", "curl"),
        redirects=None,
        remark="the first splice(2) comes when the connection is spliced already, by chance",
        known="HAProxy with `option splice-request` or `splice-response`",
    ),
    Case(
        "socat-blocking",
        _run_socat,
        ("nginx", "socat", "curl"),
        redirects=None,
        remark="socat's sockets block, and it waits in poll or select before it reads",
    ),
    Case("socat-nonblock", _run_socat_nonblock, ("nginx", "socat", "curl")),
)
