# SPDX-License-Identifier: Apache-2.0
"""Names and command lines of processes, and what this process itself uses."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

_MOST = 4096
# A process keeps its pid and its age when it calls execve(2) or renames itself, as servers do early in life.
_KEPT_S = 10.0
_COMMAND_LENGTH = 256
_COMM_LENGTH = 15  # TASK_COMM_LEN without its zero (Linux, include/linux/sched.h)
# PROC_PID_INIT_INO (Linux, include/linux/proc_ns.h).
_M_ARENA_MAX = -8  # malloc.h of glibc
_HOST_PID_NAMESPACE = 0xEFFFFFFC
HINT_HOST_PIDS = "network namespaces and processes outside are not found; docker run --pid=host"


@dataclass(frozen=True)
class Process:
    """`name` is the short one that ps(1) shows, `command` the arguments, at most 256 characters of them.
    Both are empty for a process that is gone or may not be looked at."""

    name: str = ""
    command: str = ""


@dataclass(frozen=True)
class Usage:
    """What this process uses now: memory in bytes, CPU time in seconds since its start, descriptors."""

    rss_bytes: int
    cpu_seconds: float
    fds: int


@dataclass(frozen=True)
class _Known:
    born: float
    read_at: float
    process: Process


UNKNOWN = Process()


class Processes:
    """Finds processes by pid. Remembers some, and tells by the time of birth that a pid has been reused."""

    def __init__(self, most: int = _MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._guard = threading.Lock()
        self._known: dict[int, _Known] = {}

    def find(self, pid: int) -> Process:
        """The process that has this pid (in this process's pid namespace) now."""
        import psutil

        now = self._clock()
        known = self._known.get(pid)
        try:
            handle = psutil.Process(pid)
            born = handle.create_time()
            if known is not None and known.born == born and now - known.read_at < _KEPT_S:
                return known.process
            with handle.oneshot():
                process = Process(handle.name(), _join(handle.cmdline()))
            if not handle.is_running():  # the pid may have passed on between the two reads
                process = UNKNOWN
        except (psutil.Error, OSError, ValueError, OverflowError):
            process = UNKNOWN
        with self._guard:
            self._known.pop(pid, None)
            if process is not UNKNOWN:
                self._known[pid] = _Known(born, now, process)
                while len(self._known) > self._most:
                    del self._known[next(iter(self._known))]
        return process


def find_by_name(patterns: Collection[str], proc: str = "/proc") -> dict[str, frozenset[int]]:
    """The processes that have one of these names now, or names like these patterns (* ? [...]), by
    pattern."""
    found: dict[str, set[int]] = {pattern: set() for pattern in patterns}
    if not found:
        return {}
    for entry in os.listdir(proc):
        if entry.isdigit() and (name := read_name(int(entry), proc)):
            for pattern, pids in found.items():
                if name == pattern or fnmatchcase(name, pattern):
                    pids.add(int(entry))
    return {pattern: frozenset(pids) for pattern, pids in found.items()}


def read_name(pid: int, proc: str = "/proc") -> str:
    """The short name that ps(1) shows; empty for a process that is gone. The kernel cuts it off after 15
    bytes: then as much more as the name of the program has."""
    try:
        with open(f"{proc}/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().rstrip("\n")
        if len(name) >= _COMM_LENGTH:
            with open(f"{proc}/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                program = os.path.basename(file.read(4096).partition("\0")[0])
            name = program if program.startswith(name) else name
    except OSError:
        return ""
    return name


def _join(arguments: list[str]) -> str:
    # A process may write anything there; what breaks a line or drives a terminal does not get through.
    text = " ".join(arguments)[: 4 * _COMMAND_LENGTH].strip()
    return "".join(char if char.isprintable() else "?" for char in text)[:_COMMAND_LENGTH]


def sees_host_pids(proc: str = "/proc") -> bool:
    """True if /proc is that of the host's own pid namespace: its pids are those that BPF programs see."""
    # A /proc from elsewhere shows its own first process; where that may not be looked at, ours has to do.
    for process in ("1", "self"):
        with contextlib.suppress(OSError):
            return os.stat(f"{proc}/{process}/ns/pid").st_ino == _HOST_PID_NAMESPACE
    return False


def is_stopped(pid: int, proc: str = "/proc") -> bool:
    """True if a signal, or a debugger, has stopped the process: it does nothing until it is continued."""
    try:
        with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def read_own_pid() -> int:
    """This process's id in /proc, which need not be of this process's own pid namespace."""
    return int(os.readlink("/proc/self"))


def read_own_usage() -> Usage:
    """Memory, CPU time and descriptors of this process."""
    import psutil

    own = psutil.Process()
    with own.oneshot():
        times = own.cpu_times()
        return Usage(own.memory_info().rss, round(times.user + times.system, 3), own.num_fds())


def read_own_age() -> float:
    """Seconds since this process was started."""
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def share_memory_among_threads() -> None:
    """Have the C library serve all threads from one heap (M_ARENA_MAX, mallopt(3)), where they use again
    what another one has freed. Each thread gets a heap of its own else; few of ours run at the same time."""
    import ctypes

    with contextlib.suppress(AttributeError):  # not of every C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_memory_back() -> None:
    """Have the C library return to the kernel what it keeps of freed memory (malloc_trim(3)). What a crowd
    took for a moment would stay with this process else."""
    import ctypes

    with contextlib.suppress(AttributeError):  # not of every C library
        ctypes.CDLL(None).malloc_trim(0)


def read_peak() -> int:
    """Bytes of memory that this process, or a child of it that has ended, has had at most.

    Not getrusage(2) for the process itself: that counts what its parent had when it called execve(2).
    """
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        own = re.search(r"^VmHWM:\s+(\d+) kB$", file.read(), re.M)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(children, int(own[1]) if own else 0)


def read_machine_cpu_seconds() -> float:
    """CPU time of the whole machine so far: most of a packet's is spent in interrupts, which no process is
    charged for. What a hypervisor gave to others is not in it."""
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def read_idle_seconds(cpus: Collection[int]) -> float:
    """For how long these CPUs have been idle, altogether. Whoever waits for a disk wants none."""
    import psutil

    return sum(
        float(times.idle + times.iowait)
        for cpu, times in enumerate(psutil.cpu_times(percpu=True))
        if cpu in cpus
    )
