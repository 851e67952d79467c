# SPDX-License-Identifier: Apache-2.0
"""The check that nothing is left finds what is left: without that, its silence would mean nothing."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from support.bpf import Bpffs, find_leftovers
from support.cgroup import find_v2_root
from support.host import Host
from support.lab import Lab
from support.leftovers import NETNS, remove_orphans
from support.pauses import Stopwatch
from support.players import PeerError


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
