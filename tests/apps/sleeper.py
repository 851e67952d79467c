# SPDX-License-Identifier: Apache-2.0
"""A thread that waits for bytes of a connection: who it is, where it sleeps, and what wakes it else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cgroup import Cgroup

from apps.case import Failed

PATIENCE = 5.0  # seconds
PAUSE = 0.01  # seconds
# Numbers of system calls on x86-64.
TGKILL = 234
READS = {0: "read", 19: "readv", 45: "recvfrom", 47: "recvmsg"}
POLLS = {7: "poll", 23: "select", 232: "epoll_wait", 270: "pselect6", 271: "ppoll", 281: "epoll_pwait"}
# What a poll goes on with that was interrupted.
POLLS[219] = "restart_syscall"
POLL = {7, 271}
POLLFD = struct.Struct("=ihh")


@dataclass(frozen=True)
class Sleeper:
    """`call` is the system call that it sleeps in."""

    pid: int
    tid: int
    call: str

    @property
    def reads(self) -> bool:
        """True if it sleeps in a read, and not in poll or its like."""
        return self.call in READS.values()

    @property
    def status(self) -> dict[str, str]:
        """What /proc says of the thread. Raises OSError."""
        lines = Path(f"/proc/{self.pid}/task/{self.tid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@dataclass(frozen=True)
class Socket:
    """A program's socket, as one of its processes has it open."""

    pid: int
    descriptor: int

    def find_sleeper(self) -> Sleeper | None:
        """The thread that sleeps in a read of it; if there is none, in poll with it, or in epoll or the like
        with whatever."""
        found: dict[int, Sleeper] = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                words = (task / "syscall").read_text().split()
                if len(words) < 3:
                    continue  # it runs
                number, first, second = int(words[0]), int(words[1], 16), int(words[2], 16)
                if number in READS and first == self.descriptor:
                    found[0] = Sleeper(self.pid, int(task.name), READS[number])
                elif number in POLL and self.descriptor in self._read_polled(first, second):
                    found[1] = Sleeper(self.pid, int(task.name), POLLS[number])
                elif number in POLLS.keys() - POLL:
                    found[2] = Sleeper(self.pid, int(task.name), POLLS[number])
        return found[min(found)] if found else None

    def _read_polled(self, address: int, count: int) -> list[int]:
        """The descriptors that a call of poll names, from the program's memory. Raises OSError."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return [fd for fd, _, _ in POLLFD.iter_unpack(memory.read(POLLFD.size * count))]


def find_socket(cgroup: Cgroup, local: str, remote_port: int | None = None) -> Socket | None:
    """The socket of this own IPv4 "address:port", and this port of the other end if given."""
    host, _, port = local.partition(":")
    # An IPv6 socket has it at the end of a longer one.
    name = "".join(f"{int(part):02X}" for part in reversed(host.split("."))) + f":{int(port):04X}"
    for pid in cgroup.pids():
        with contextlib.suppress(OSError):
            lines = [
                line
                for table in ("tcp", "tcp6")
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
            ]
            inodes = {
                f"socket:[{row[9]}]"
                for row in map(str.split, lines)
                if row[1].endswith(name) and remote_port in (None, int(row[2].partition(":")[2], 16))
            }
            for each in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(each) in inodes:
                    return Socket(pid, int(each.name))
    return None


def wait_for(what: str, condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """The first true value of the condition. Raises Failed."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"not within {timeout:g} s: {what}")
        time.sleep(PAUSE)
    return value


# -- what wakes it -------------------------------------------------------------------------------------------


def interrupt(sleeper: Sleeper, number: int) -> None:
    """A signal that the program catches, to this very thread. Raises Failed if it catches it not."""
    if not int(sleeper.status["SigCgt"], 16) >> (number - 1) & 1:
        raise Failed(f"it does not catch signal {number}")
    if ctypes.CDLL(None, use_errno=True).syscall(TGKILL, sleeper.pid, sleeper.tid, number):
        raise Failed(f"tgkill: {os.strerror(ctypes.get_errno())}")
    wait_for("the signal was taken", lambda: not _is_pending(sleeper, number))


def stop_and_continue(sleeper: Sleeper) -> None:
    """SIGSTOP and SIGCONT, as of a shell's job control."""
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for("it is stopped", lambda: sleeper.status["State"].startswith("T"))
    os.kill(sleeper.pid, signal.SIGCONT)
    wait_for("it goes on", lambda: not sleeper.status["State"].startswith("T"))


def freeze(sleeper: Sleeper, cgroup: Cgroup) -> None:
    """The freezer of cgroup v2, as `docker pause` uses it; the process is moved into a cgroup for it."""
    cgroup.add(sleeper.pid)
    _set_frozen(cgroup, True)
    _set_frozen(cgroup, False)


def attach(sleeper: Sleeper) -> None:
    """A debugger that looks for a moment: strace."""
    command = ["strace", "-qq", "-o", "/dev/null", "-p", str(sleeper.tid)]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("strace is there", lambda: _is_traced(sleeper))
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()


def _is_traced(sleeper: Sleeper) -> bool:
    try:
        return sleeper.status["TracerPid"] != "0"
    except FileNotFoundError:
        return True  # it has ended of it


def _is_pending(sleeper: Sleeper, number: int) -> bool:
    try:
        return bool(int(sleeper.status["SigPnd"], 16) >> (number - 1) & 1)
    except FileNotFoundError:
        return False  # it has ended of it


def _set_frozen(cgroup: Cgroup, frozen: bool) -> None:
    (cgroup.path / "cgroup.freeze").write_text(str(int(frozen)))
    state = f"frozen {int(frozen)}"
    wait_for(state, lambda: state in (cgroup.path / "cgroup.events").read_text().splitlines())
