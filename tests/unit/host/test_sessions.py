# SPDX-License-Identifier: Apache-2.0
"""A child in a session of its own, of a program of its own, since pytest had better not fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemon import REPOSITORY, wait_until

from splicer.host import sessions
from splicer.host.process import is_stopped
from splicer.host.sessions import least_share

# What the child does with signals comes after `ready`, as in a command that sets up first.
PROGRAM = """
import os, signal, sys, time
from splicer.host.sessions import branch_off, least_share
code = branch_off()
if code is not None:
    print("parent", code, flush=True)
    sys.exit(code)
heard = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, _: heard.append(number))
print("child", os.getpid(), os.getsid(0), os.getppid(), flush=True)
if sys.argv[1] == "yield":
    with least_share():
        print(open("/proc/self/autogroup").read(), end="", flush=True)
    print(open("/proc/self/autogroup").read(), end="", flush=True)
while not heard and not sys.argv[1].isdigit():
    time.sleep(0.01)
print("heard", *map(int, heard), flush=True)
if sys.argv[1].isdigit():
    os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(7)
"""


class Branched:
    """The program; `child` is the pid of its child."""

    def __init__(self, task: str, *before: str) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", PROGRAM, task],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        who, child, session, parent = self.read()
        assert who == "child"
        assert child == session
        assert int(parent) == self.process.pid
        self.child = int(child)

    def read(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()


@contextmanager
def branched(task: str, *before: str) -> Iterator[Branched]:
    made = Branched(task, *before)
    try:
        yield made
    finally:
        made.process.kill()  # ends the child as well: SIGTERM
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.read()  # until the child has gone
        made.process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_handed_on(number: signal.Signals) -> None:
    with branched("wait") as made:
        made.process.send_signal(number)
        assert made.read() == ["heard", str(int(number))]
        assert made.read() == ["parent", "7"]
        assert made.process.wait() == 7
        assert not Path(f"/proc/{made.child}").exists()


def test_end_by_a_signal() -> None:
    with branched(str(int(signal.SIGKILL))) as made:
        assert made.read() == ["heard"]
        assert made.process.wait() == 128 + signal.SIGKILL


def test_a_parent_that_is_killed() -> None:
    with branched("wait") as made:
        made.process.kill()
        assert made.read() == ["heard", str(int(signal.SIGTERM))]


def test_stopped_and_continued() -> None:
    with branched("wait") as made:
        made.process.send_signal(signal.SIGTSTP)
        wait_until("both are stopped", lambda: is_stopped(made.child) and is_stopped(made.process.pid))
        made.process.send_signal(signal.SIGCONT)
        wait_until("the child goes on", lambda: not is_stopped(made.child))
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait() == 7


def test_nohup() -> None:
    with branched("wait", "nohup") as made:
        made.process.send_signal(signal.SIGHUP)
        made.process.send_signal(signal.SIGINT)
        assert made.read() == ["heard", str(int(signal.SIGINT))]
        assert made.process.wait() == 7


def test_share_of_the_cpus() -> None:
    """The session that it was started from keeps its own."""
    share = Path("/proc/self/autogroup")
    if not share.exists():
        pytest.skip("this kernel does not share out CPUs by session")
    before = share.read_text()
    with branched("yield") as made:
        assert [made.read()[-2:] for _ in range(2)] == [["nice", "19"], ["nice", "0"]]
        assert Path(f"/proc/{made.process.pid}/autogroup").read_text() == before
    with least_share():  # the tests do not lead their session, or had better not
        assert os.getsid(0) == os.getpid() or share.read_text() == before


def test_share_where_the_kernel_does_not_know_of_sessions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sessions, "_ENABLED", tmp_path / "none")
    assert not sessions.is_share_by_session()
    (tmp_path / "none").write_text("0\n")
    assert not sessions.is_share_by_session()
    (tmp_path / "none").write_text("1\n")
    monkeypatch.setattr(sessions, "_NICE", tmp_path / "nor this")
    assert not sessions.is_share_by_session()
