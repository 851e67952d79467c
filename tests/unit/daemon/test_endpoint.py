# SPDX-License-Identifier: Apache-2.0
"""The pages over HTTP, and those who are slow or rude."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import wait_until

from splicer.daemon import scrapers
from splicer.daemon.endpoint import Endpoint, Source
from splicer.daemon.scrapers import SCRAPERS_AT_ONCE
from splicer.errors import FAILURE, SplicerError
from splicer.logs import configure

LOG = configure("json")


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(path))
    return sock


def ask(path: Path, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[int, str]:
    """Status and body."""
    with connect(path) as sock:
        sock.sendall(request.encode())
        answer = sock.makefile("rb").read().decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def get(path: Path, page: str, **more: str) -> tuple[int, str]:
    lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
    return ask(path, f"GET {page} HTTP/1.1\r\nHost: x\r\n{lines}\r\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.sock"


@pytest.fixture
def served(path: Path) -> Iterator[Endpoint]:
    with Endpoint(str(path), LOG) as made:
        yield made


def count_served() -> int:
    """How many have a thread now."""
    return sum(thread.name == "metrics-peer" for thread in threading.enumerate())


def is_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:  # nobody had come to it yet
        return True


def source(trouble: str = "", hindrance: str = "") -> Source:
    return Source(
        lambda accept: ("text/plain", f"accept {accept}\n".encode()), lambda: trouble, lambda: hindrance
    )


def test_off() -> None:
    with Endpoint("off", LOG) as made:
        assert not made.is_on


def test_pages(served: Endpoint, path: Path) -> None:
    for page in ("/metrics", "/healthz", "/readyz"):
        assert get(path, page) == (503, "starting, or stopping\n")
    with served.serving(source()):
        assert get(path, "/metrics", Accept="text/x") == (200, "accept text/x\n")
        assert get(path, "/metrics?name=x")[0] == 200
        assert get(path, "/healthz") == get(path, "/readyz") == (200, "ok\n")
        assert get(path, "/")[0] == 404
        assert ask(path, "HEAD /metrics HTTP/1.1\r\n\r\n") == (200, "")
        assert ask(path, "POST /metrics HTTP/1.1\r\n\r\n")[0] == 501
    with served.serving(source("the loop does not turn")):
        assert get(path, "/healthz") == get(path, "/readyz") == (503, "the loop does not turn\n")
        assert get(path, "/metrics")[0] == 200
    with served.serving(source(hindrance="stopping")):
        assert get(path, "/readyz") == (503, "stopping\n")
        assert get(path, "/healthz")[0] == 200


def test_a_mistake_in_a_number_is_an_answer(served: Endpoint, path: Path) -> None:
    def fail(_: str) -> tuple[str, bytes]:
        raise ZeroDivisionError

    with served.serving(Source(fail, str, str)):
        assert get(path, "/metrics")[0] == 500
        assert get(path, "/healthz")[0] == 200


def test_nobody_asks_after_the_end(served: Endpoint, path: Path) -> None:
    """Leaving waits for the scrape that is under way: what it reads is there until then."""
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def render(_: str) -> tuple[str, bytes]:
        begun.set()
        assert go.wait(20)
        ended.set()
        return "text/plain", b"late\n"

    found: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: found.append(get(path, "/metrics")))
    with served.serving(Source(render, str, str)):
        thread.start()
        assert begun.wait(20)
        threading.Timer(0.05, go.set).start()
    assert ended.is_set()
    thread.join(20)
    assert found == [(200, "late\n")]
    assert get(path, "/metrics")[0] == 503


def test_rude_ones(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are served at once say nothing, or half of it; one asks for much and reads nothing. They are
    cut off, and whoever comes after them has an answer."""
    monkeypatch.setattr(scrapers, "_EXCHANGE_S", 0.5)
    big = Source(lambda _: ("text/plain", bytes(32 << 20)), str, str)
    with contextlib.ExitStack() as opened, Endpoint(str(path), LOG) as served, served.serving(big):
        for number in range(3 * SCRAPERS_AT_ONCE):
            rude = opened.enter_context(connect(path))
            rude.sendall((b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n")[number % 3])
        assert count_served() <= SCRAPERS_AT_ONCE
        assert get(path, "/healthz") == (200, "ok\n")
        wait_until("all are cut off", lambda: not count_served())


def test_who_sends_byte_by_byte_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit for each read would never be reached."""
    monkeypatch.setattr(scrapers, "_EXCHANGE_S", 0.5)
    with Endpoint(str(path), LOG), connect(path) as slow:
        slow.settimeout(0.02)

        def is_cut_off() -> bool:
            try:
                slow.send(b"G")
                return slow.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_until("it is cut off", is_cut_off, pause=0.05)


def test_the_end_does_not_wait_for_anybody(path: Path) -> None:
    with contextlib.ExitStack() as opened:
        with Endpoint(str(path), LOG):
            idle = [opened.enter_context(connect(path)) for _ in range(2 * SCRAPERS_AT_ONCE)]
        assert all(map(is_hung_up, idle))
    assert not path.exists()


def test_socket_file(path: Path) -> None:
    """What somebody left is replaced; what is in use, or no socket, is not. Only our own is removed."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Endpoint(str(path), LOG):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with pytest.raises(SplicerError, match="another process listens on the metrics socket"):
            Endpoint(str(path), LOG).__enter__()
        path.rename(path.with_name("moved"))
        path.write_text("another's")
    assert path.read_text() == "another's"
    with pytest.raises(SplicerError, match="a file is in the place of the metrics socket"):
        Endpoint(str(path), LOG).__enter__()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SplicerError, match="cannot serve metrics there") as raised:
        Endpoint(str(tmp_path / "none" / "metrics.sock"), LOG).__enter__()
    assert raised.value.exit_code == FAILURE and "ls -ld" in (raised.value.hint or "")


def test_an_address_in_use() -> None:
    port = find_port()
    with Endpoint(f"127.0.0.1:{port}", LOG):
        with pytest.raises(SplicerError, match=f"127.0.0.1:{port}: Address already in use") as raised:
            Endpoint(f"127.0.0.1:{port}", LOG).__enter__()
    assert raised.value.exit_code == FAILURE and "--metrics" in (raised.value.hint or "")
    with Endpoint(f"127.0.0.1:{port}", LOG):
        pass  # at once, also while connections of before are in TIME_WAIT


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")
def test_ipv6() -> None:
    port = find_port()
    with Endpoint(f"[::1]:{port}", LOG), socket.create_connection(("::1", port), timeout=20) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b"503" in sock.makefile("rb").readline()


def test_a_server_is_loaded_only_when_there_is_one() -> None:
    """What it imports takes 2 MB of every daemon else."""
    source = "import sys, splicer.daemon.loop; sys.exit('http.server' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
