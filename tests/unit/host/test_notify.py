# SPDX-License-Identifier: Apache-2.0
"""The service manager is told what it can understand, and its absence troubles nobody."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from splicer.host import notify


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[socket.socket, str]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    request.addfinalizer(sock.close)
    if request.param == "file":
        address = str(tmp_path / "notify")
        sock.bind(address)
        return sock, address
    name = f"splicer-test-{os.getpid()}"
    sock.bind("\0" + name)
    return sock, "@" + name


def test_lines_arrive_in_one_datagram(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    assert notify.tell({"NOTIFY_SOCKET": address}, "READY=1", "STATUS=at work")
    assert sock.recv(100) == b"READY=1\nSTATUS=at work"


def test_reloading_carries_the_time(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    assert notify.tell_reloading({"NOTIFY_SOCKET": address})
    first, second = sock.recv(100).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_a_manager_nothing_is_said(environ: dict[str, str]) -> None:
    assert not notify.tell(environ, "READY=1")


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not notify.tell({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, "READY=1")


def test_a_manager_that_does_not_read_is_not_waited_for(manager: tuple[socket.socket, str]) -> None:
    _, address = manager
    sent = [notify.tell({"NOTIFY_SOCKET": address}, "WATCHDOG=1") for _ in range(5000)]
    assert not sent[-1]


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "1000000"}, True),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, False),
    ],
)
def test_the_watchdog_is_for_the_process_it_names(environ: dict[str, str], wanted: bool) -> None:
    assert notify.wants_watchdog(environ) is wanted
