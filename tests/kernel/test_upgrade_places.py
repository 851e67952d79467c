# SPDX-License-Identifier: Apache-2.0
"""The places that splicer lives in go away or are full, or several starts want them at once. Traffic goes
on, what is said is clear, and nothing is left behind (promise 4 of HAZARDS.md)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.bpf import list_attached
from support.daemon import ControlError, Outcome, ask, call, command_line, environment, wait_until
from support.disk import fill
from support.engine import FakeEngine
from support.host import Host
from support.lab import Lab
from support.load import Load
from support.players import Pair
from support.tiers import spread, thorough

FAILURE, NOT_RUNNING = 1, 3
STARTS = 6


def _places(host: Host) -> list[str]:
    return [f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]


def _run(host: Host, *arguments: str) -> Outcome:
    """A `splicer run` that is expected to refuse."""
    return call("run", f"--cgroup={host.cgroup.path}", *_places(host), "--docker=off", *arguments)


def _last_line(outcome: Outcome) -> str:
    """What was refused, without the log and the hint."""
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("splicer: ")]
    assert len(lines) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return lines[0]


def _is_spliced(host: Host, pair: Pair) -> bool:
    """For a daemon that the host has not started."""
    flows = ask(host.run_dir, "flows")["flows"]
    port = f":{pair.client.local[1]}"
    return any(flow["local"].endswith(port) and flow["state"] == "spliced" for flow in flows)


# the BPF file system


def test_bpffs_is_unmounted_while_it_runs(lab: Lab) -> None:
    """A lazy umount takes the pins away, not the programs: splices go on, and a stop leaves nothing."""
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        subprocess.run(["umount", "--lazy", str(host.bpffs.path)], check=True)
        assert not host.pin_dir.exists()
        time.sleep(0.5)
        before = host.flow(quiet)
        quiet.pingpong(50)
        after = host.flow(quiet)
        assert after["redirected_messages"] - before["redirected_messages"] == 100
        fresh = host.hot_pair(lab)
        host.daemon.drain()
        host.make_hot(fresh)
        fresh.verify()
        assert host.daemon.stop() == 0
        assert list_attached(host.cgroup.path) == []
        load.finish()
        quiet.pingpong(20)
        quiet.verify()
        subprocess.run(["mount", "-t", "bpf", "bpf", str(host.bpffs.path)], check=True)
        host.stop_peers()
        host.check_clean()


@thorough("test_crash_traffic.py does it under traffic")
def test_bpffs_is_unmounted_and_the_daemon_killed(lab: Lab) -> None:
    """Without pins nothing outlives the daemon: all is detached at once, the connections go on, and a new
    daemon starts beside what the living sockets still hold."""
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        subprocess.run(["umount", "--lazy", str(host.bpffs.path)], check=True)
        host.daemon.kill()
        wait_until("it is detached", lambda: list_attached(host.cgroup.path) == [])
        quiet.pingpong(50)
        subprocess.run(["mount", "-t", "bpf", "bpf", str(host.bpffs.path)], check=True)
        host.start()
        quiet.pingpong(50)
        fresh = host.hot_pair(lab)
        fresh.verify()
        quiet.verify()
        load.finish()


# the run directory


def test_control_socket_is_removed(lab: Lab) -> None:
    """Without its socket the daemon cannot be asked and does the rest: splices, refuses a second one,
    stops."""
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        (host.run_dir / "control.sock").unlink()
        assert call("status", f"--run-dir={host.run_dir}").code == NOT_RUNNING
        outcome = _run(host)
        assert outcome.code == FAILURE
        assert f"already running (pid {host.daemon.pid}" in _last_line(outcome)
        assert call("unload", *_places(host)).code == FAILURE
        quiet.pingpong(50)
        fresh = host.pair(lab)
        host.daemon.send_signal(signal.SIGHUP)
        wait_until("the configuration was read", lambda: host.count_reloads() == 1)
        load.finish()
        for pair in load.pairs:
            pair.close()
        wait_until("both are spliced", lambda: fresh.pingpong(20) or host.count_spliced() == 4)
        for pair in (quiet, fresh):
            pair.verify()


@thorough("test_control_socket_is_removed with all that is beside it")
def test_run_directory_is_removed(lab: Lab) -> None:
    """The lock goes with the directory, and the pins keep a second daemon out all the same."""
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        shutil.rmtree(host.run_dir)
        assert call("status", f"--run-dir={host.run_dir}").code == NOT_RUNNING
        for outcome in (_run(host), call("unload", *_places(host))):
            assert outcome.code == FAILURE
            assert str(host.pin_dir) in _last_line(outcome)
        quiet.pingpong(50)
        load.finish()
        quiet.verify()
        assert host.daemon.stop() == 0
        host.stop_peers()
        host.check_clean()


# several at once


@pytest.mark.parametrize(
    "left", spread(["nothing", "pins", "run-directory"], ["pins"], "other beginnings of the same race")
)
def test_many_starts_at_once(lab: Lab, left: str) -> None:
    """Exactly one of them wins and splices; the others say who runs and change nothing."""
    with Host(start=left == "pins") as host:
        load = None
        if left == "pins":
            load = Load(host, lab)
            host.daemon.kill()
        if left == "run-directory":
            host.run_dir.mkdir(mode=0o700)
        command = command_line("run", f"--cgroup={host.cgroup.path}", *_places(host), "--docker=off")
        starts = [
            subprocess.Popen(
                command,
                cwd="/",
                env=environment(),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(STARTS)
        ]
        try:
            wait_until(
                "all but one have ended",
                lambda: sum(each.poll() is not None for each in starts) == STARTS - 1,
                timeout=30.0,
            )
            [winner] = [each for each in starts if each.poll() is None]
            for loser in starts:
                if loser is winner:
                    continue
                _, said = loser.communicate()
                assert loser.returncode == FAILURE, said
                message = _last_line(Outcome(FAILURE, "", said))
                assert "already running" in message or "in use by another splicer" in message, message
                if "already running" in message:
                    assert f"pid {winner.pid}, " in message, message
            wait_until(
                "it serves", lambda: call("status", f"--run-dir={host.run_dir}").code == 0, timeout=20.0
            )
            status = json.loads(call("status", "--json", f"--run-dir={host.run_dir}").stdout)
            assert status["pid"] == winner.pid
            pair = host.pair(lab)
            wait_until("it splices", lambda: pair.pingpong(20) or _is_spliced(host, pair))
            pair.verify()
            winner.send_signal(signal.SIGTERM)
            _, said = winner.communicate(timeout=15)
            assert winner.returncode == 0, said
        finally:
            for each in starts:
                each.kill()
                each.wait()
        if load:
            load.finish()
            host.daemon.ready_file.unlink(missing_ok=True)
        host.stop_peers()
        host.check_clean()


# no room


def test_start_on_a_full_disk(small_disk: Path) -> None:
    """Said in one line that names the file and the reason; nothing is left, and with room it starts."""
    with Host(start=False) as host:
        host.run_dir = small_disk / "run"
        ballast = fill(small_disk)
        outcome = _run(host)
        assert outcome.code == FAILURE
        message = _last_line(outcome)
        assert "No space left on device" in message
        assert str(host.run_dir) in message
        assert host.list_pins() == []
        ballast.unlink()
        host.start()
        assert host.daemon.stop() == 0


def test_ready_file_on_a_full_disk(small_disk: Path) -> None:
    """The same for a ready file that cannot be written: no half started daemon."""
    with Host(start=False) as host:
        fill(small_disk)
        outcome = _run(host, f"--ready-file={small_disk / 'ready'}")
        assert outcome.code == FAILURE
        assert "No space left on device" in _last_line(outcome)
        assert not list(small_disk.glob("ready*"))
        host.check_clean()


# Becomes the command that follows, with a full pipe for stderr whose reading end stays open.
FULL_PIPE = """
import os, sys
reading, writing = os.pipe()
os.set_inheritable(reading, True)
os.set_blocking(writing, False)
try:
    while True:
        os.write(writing, bytes(4096))
except BlockingIOError:
    os.set_blocking(writing, True)
os.dup2(writing, 2)
os.execvp(sys.argv[1], sys.argv[1:])
"""
LOGS = {
    "full": ("bash", "-c", 'exec "$@" 2>/dev/full', "bash"),
    "pipe": ("bash", "-c", 'exec "$@" 2> >(exec true)', "bash"),
    "full-pipe": (sys.executable, "-c", FULL_PIPE),
    "closed": ("bash", "-c", 'exec "$@" 2>&-', "bash"),
}


@pytest.mark.parametrize("log", spread(LOGS, ["full-pipe"], "other ways in which nobody takes a line"))
def test_log_that_cannot_be_written(lab: Lab, log: str) -> None:
    """No line of the log is worth a splice: with stderr on a full disk, a pipe that nobody reads any more, or
    one that nobody empties, or none at all, it starts, serves, drains and stops."""
    with Host(start=False) as host:
        host.prefix = LOGS[log]
        host.start()
        pair = host.hot_pair(lab)
        host.daemon.drain()
        host.daemon.send_signal(signal.SIGHUP)
        host.make_hot(pair)
        pair.verify()
        assert host.daemon.stop() == 0
        host.check_clean()


def test_running_on_a_disk_that_fills(tmp_path: Path, small_disk: Path, lab: Lab) -> None:
    """`splicer set` that cannot be kept fails, says why, and changes nothing; everything else works."""
    # Not on the disk: what was accepted on a socket file keeps the file system busy until it is closed.
    engine = FakeEngine(str(tmp_path / "engine.sock"))
    engine.run(1, name="one")
    engine.run(2, name="two")
    try:
        with Host(f"--docker={engine.url}", start=False) as host:
            host.run_dir = small_disk / "run"
            host.start()
            wait_until("they are known", lambda: host.daemon.status()["docker"]["containers"] == 2)
            pair = host.hot_pair(lab)
            host.daemon.command("set", container="one", mode="off")
            kept = (host.run_dir / "overrides.json").read_text()
            ballast = fill(small_disk)
            with pytest.raises(ControlError) as refused:
                host.daemon.command("set", container="two", mode="eager")
            assert "No space left on device" in str(refused.value)
            assert "internal" not in str(refused.value)
            done = call("set", "two", "eager", f"--run-dir={host.run_dir}")
            assert done.code == FAILURE
            assert done.stderr.startswith("splicer: ")
            assert "No space left on device" in done.stderr
            assert (host.run_dir / "overrides.json").read_text() == kept
            assert sorted(os.listdir(host.run_dir)) == ["control.sock", "lock", "overrides.json"]
            modes = {each["name"]: each["mode"] for each in host.daemon.command("policy")["containers"]}
            assert modes == {"one": "off", "two": "adaptive"}
            pair.pingpong(50)
            assert host.wait_flow(pair, "spliced")
            ballast.unlink()
            host.daemon.command("set", container="two", mode="eager")
            pair.verify()
            host.daemon.command("unset", container="one")
            host.daemon.command("unset", container="two")
            assert host.daemon.stop() == 0
    finally:
        engine.stop()
