# SPDX-License-Identifier: Apache-2.0
"""Processes are named while they live, and never with the name of one that had the pid before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from splicer.host import process
from splicer.host.process import UNKNOWN, Process, Processes, read_own_age, read_own_usage, read_peak

ROOT = Path(__file__).resolve().parents[3]


def test_a_living_process(sleeper: subprocess.Popen[bytes]) -> None:
    # Between fork and exec it is still us.
    while psutil.Process(sleeper.pid).name() != "sleep":
        pass
    assert Processes().find(sleeper.pid) == Process("sleep", "sleep 60")


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    processes = Processes()
    assert processes.find(child.pid) == UNKNOWN == Process("", "")
    for pid in (0x7FFFFFFF, -1, 1 << 80):
        assert processes.find(pid) == UNKNOWN


def test_a_process_that_ends_is_forgotten(sleeper: subprocess.Popen[bytes]) -> None:
    processes = Processes()
    assert processes.find(sleeper.pid) != UNKNOWN
    sleeper.kill()
    sleeper.wait()
    assert processes.find(sleeper.pid) == UNKNOWN


class Impostor:
    """Stands in for psutil.Process: one pid, and a process behind it that can be replaced."""

    born = 1.0
    called = "first"
    alive = True
    reads = 0

    def __init__(self, pid: int) -> None:
        pass

    def create_time(self) -> float:
        return Impostor.born

    def oneshot(self) -> Impostor:
        return self

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def name(self) -> str:
        Impostor.reads += 1
        return Impostor.called

    def cmdline(self) -> list[str]:
        return [Impostor.called, "\x1b[2Jred\nline", "x" * 1000]

    def is_running(self) -> bool:
        return Impostor.alive


@pytest.fixture
def impostor(monkeypatch: pytest.MonkeyPatch) -> type[Impostor]:
    monkeypatch.setattr(psutil, "Process", Impostor)
    for name, value in (("born", 1.0), ("called", "first"), ("alive", True), ("reads", 0)):
        monkeypatch.setattr(Impostor, name, value)
    return Impostor


def test_a_reused_pid(impostor: type[Impostor]) -> None:
    processes = Processes(clock=lambda: 0.0)
    assert processes.find(7).name == "first"
    assert processes.find(7).name == "first"
    assert impostor.reads == 1
    impostor.born, impostor.called = 2.0, "second"
    assert processes.find(7).name == "second"


def test_a_pid_that_passes_on_while_it_is_read(impostor: type[Impostor]) -> None:
    impostor.alive = False
    assert Processes().find(7) == UNKNOWN


def test_exec_is_noticed_after_a_while(impostor: type[Impostor]) -> None:
    now = 0.0
    processes = Processes(clock=lambda: now)
    processes.find(7)
    impostor.called = "after exec"
    now = 9.0
    assert processes.find(7).name == "first"
    now = 11.0
    assert processes.find(7).name == "after exec"


def test_a_command_line_cannot_drive_the_terminal(impostor: type[Impostor]) -> None:
    command = Processes().find(7).command
    assert command.startswith("first ?[2Jred?line xxx")
    assert len(command) == 256


def test_memory_is_bounded(impostor: type[Impostor]) -> None:
    processes = Processes(most=10, clock=lambda: 0.0)
    for pid in range(1, 100):
        processes.find(pid)
    assert len(processes._known) == 10
    assert 99 in processes._known


@pytest.mark.parametrize("error", [psutil.AccessDenied, psutil.ZombieProcess, PermissionError, ValueError])
def test_one_that_may_not_be_read(
    impostor: type[Impostor], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(_self: object) -> str:
        raise error(7)

    monkeypatch.setattr(impostor, "cmdline", refuse)
    assert Processes().find(7) == UNKNOWN


def test_own_usage() -> None:
    before = read_own_usage()
    assert before.rss_bytes > 1 << 20
    assert before.cpu_seconds > 0
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        assert read_own_usage().fds == before.fds + 1
    finally:
        os.close(fd)


def test_psutil_is_loaded_only_when_it_is_needed() -> None:
    source = "import sys, splicer.host.process; sys.exit('psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
    assert process.UNKNOWN.command == ""


def test_the_hosts_pid_namespace_is_told_from_others(tmp_path: Path) -> None:
    assert not process.sees_host_pids(str(tmp_path))
    for name in ("self", "1"):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "ns" / "pid").touch()
        assert not process.sees_host_pids(str(tmp_path))


def test_how_long_this_process_has_been_there() -> None:
    """In steps of a hundredth of a second."""
    source = "from splicer.host.process import read_own_age; print(read_own_age())"
    begun = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < float(child.stdout) < time.monotonic() - begun + 0.02
    assert read_own_age() > float(child.stdout)


def test_the_most_memory_that_there_was() -> None:
    """Of this process, and of a child that has ended."""
    before = read_peak()
    assert before >= read_own_usage().rss_bytes * 0.9
    size = before + (64 << 20)
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)
    assert size <= read_peak() < size + (64 << 20)


@pytest.fixture
def names(tmp_path: Path) -> str:
    """A /proc with some processes by name; one whose name the kernel has cut off, and one that is gone."""
    for pid, (comm, command) in {
        "1": ("init", "/sbin/init"),
        "20": ("php-fpm8.2", "php-fpm: pool www"),
        "21": ("php-fpm8.2", "php-fpm: pool www"),
        "30": ("a-very-long-nam", "/usr/bin/a-very-long-name\0--option"),
        "31": ("a-very-long-nam", "something else"),
        "self": ("php-fpm8.2", ""),
    }.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(comm + "\n")
        (tmp_path / pid / "cmdline").write_text(command)
    (tmp_path / "40").mkdir()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "pids"),
    [
        ("init", {1}),
        ("php-fpm*", {20, 21}),
        ("php-fpm", set()),
        ("a-very-long-name", {30}),
        ("a-very-long-nam", {31}),
        ("a-very-*", {30, 31}),
        ("*", {1, 20, 21, 30, 31}),
    ],
)
def test_processes_by_name(names: str, pattern: str, pids: set[int]) -> None:
    assert process.find_by_name([pattern, "nobody"], names) == {pattern: pids, "nobody": frozenset()}


def test_nobody_is_looked_for_in_vain() -> None:
    assert process.find_by_name([], "/nowhere") == {}


def test_who_is_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    assert not process.is_stopped(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    assert process.is_stopped(sleeper.pid)
    sleeper.send_signal(signal.SIGCONT)
    assert not process.is_stopped(0)
