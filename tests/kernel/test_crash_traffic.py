# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the daemon, its files and its clocks: connections that are old, new, spliced, plain, on
IPv4 and IPv6 go on meanwhile, and every byte of them arrives once, in order, with no reset (promises 4 and
5 of HAZARDS.md).

What a crash or a restart itself has to do is in test_lifecycle.py and test_upgrade*.py; here is what the
traffic must not notice of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import AF_INET6
from types import TracebackType

import pytest
from support.bpf import list_attached
from support.daemon import REPOSITORY, call, command_line, environment, wait_until
from support.disk import fill
from support.engine import FakeEngine
from support.host import EAGER, Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.tiers import spread, thorough

ROUNDS = 100  # of request and response in a lap
BULK = 1_500_000  # bytes in a lap
DAY = 86_400  # seconds


class Traffic:
    """A context: laps of traffic from its beginning to its end, with one whole lap more after what happens.

    In each lap an old connection asks and answers, another one moves bulk one way, and between other
    processes connections come and go, adaptive and eager in turn. Whatever waits for longer than 10 seconds
    is a failure, as is any error of a system call.
    """

    def __init__(self, host: Host, lab: Lab, *, spliced: bool = True) -> None:
        self._host, self._address = host, lab.address("b")
        self._talk, self._bulk = (
            host.connect(host.peer(lab, "a"), host.peer(lab, "b"), self._address),
            host.connect(
                host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b", 6), client_family=AF_INET6
            ),
        )
        self._guest, self._door = host.peer(lab, "a"), host.peer(lab, "b")
        for pair in (self._talk, self._bulk) if spliced else ():
            host.make_hot(pair)
        self.laps = self.visits = 0
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        wait_until("the first lap is over", lambda: self.laps or self._failure, timeout=20.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is not None:
            return
        if self._failure is not None:
            raise self._failure
        for pair in (self._talk, self._bulk):
            pair.verify()
        assert self.visits > self.laps

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._lap()
            self._lap()
        except BaseException as failure:  # for the test's own thread
            self._failure = failure

    def _lap(self) -> None:
        sender, reader = self._bulk.client, self._bulk.server
        if self.laps % 2:
            sender, reader = reader, sender
        reader.begin("recv", count=BULK)
        sender.begin("send", count=BULK, chunk=20_000)
        self._talk.server.begin("echo", rounds=ROUNDS, size=700, answer=3000)
        self._talk.client.begin("pingpong", rounds=ROUNDS, size=700, answer=3000, pause=0.002)
        self._visit()
        while self._talk.client.peer.is_waiting():
            self._visit()
        for end in (self._talk.client, self._talk.server):
            assert end.finish() == ROUNDS
        for end in (sender, reader):
            assert end.finish() == BULK
        self.laps += 1

    def _visit(self) -> None:
        port = EAGER if self.visits % 2 else 0
        pair = self._host.connect(self._guest, self._door, self._address, port=port)
        pair.pingpong(40)
        pair.verify()
        pair.client.shutdown(how=1)
        assert pair.server.expect_eof()
        pair.close()
        self.visits += 1


def _check_alive(host: Host, lab: Lab) -> None:
    """The daemon is well, and splices what is new."""
    assert host.daemon.status()["healthy"]
    fresh = host.hot_pair(lab)
    fresh.verify()


def _places(host: Host) -> list[str]:
    return [f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]


# the daemon goes and comes back


def _kill(host: Host) -> None:
    host.daemon.kill()
    time.sleep(1.0)
    host.start()
    assert '"generation_taken_over"' in host.daemon.log.read_text()


def _stop(host: Host) -> None:
    assert host.daemon.stop() == 0
    assert list_attached(host.cgroup.path) == []
    host.start()


def _replace(host: Host) -> None:
    """Another capacity is another generation, as another build is."""
    host.daemon.kill()
    host.start("--max-connections=1000")
    assert '"generation_replaced"' in host.daemon.log.read_text()


def _unload(host: Host) -> None:
    host.daemon.kill()
    done = call("unload", *_places(host))
    assert done.code == 0, done
    assert list_attached(host.cgroup.path) == []
    host.daemon.ready_file.unlink(missing_ok=True)
    host.start()


@contextlib.contextmanager
def _unmounted(host: Host) -> Iterator[None]:
    subprocess.run(["umount", "--lazy", str(host.bpffs.path)], check=True)
    yield
    subprocess.run(["mount", "-t", "bpf", "bpf", str(host.bpffs.path)], check=True)


def _unmount(host: Host) -> None:
    with _unmounted(host):
        time.sleep(0.3)
        host.daemon.drain()
        assert host.daemon.stop() == 0
    host.start()


def _unmount_and_kill(host: Host) -> None:
    with _unmounted(host):
        host.daemon.kill()
        wait_until("it is detached", lambda: list_attached(host.cgroup.path) == [])
    host.start()


def _remove_socket(host: Host) -> None:
    (host.run_dir / "control.sock").unlink()
    time.sleep(0.3)
    assert host.daemon.stop() == 0
    host.start()


def _remove_run_directory(host: Host) -> None:
    shutil.rmtree(host.run_dir)
    time.sleep(0.3)
    host.daemon.kill()
    host.start()


MOMENTS = "each event has a test of its own; this adds traffic"
EVENTS: dict[str, Callable[[Host], None]] = {
    "killed": _kill,
    "stopped": _stop,
    "replaced": _replace,
    "unloaded": _unload,
    "bpffs": _unmount,
    "bpffs-and-killed": _unmount_and_kill,
    "control-socket": _remove_socket,
    "run-directory": _remove_run_directory,
}


@pytest.mark.parametrize("event", spread(EVENTS, ("killed", "bpffs-and-killed"), MOMENTS))
def test_traffic_goes_on(lab: Lab, event: str) -> None:
    """The daemon, its pins or its files go away and come back: nobody who talks notices."""
    with Host("--stop-timeout=1") as host:
        with Traffic(host, lab):
            EVENTS[event](host)
        _check_alive(host, lab)


@thorough("many starts at once are in test_upgrade_places.py; this adds traffic")
@pytest.mark.parametrize("left", ["nothing", "pins"])
def test_starts_race(lab: Lab, left: str) -> None:
    """Two starts at once, before there was any and over the pins of a killed one: exactly one wins, and the
    connections, plain or spliced until then, go on."""
    with Host(start=left == "pins") as host:
        with Traffic(host, lab, spliced=left == "pins"):
            if left == "pins":
                host.daemon.kill()
                host.daemon.ready_file.unlink()
            command = command_line("run", f"--cgroup={host.cgroup.path}", *_places(host), "--docker=off")
            starts = [
                subprocess.Popen(command, cwd="/", env=environment(), stderr=subprocess.DEVNULL)
                for _ in range(2)
            ]
            try:
                wait_until("one has lost", lambda: any(each.poll() is not None for each in starts), 20.0)
                wait_until("it serves", lambda: call("status", _places(host)[0]).code == 0, 20.0)
                [winner] = [each for each in starts if each.poll() is None]
                time.sleep(0.5)
                winner.send_signal(signal.SIGTERM)
                assert winner.wait(15) == 0
            finally:
                for each in starts:
                    each.kill()
                    each.wait()
        host.stop_peers()
        host.check_clean()


# no room


@thorough("a start on a full disk is in test_upgrade_places.py; this adds traffic")
def test_disk_is_full(small_disk: Path, lab: Lab) -> None:
    """The disk with log, lock and socket fills while it runs; then it is killed, and a start without room for
    its ready file refuses. Neither these nor the next start that has room are noticed by the traffic."""
    with Host("--stop-timeout=1", start=False) as host:
        host.run_dir = small_disk / "run"
        host.start()
        with Traffic(host, lab) as traffic:
            fill(small_disk)
            host.daemon.drain()
            host.daemon.send_signal(signal.SIGHUP)
            laps = traffic.laps
            wait_until("a lap on a full disk", lambda: traffic.laps > laps + 1, timeout=20.0)
            assert host.daemon.status()["healthy"]
            host.daemon.kill()
            host.daemon.ready_file.unlink()
            ballast = fill(small_disk)
            own = [f"--cgroup={host.cgroup.path}", *_places(host), "--docker=off"]
            refused = call("run", *own, f"--ready-file={host.daemon.ready_file}")
            assert refused.code == 1, refused
            assert "No space left on device" in refused.stderr
            ballast.unlink()
            host.start()
        _check_alive(host, lab)


# clocks


@contextlib.contextmanager
def _time_namespace(monotonic: int, boottime: int) -> Iterator[tuple[str, ...]]:
    """A command to start another in a namespace whose clocks are moved by so many seconds."""
    moved = [f"--monotonic={monotonic}", f"--boottime={boottime}"]
    holder = subprocess.Popen(
        ["unshare", "--time", *moved, "--fork", "--kill-child", "sh", "-c", "echo $$; exec sleep 300"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        inside = int(holder.stdout.readline())
        yield ("nsenter", f"--time=/proc/{inside}/ns/time")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("which", spread(["both", "boottime"], ["both"], "the same scene with one clock"))
def test_clocks_jump_between_two_lives(lab: Lab, which: str) -> None:
    """The next daemon finds its clocks a day later, and the one after that half the machine's uptime earlier,
    CLOCK_BOOTTIME alone as after a suspension or CLOCK_MONOTONIC too as after a restored checkpoint: each
    takes over, adopts, drains and stops in time, and the traffic does not notice."""
    back = -int(time.clock_gettime(time.CLOCK_MONOTONIC) / 2)
    with Host("--stop-timeout=1") as host, contextlib.ExitStack() as stack:
        quiet = host.hot_pair(lab)
        with Traffic(host, lab):
            for offset in (DAY, back):
                host.prefix = stack.enter_context(_time_namespace(offset if which == "both" else 0, offset))
                host.daemon.kill()
                host.start()
                own, its = (os.readlink(f"/proc/{who}/ns/time") for who in ("self", host.daemon.pid))
                assert its != own
                host.wait_flow(quiet, "spliced")
                host.daemon.drain()
                wait_until("it is drained", lambda: (host.find_flow(quiet) or {})["state"] != "spliced")
                host.make_hot(quiet)
                quiet.verify()
        _check_alive(host, lab)
        with Stopwatch() as watch:
            assert host.daemon.stop() == 0
        assert watch.seconds < 5.0


WALL_CLOCK = """
import itertools, time
true, true_ns, steps = time.time, time.time_ns, itertools.cycle((0, 7200, -7200, 90000, -3600))
time.time = lambda: true() + next(steps)
time.time_ns = lambda: true_ns() + next(steps) * 10**9
"""


@thorough("unit/test_clocks.py forbids the wall clock; this looks whether it is enough")
def test_wall_clock_jumps_at_each_look(lab: Lab, tmp_path: Path) -> None:
    """For the daemon alone the wall clock jumps by hours whenever it looks: it follows its engine, adopts,
    drains, and stops in time, and the traffic does not notice."""
    (tmp_path / "sitecustomize.py").write_text(WALL_CLOCK)
    engine = FakeEngine(str(tmp_path / "engine.sock"))
    engine.run(1, name="one")
    try:
        with Host(f"--docker={engine.url}", start=False) as host:
            host.prefix = ("env", f"PYTHONPATH={tmp_path}:{REPOSITORY}")
            host.start()
            with Traffic(host, lab):
                for number in itertools.count(2):
                    engine.run(number, name=f"container-{number}")
                    wait_until(
                        "it is known",
                        lambda: host.daemon.status()["docker"]["containers"] == number,  # noqa: B023
                    )
                    host.daemon.drain()
                    time.sleep(0.2)
                    if number == 5:
                        break
                assert host.daemon.status()["docker"]["state"] == "connected"
            _check_alive(host, lab)
            with Stopwatch() as watch:
                assert host.daemon.stop() == 0
            assert watch.seconds < 8.0
    finally:
        engine.stop()
