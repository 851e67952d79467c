# SPDX-License-Identifier: Apache-2.0
"""Reading in another network namespace leaves no descriptor behind, and no thread in it.

Entering a namespace takes root; without it there is only our own to look at, which takes root too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from support.namespaces import keep_namespace

from splicer.host.namespaces import entered, read_addresses, read_cookie, read_own_cookie

OWN = "/proc/thread-self/ns/net"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="setns(2) takes root")


@pytest.fixture
def neighbour() -> Iterator[str]:
    """Path of a namespace with addresses of every kind."""
    addresses = "10.9.0.2/24 10.9.0.1/32 169.254.9.9/16 10.8.0.1,peer,10.8.0.2 fd09::1/64 fe80::9/64"
    setup = (
        f"ip link set lo up && for each in {addresses}; do"
        " ip addr add $(echo $each | tr , ' ') dev lo || exit; done"
    )
    with keep_namespace(setup) as (path, _):
        yield path


def list_fds() -> list[str]:
    return os.listdir("/proc/self/fd")


@needs_root
def test_addresses_of_another_namespace(neighbour: str) -> None:
    assert read_addresses(neighbour) == ("10.8.0.1", "10.9.0.1", "10.9.0.2", "fd09::1")


@needs_root
def test_the_cookie_of_another_namespace(neighbour: str) -> None:
    cookie = read_cookie(neighbour)
    assert cookie not in (0, read_own_cookie())
    with entered(neighbour) as inside:
        assert inside == cookie
    assert read_cookie(OWN) == read_own_cookie()


@needs_root
def test_nothing_is_left_behind(neighbour: str) -> None:
    read_addresses(neighbour)  # what is imported and opened once
    own, fds, threads = os.readlink(OWN), len(list_fds()), threading.active_count()
    for _ in range(50):
        read_addresses(neighbour)
        read_cookie(neighbour)
    assert os.readlink(OWN) == own
    assert len(list_fds()) == fds
    assert threading.active_count() == threads


@needs_root
def test_only_the_calling_thread_moves(neighbour: str) -> None:
    own = os.readlink(OWN)
    inside, go_on = threading.Event(), threading.Event()
    seen = []

    def work() -> None:
        with entered(neighbour):
            seen.append(os.readlink(OWN))
            inside.set()
            go_on.wait(10)
        seen.append(os.readlink(OWN))

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    assert os.readlink(OWN) == own
    go_on.set()
    thread.join()
    assert seen[0] != own
    assert seen[1] == own


@needs_root
def test_a_failure_inside_comes_back_out(neighbour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(1, "not now")

    monkeypatch.setattr(psutil, "net_if_addrs", fail)
    own, fds = os.readlink(OWN), len(list_fds())
    with pytest.raises(OSError, match="not now"):
        read_addresses(neighbour)
    assert os.readlink(OWN) == own
    assert len(list_fds()) == fds


@pytest.mark.parametrize("read", [read_addresses, read_cookie])
def test_a_namespace_that_is_gone(read: object) -> None:
    fds = len(list_fds())
    for path in ("/proc/2147483647/ns/net", "/proc/self/stat", "/nowhere"):
        with pytest.raises(OSError):
            read(path)  # type: ignore[operator]
    assert len(list_fds()) == fds


def test_psutil_is_loaded_only_when_it_is_needed() -> None:
    source = "import sys, splicer.host.namespaces; sys.exit('psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
