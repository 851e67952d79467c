# SPDX-License-Identifier: Apache-2.0
"""Killed at any moment, again and again, with traffic that checks itself: nothing is lost, repeated or
reset, and the next start is not disturbed by what was left (promise 4 of HAZARDS.md). What
test_lifecycle.py shows is not repeated."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from support.daemon import call, command_line, environment
from support.host import Host
from support.lab import Lab
from support.load import Load
from support.tiers import spread, thorough

from splicer.kernel import libbpf
from splicer.kernel.layout import KernelSettings

MOMENTS = "further moments"


def _places(host: Host) -> list[str]:
    return [f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]


def _start_unwatched(host: Host) -> subprocess.Popen[bytes]:
    """A `splicer run` that nobody waits for."""
    command = command_line("run", f"--cgroup={host.cgroup.path}", *_places(host), "--docker=off")
    return subprocess.Popen(command, cwd="/", env=environment(), stderr=subprocess.DEVNULL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


@thorough("test_lifecycle.py kills once; this kills often")
def test_killed_again_and_again_under_load(lab: Lab) -> None:
    """SIGKILL at random moments, most of them in the middle of a start or of an adoption."""
    chance = random.Random(7)
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        host.daemon.kill()
        started = time.monotonic()
        lives = 0
        while time.monotonic() - started < 7.0 or lives < 4:
            process = _start_unwatched(host)
            time.sleep(chance.uniform(0.0, 1.1))
            _kill(process)
            quiet.pingpong(5)
            lives += 1
        host.start()
        host.wait_flow(quiet, "spliced")
        quiet.pingpong(50)
        quiet.verify()
        load.finish()
        host.check_alive(lab)


@pytest.mark.parametrize("delay", spread([0.3, 0.5, 0.7, 0.9], [0.5], MOMENTS))
def test_killed_while_it_loads(lab: Lab, delay: float) -> None:
    """The loader is a process of its own, and may live on for a moment: the next start is not disturbed."""
    with Host(start=False) as host:
        process = _start_unwatched(host)
        time.sleep(delay)
        _kill(process)
        host.start()
        host.check_alive(lab)
        # Nothing has been pinned beside the daemon's own.
        time.sleep(0.5)
        assert {each.name for each in (host.pin_dir / "links").iterdir()} == host.name_links()


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, id="stopping", marks=thorough(MOMENTS)), pytest.param(None, id="draining")],
)
def test_killed_while_it_drains(lab: Lab, number: int | None) -> None:
    """SIGKILL some milliseconds after SIGTERM, or after `splicer drain`: the next daemon finds the kernel
    told to stop or half drained, and splices again."""
    with Host() as host:
        load = Load(host, lab)
        stuck = host.hot_pair(lab)
        stuck.client.send(3000, chunk=300)
        for milliseconds in (0, 5, 20, 100):
            if number is None:
                host.daemon.drain()
            else:
                host.daemon.send_signal(number)
            time.sleep(milliseconds / 1000)
            host.daemon.kill()
            host.start()
        assert stuck.server.recv(3000) == 3000
        host.make_hot(stuck, timeout=10.0)
        stuck.verify()
        load.finish()
        host.check_alive(lab)


def test_killed_while_it_finishes_adoptions(lab: Lab) -> None:
    """The kernel had been told to begin no adoption until those begun are through, and nobody took that back:
    the next daemon does."""
    with Host() as host:
        quiet = host.pair(lab)
        host.daemon.kill()
        settings = libbpf.Map.open(str(host.pin_dir / "maps" / "settings"))
        try:
            [(key, value)] = settings.items()
            settings.set(key, replace(KernelSettings.unpack(value), finishing=True).pack())
        finally:
            settings.close()
        host.start()
        host.make_hot(quiet)
        quiet.verify()
        host.check_alive(lab)


@pytest.mark.parametrize("milliseconds", spread([300, 380, 500], [380], MOMENTS))
def test_unload_is_killed(lab: Lab, milliseconds: int) -> None:
    """`splicer unload` dies at work: another one, or a start, finishes what it began."""
    with Host() as host:
        load = Load(host, lab)
        unread = host.hot_pair(lab)
        unread.client.send(2000, chunk=200)
        host.daemon.kill()
        unload = subprocess.Popen(
            command_line("unload", *_places(host), "--stop-timeout=2"),
            cwd="/",
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(milliseconds / 1000)
        _kill(unload)
        if milliseconds != 380:
            done = call("unload", *_places(host), "--stop-timeout=0.2")
            assert done.code == 0, done
            assert host.list_pins() == []
            host.daemon.ready_file.unlink(missing_ok=True)
        host.start()
        assert unread.server.recv(2000) == 2000
        unread.pingpong(10)
        unread.verify()
        load.finish()
        host.check_alive(lab)
