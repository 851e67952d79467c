# SPDX-License-Identifier: Apache-2.0
"""The check that nothing is left finds what is left: without that, its silence would mean nothing."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpf import Bpffs, find_leftovers, list_objects
from support.cgroup import find_v2_root
from support.holders import describe_holders
from support.host import Host
from support.lab import Lab
from support.leftovers import NETNS, remove_orphans
from support.pauses import Stopwatch
from support.players import PeerError

from splicer.kernel import libbpf


def _create_map(path: str) -> None:
    kind = ("type", "hash", "key", "4", "value", "4", "entries", "1", "name", "left")
    subprocess.run(["bpftool", "map", "create", path, *kind], check=True)


def test_a_forgotten_map_is_found() -> None:
    """A map pinned in our bpffs is a leftover, and gone once its pin is."""
    with Host(start=False) as host:
        pin = host.bpffs.path / "left"
        _create_map(str(pin))
        assert [each.name for each in find_leftovers(host.before, set(), host.bpffs.path, 0.2)] == ["left"]
        with pytest.raises(AssertionError, match="pins are left"):
            host.check_clean(0.2)
        pin.unlink()
        host.check_clean()


def test_what_is_pinned_elsewhere_is_not_ours() -> None:
    """A map pinned in somebody else's bpffs meanwhile is not taken for a leftover."""
    with Host(start=False) as host, Host(start=False) as other:
        _create_map(str(other.bpffs.path / "left"))
        assert find_leftovers(host.before, set(), host.bpffs.path, 0.2) == []
        (other.bpffs.path / "left").unlink()


@contextlib.contextmanager
def _mount_namespace(script: str, *arguments: str) -> Iterator[None]:
    """A context: a process in a mount namespace of its own that has run `script` there."""
    command = ["unshare", "--mount", "sh", "-ec", f"{script}\necho; exec sleep 300", "sh", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"\n", "the script failed"
            yield
        finally:
            holder.kill()


def test_what_is_pinned_in_another_mount_namespace_is_not_ours(tmp_path: Path) -> None:
    """A bpffs that nobody else sees, such as the benchmark's, is somebody else's."""
    script = """mount -t bpf bpf "$1"
        bpftool map create "$1/left" type hash key 4 value 4 entries 1 name left"""
    with Host(start=False) as host, _mount_namespace(script, str(tmp_path)):
        assert not list(tmp_path.iterdir())
        assert "left" in {each.name for each in list_objects().values()}
        assert find_leftovers(host.before, set(), host.bpffs.path, 0.2) == []


def test_our_bpffs_stays_ours_in_another_mount_namespace() -> None:
    """A mount namespace that was made meanwhile has a copy of our bpffs: what is left in it is found."""
    with Host(start=False) as host:
        pin = host.bpffs.path / "left"
        _create_map(str(pin))
        with _mount_namespace(""):
            [left] = find_leftovers(host.before, set(), host.bpffs.path, 0.2)
            assert left.name == "left"
        pin.unlink()


def test_who_holds_a_leftover_is_told() -> None:
    """The processes that have it open, its pins, and the sockets there are."""
    with Host(start=False) as host, contextlib.ExitStack() as stack:
        pin = host.bpffs.path / "left"
        _create_map(str(pin))
        [left] = find_leftovers(host.before, set(), host.bpffs.path, 0.2)
        stack.callback(libbpf.Map.open(str(pin)).close)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        told = describe_holders([left]).splitlines()
        assert f"pin {pin} holds {left}" in told
        assert any(re.match(rf"process {os.getpid()} \(.+\) holds {left}$", line) for line in told)
        ends = rf"127\.0\.0\.1:{client.getsockname()[1]} +127\.0\.0\.1:{listener.getsockname()[1]} "
        assert any(re.search(rf"{ends}.*pid={os.getpid()},", line) for line in told)
        pin.unlink()


def test_a_socket_that_holds_the_programs_is_told(lab: Lab) -> None:
    """What waits unread keeps an end in the SOCKHASH, and with it what is loaded: no process and no pin holds
    that, and the socket is named. It is gone once the socket is closed."""
    with Host("--stop-timeout=1") as host:
        pair = host.hot_pair(lab)
        pair.client.send(100)
        assert host.daemon.stop() == 0
        with pytest.raises(AssertionError, match=r"prog \d+ verdict\nno process and no pin ") as raised:
            host.check_clean(0.2)
        assert re.search(rf"ESTAB .*:{pair.client.local[1]} .*pid={pair.server.peer.pid},", str(raised.value))


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """A cgroup, a namespace and a mount named after a process that is gone are removed; ours are not."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    root = find_v2_root()
    assert root is not None
    cgroup = root / f"splicer-test-{gone.pid}-0"
    cgroup.mkdir()
    namespace = f"spltest-{gone.pid}-0-a"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    directory = tmp_path / f"splicer-test-{gone.pid}-x"
    Bpffs(directory / "bpffs")
    with Host(start=False) as host:
        removed = remove_orphans(tmp_path)
        assert {str(cgroup), namespace, str(directory)} <= set(removed)
        assert host.cgroup.path.exists()
        assert not cgroup.exists()
        assert not (NETNS / namespace).exists()
        assert not directory.exists()


def test_wrong_bytes_are_found(lab: Lab) -> None:
    """The receiver names the offset of the first byte that differs from what should have come."""
    with Host(start=False) as host:
        pair = host.pair(lab)
        pair.client.send(100_000)
        assert pair.server.recv(100_000) == 100_000
        pair.verify()
        pair.client.say("!")
        pair.client.send(10)
        pair.server.recv(11)
        with pytest.raises(AssertionError, match="wrong byte at 100000"):
            pair.verify()
        with pytest.raises(PeerError, match="TIMEOUT"):
            pair.server.recv(1, timeout=0.1)


def test_a_pause_of_the_machine_is_not_measured() -> None:
    """Seconds in which no CPU ran us do not count; those in which somebody else had us wait do."""
    stop_us = f"kill -STOP {os.getpid()}; sleep 0.6; kill -CONT {os.getpid()}"
    with Stopwatch() as watch:
        subprocess.run(["sh", "-c", stop_us], check=True)
    assert watch.paused > 0.5
    assert watch.seconds < 0.5
    with Stopwatch() as watch:
        time.sleep(0.3)
    assert watch.seconds + watch.paused > 0.29
