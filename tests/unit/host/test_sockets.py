# SPDX-License-Identifier: Apache-2.0
"""TCP sockets by address and by process: those of this process, found as anybody's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from splicer.host import sockets
from splicer.host.namespaces import Directory
from splicer.host.sockets import Endpoint


class Here(Directory):
    """Knows the namespace of this process alone: others take root."""

    def walk(self) -> Iterator[str]:
        yield "/proc/self/ns/net"


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.0.0.1:80", Endpoint("10.0.0.1", 80)),
        ("[::1]:80", Endpoint("::1", 80)),
        ("::1:80", Endpoint("::1", 80)),
        ("[::ffff:10.0.0.1]:80", Endpoint("10.0.0.1", 80)),
        ("[fd00:0::1]:65535", Endpoint("fd00::1", 65535)),
    ],
)
def test_endpoints(text: str, endpoint: Endpoint) -> None:
    assert sockets.read_endpoint(text) == endpoint
    assert sockets.read_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text", ["", ":", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "web:80", "1:²"]
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError):
        sockets.read_endpoint(text)


Connected = tuple[socket.socket, socket.socket]
FAMILIES = {
    "ipv4": ("127.0.0.1", socket.AF_INET),
    "ipv6": ("::1", socket.AF_INET6),
    "mapped": ("::ffff:127.0.0.1", socket.AF_INET6),
}


@pytest.fixture(params=FAMILIES)
def connected(request: pytest.FixtureRequest) -> Iterator[Connected]:
    address, family = FAMILIES[request.param]
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        listener.listen()
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
        with server:
            yield client, server


def endpoints(sock: socket.socket) -> tuple[Endpoint, Endpoint]:
    ends = []
    for address in (sock.getsockname(), sock.getpeername()):
        ends.append(sockets.read_endpoint(f"[{address[0]}]:{address[1]}"))
    return ends[0], ends[1]


def can_enter() -> bool:
    try:
        with sockets.entered("/proc/self/ns/net"):
            return True
    except OSError:
        return False


needs_root = pytest.mark.skipif(not can_enter(), reason="namespaces can be entered by root only")


@needs_root
def test_found_by_address(connected: Connected) -> None:
    """Each end by its own two addresses, and nobody by others; a listener on that port is none."""
    wanted = [endpoints(sock) for sock in connected]
    told = sockets.find(wanted, Here())
    for sock in connected:
        [found] = told[endpoints(sock)]
        assert (found.local, found.remote) == endpoints(sock)
        assert (found.state, found.inode) == ("ESTABLISHED", os.fstat(sock.fileno()).st_ino)
    local, remote = endpoints(connected[0])
    nobody, listener = (Endpoint(local.address, 1), remote), (remote, Endpoint(local.address, 1))
    assert sockets.find([nobody, listener], Here()) == {nobody: [], listener: []}
    assert sockets.can_find()


@needs_root
def test_found_by_process(connected: Connected) -> None:
    found = {each.inode: each for each in sockets.list_of_process(os.getpid())}
    for sock in connected:
        each = found[os.fstat(sock.fileno()).st_ino]
        assert (each.local, each.remote) == endpoints(sock)
    assert not [each for each in found.values() if each.state == "LISTEN"]


def test_the_owner(connected: Connected) -> None:
    assert sockets.find_owner(os.fstat(connected[0].fileno()).st_ino) == os.getpid()
    assert sockets.find_owner(0) == 0


def test_no_such_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert sockets.list_of_process(sleeper.pid) == []
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(OSError):
        sockets.list_of_process(sleeper.pid)
