# SPDX-License-Identifier: Apache-2.0
"""What many connections cost: memory in the kernel and in the daemon, time until all are spliced, CPU time
while nobody asks, `status`, `flows`, a message, a connect and a close, and the end of it all.

Each size has a daemon of its own, with the connections over loopback in a network namespace. Those that hold
them are processes of their own, since a process may have only so many files.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from splicer.bench.progress import Progress
from splicer.bench.splicing import Splicer, cpu_seconds
from splicer.bench.suite import Findings, Workshop
from splicer.bench.testbed import LOADS, Namespace, Testbed, TestbedError
from splicer.errors import SplicerError
from splicer.kernel import libbpf
from splicer.kernel.costs import Cost, counting, read_costs
from splicer.kernel.layout import COUNTERS
from splicer.metrics import page

SIZES = (1_000, 10_000, 100_000)
ADDRESS, FIRST_PORT = "127.0.0.1", 900
# Both ends of a connection are files of one process.
CONNECTIONS_EACH = 8_500
# One cgroup may have seven eighths of the table: see has_room() in bpf/registry.h.
ROOM = (65_536, 131_072, 1_048_576)
SPLICED_PART = 0.98
PATIENCE = 60.0  # seconds
GLANCE = 0.25  # seconds
# So long after it was spliced a pair is looked at more closely (NEW_NS in bpf/watch.c).
NEW = 4.0
# Messages each way, of all processes together.
CHAT_PER_SECOND = 20_000.0
VISITS = 4_000
ASKS = 5
STEPS = 10
# So many are measured once more, scraped and watched.
WATCHED = 1_000
# Prometheus asks all 15 seconds by default, many have it ask all 5.
SCRAPES_EVERY = 5.0  # seconds
WATCHED_FOR = 30.0  # seconds
# What is promised for 100 000 connections, and for as many fewer: bytes, percent of one CPU, seconds.
MOST_BYTES, MOST_CPU, MOST_STATUS_S = 110_000_000, 3.0, 0.3


@dataclass(frozen=True)
class Answering:
    """What a command takes: seconds, bytes more in the daemon, and at most in the command."""

    seconds: float
    daemon_more: int
    command_most: int


@dataclass(frozen=True)
class Watched:
    """A daemon that is scraped every five seconds, while somebody has `splicer top`: percent of a CPU, bytes
    resident, and how often it was scraped."""

    cpu: float
    daemon: int
    scrapes: int


@dataclass(frozen=True)
class Scale:
    """What so many connections cost. Memory in bytes, CPU in percent of one. `maps` are by name, as the
    kernel accounts for them (memlock in fdinfo). `daemon` is what is resident, and `daemon_own` that part of
    it that is no file's. `adopted_s`: from the first message until nearly all are
    spliced; `talked_s` of these they took to become hot. `connect_us` and `close_us` are of one more
    connection, `register_ns` and `verdict_ns` of a run of these programs, as the kernel counts."""

    connections: int
    spliced: int
    maps_empty: int
    maps: Mapping[str, int]
    daemon_empty: int
    daemon: int
    daemon_own: int
    connected_s: float
    talked_s: float
    adopted_s: float
    cpu_empty: float
    cpu_silent: float
    cpu_busy: float
    status: Answering
    flows: Answering
    explain: Answering
    verdict_ns: float
    register_ns: float
    connect_us: float
    close_us: float
    stopped_s: float
    left: int | None
    watched: Watched | None = None

    @property
    def maps_total(self) -> int:
        return sum(self.maps.values())

    def failures(self) -> list[str]:
        """What is more than is promised."""
        total, found = self.maps_total + self.daemon, []
        if total > MOST_BYTES:
            found.append(f"{total / 1e6:.0f} MB, wanted <= {MOST_BYTES / 1e6:.0f}")
        if max(self.cpu_silent, self.cpu_busy) > MOST_CPU:
            found.append(f"{max(self.cpu_silent, self.cpu_busy):.1f} % of a CPU, wanted <= {MOST_CPU:g}")
        if self.status.seconds > MOST_STATUS_S:
            found.append(f"status takes {self.status.seconds:.2f} s, wanted <= {MOST_STATUS_S:g}")
        return [f"scale: {self.connections} connections: {each}" for each in found]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "maps_total": self.maps_total}


class Throngs:
    """The processes that hold the connections."""

    def __init__(self, bed: Testbed, namespace: Namespace, number: int) -> None:
        self._bed = bed
        count = -(-number // CONNECTIONS_EACH)
        shares = [len(range(start, number, count)) for start in range(count)]
        program = [sys.executable, "-I", str(LOADS / "throng.py"), ADDRESS]
        self._children = [
            bed.start(
                [*program, str(FIRST_PORT + place), str(share)],
                namespace,
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
            )
            for place, share in enumerate(shares)
        ]

    def __len__(self) -> int:
        return len(self._children)

    def close(self) -> None:
        for child in self._children:
            self._bed.stop(child)

    def wait(self) -> list[list[str]]:
        """What each has to say next. Raises TestbedError."""
        return [self._listen(child) for child in self._children]

    def _listen(self, child: subprocess.Popen[bytes]) -> list[str]:
        assert child.stdout is not None
        if not (line := child.stdout.readline()):
            raise TestbedError(
                "the connections cannot be made, or do not carry what they are given",
                hint="ulimit -Hn says how many files a process may have",
            )
        return line.decode().split()

    def have(self, command: str) -> None:
        """Have all of them do something, to its end."""
        for child in self._children:
            self._tell(child, command)
        self.wait()

    def have_first(self, command: str) -> list[str]:
        """The same of one of them, and what it says."""
        self._tell(self._children[0], command)
        return self._listen(self._children[0])

    def _tell(self, child: subprocess.Popen[bytes], command: str) -> None:
        assert child.stdin is not None
        child.stdin.write(command.encode() + b"\n")
        child.stdin.flush()


class Subject:
    """The daemon under measurement."""

    def __init__(self, splicer: Splicer, pid: int) -> None:
        self._splicer = splicer
        self._bed = splicer.bed
        self.pid = pid
        self._maps = self._bed.bpffs / "splicer" / "maps"

    def read_maps(self) -> dict[str, int]:
        """Bytes of each map, as the kernel accounts for it."""
        found = {}
        for path in sorted(self._maps.iterdir()):
            fd = libbpf.open_pin(str(path))
            try:
                lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            finally:
                os.close(fd)
            fields = dict(line.split(":", 1) for line in lines)
            found[path.name] = int(fields["memlock"])
        return found

    def count_spliced(self) -> int:
        counters = libbpf.Map.open(str(self._maps / "counters"))
        with contextlib.closing(counters):
            spliced, drained = (
                sum(
                    memoryview(counters.get(COUNTERS.index(name).to_bytes(4, sys.byteorder)) or b"").cast("Q")
                )
                for name in ("spliced", "drained")
            )
        return spliced - drained

    def read_memory(self, what: str = "VmRSS") -> int:
        """A field of /proc/PID/status that is in kB, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(what)

    def measure_cpu(self, seconds: float) -> float:
        """Percent of one CPU, over so many seconds."""
        before, begun = cpu_seconds(self.pid), time.monotonic()
        time.sleep(seconds)
        return 100 * (cpu_seconds(self.pid) - before) / (time.monotonic() - begun)

    def measure_command(self, *arguments: str) -> Answering:
        """The command as its users call it: the median of some."""
        took, most, before = [], 0, self.read_memory()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        for _ in range(ASKS):
            begun = time.monotonic()
            child = self._bed.start(
                [*self._splicer.command, *arguments, f"--run-dir={self._splicer.run_dir}"]
            )
            _, status, usage = os.wait4(child.pid, 0)
            took.append(time.monotonic() - begun)
            child.returncode = os.waitstatus_to_exitcode(status)
            self._bed.stop(child)
            most = max(most, usage.ru_maxrss * 1024)
            if child.returncode:
                raise TestbedError(f"splicer {arguments[0]} ended with {child.returncode}")
        return Answering(statistics.median(took), self.read_memory("VmHWM") - before, most)

    def find_one(self, namespace: Namespace) -> tuple[str, str]:
        """Both addresses of some connection."""
        command = [*self._splicer.command, "flows", "--json", "--limit=1"]
        said = self._bed.run([*command, f"--run-dir={self._splicer.run_dir}"], namespace)
        (flow,) = json.loads(said)["flows"]
        return flow["local"], flow["remote"]

    def read_left(self) -> int | None:
        """How many connections the stopped daemon said to have left."""
        for line in reversed((self._bed.directory / "splicer.log").read_text(errors="replace").splitlines()):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "drained":
                    return int(event["unread_connections"])
        return None


def measure(splicer: Splicer, number: int, seconds: float, progress: Progress) -> Scale:
    """One size. `seconds`: for each look at the daemon's CPU time."""
    bed = splicer.bed
    room = next((room for room in ROOM if number <= room - room // 8), ROOM[-1])
    namespace = _make_namespace(bed, f"scale{number}")

    def step(what: str) -> None:
        progress.step(f"{number} connections: {what}")

    with contextlib.ExitStack() as opened:
        daemon = opened.enter_context(
            splicer.running([f"--max-connections={room}", "--docker=off", "--log-format=json"])
        )
        subject = Subject(splicer, daemon.pid)
        step("none yet")
        time.sleep(2)
        maps_empty, daemon_empty = sum(subject.read_maps().values()), subject.read_memory()
        cpu_empty = subject.measure_cpu(seconds)
        step("they connect")
        begun = time.monotonic()
        throngs = Throngs(bed, namespace, number)
        opened.callback(throngs.close)
        throngs.wait()
        connected = time.monotonic() - begun
        step("they become hot")
        talked, adopted, spliced = _splice(subject, throngs, number)
        step("silent")
        time.sleep(NEW)
        cpu_silent = subject.measure_cpu(seconds)
        maps, memory, own = subject.read_maps(), subject.read_memory(), subject.read_memory("RssAnon")
        step("busy")
        throngs.have(f"chat {CHAT_PER_SECOND / len(throngs)}")
        # Each has its turn once, for those that are not spliced yet.
        time.sleep(1 + number / CHAT_PER_SECOND)
        cpu_busy = subject.measure_cpu(seconds)
        verdict = _measure_program(bed, "verdict", lambda: time.sleep(seconds / 2))
        throngs.have("chat 0")
        step("others come and go")
        visited: list[str] = []
        register = _measure_program(
            bed, "register", lambda: visited.extend(throngs.have_first(f"visit {VISITS}"))
        )
        step("status")
        status = subject.measure_command("status")
        step("flows")
        flows = subject.measure_command("flows", "--json")
        step("explain")
        explain = subject.measure_command("explain", *subject.find_one(namespace))
        step("the stop")
        begun = time.monotonic()
        bed.stop(daemon, patience=60)
        stopped = time.monotonic() - begun
        left = subject.read_left()
    return Scale(
        connections=number,
        spliced=spliced,
        maps_empty=maps_empty,
        maps=maps,
        daemon_empty=daemon_empty,
        daemon=memory,
        daemon_own=own,
        connected_s=connected,
        talked_s=talked,
        adopted_s=adopted,
        cpu_empty=cpu_empty,
        cpu_silent=cpu_silent,
        cpu_busy=cpu_busy,
        status=status,
        flows=flows,
        explain=explain,
        verdict_ns=verdict,
        register_ns=register,
        connect_us=float(visited[1]),
        close_us=float(visited[2]),
        stopped_s=stopped,
        left=left,
    )


def _make_namespace(bed: Testbed, name: str) -> Namespace:
    namespace = bed.add_namespace(name)
    for path, value in (("ip_local_port_range", "1024 65535"), ("tcp_max_tw_buckets", "2048")):
        bed.run(["sh", "-c", f"echo {value} >/proc/sys/net/ipv4/{path}"], namespace)
    return namespace


def measure_watched(splicer: Splicer, progress: Progress) -> Watched:
    """WATCHED connections that are spliced and talk."""
    bed = splicer.bed
    namespace = _make_namespace(bed, "watched")
    address = bed.directory / "metrics.sock"
    progress.step(f"{WATCHED} connections: watched")
    with contextlib.ExitStack() as opened:
        daemon = opened.enter_context(
            splicer.running([f"--metrics={address}", "--docker=off", "--log-format=json"])
        )
        subject = Subject(splicer, daemon.pid)
        throngs = Throngs(bed, namespace, WATCHED)
        opened.callback(throngs.close)
        throngs.wait()
        _splice(subject, throngs, WATCHED)
        throngs.have(f"chat {CHAT_PER_SECOND / len(throngs)}")
        time.sleep(NEW)
        top = bed.start([*splicer.command, "top", "--json", f"--run-dir={splicer.run_dir}"])
        opened.callback(bed.stop, top)
        before, begun, scrapes = cpu_seconds(daemon.pid), time.monotonic(), 0
        while time.monotonic() < begun + WATCHED_FOR:
            _scrape(address)
            scrapes += 1
            time.sleep(max(0.0, begun + scrapes * SCRAPES_EVERY - time.monotonic()))
        cpu = 100 * (cpu_seconds(daemon.pid) - before) / (time.monotonic() - begun)
        if top.poll() is not None:
            raise TestbedError(f"splicer top ended with {top.returncode}")
        memory = subject.read_memory()
        throngs.have("chat 0")
    return Watched(cpu, memory, scrapes)


def _can_be_scraped(workshop: Workshop) -> bool:
    """Says so if not."""
    try:
        page.require()
    except SplicerError as error:
        workshop.write(f"not scraped: {error.message}")
        return False
    return True


def _scrape(address: Path) -> None:
    """Raises TestbedError if there are no metrics."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(address))
        peer.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        said = b"".join(iter(lambda: peer.recv(1 << 16), b""))
    if b"\nsplicer_" not in said:
        raise TestbedError("there are no metrics to scrape")


def _splice(subject: Subject, throngs: Throngs, number: int) -> tuple[float, float, int]:
    """Have them talk until nearly all are spliced: seconds of the talk that makes them hot, seconds from its
    beginning until they are spliced, and how many are."""
    begun = time.monotonic()
    throngs.have("talk 20")
    talked = time.monotonic() - begun
    seen = 0
    while (spliced := subject.count_spliced()) < SPLICED_PART * number:
        if time.monotonic() > begun + PATIENCE:
            break
        time.sleep(GLANCE)
        if spliced <= seen:
            # What was not announced, for want of room in the ring buffer, is so at the next read.
            throngs.have("talk 1")
        seen = spliced
    return talked, time.monotonic() - begun, spliced


def _measure_program(bed: Testbed, name: str, load: Callable[[], None]) -> float:
    """Nanoseconds of one of its runs under that load."""
    with counting():
        before = read_costs(bed.bpffs).get(name, Cost(0, 0))
        load()
        spent = read_costs(bed.bpffs)[name] - before
    return spent.nanoseconds / max(spent.calls, 1)


def render(results: Sequence[Scale]) -> list[str]:
    """A table: a column for each size."""

    def size(value: int) -> str:
        return f"{value / 1e6:.1f} MB"

    def answer(found: Answering) -> str:
        return f"{found.seconds:.2f} s"

    rows: tuple[tuple[str, Callable[[Scale], str]], ...] = (
        ("spliced", lambda s: f"{s.spliced:,}"),
        ("maps, before any connection", lambda s: size(s.maps_empty)),
        ("maps", lambda s: size(s.maps_total)),
        ("  pairs", lambda s: size(s.maps["pairs"])),
        ("  seeds", lambda s: size(s.maps["seeds"])),
        ("  spliced", lambda s: size(s.maps["spliced"])),
        ("daemon, before", lambda s: size(s.daemon_empty)),
        ("daemon", lambda s: size(s.daemon)),
        ("  no file's", lambda s: size(s.daemon_own)),
        ("maps and daemon", lambda s: size(s.maps_total + s.daemon)),
        ("made within", lambda s: f"{s.connected_s:.1f} s"),
        ("hot after", lambda s: f"{s.talked_s:.1f} s"),
        ("spliced after", lambda s: f"{s.adopted_s:.1f} s"),
        ("CPU, before", lambda s: f"{s.cpu_empty:.1f} %"),
        ("CPU, all silent", lambda s: f"{s.cpu_silent:.1f} %"),
        ("CPU, busy", lambda s: f"{s.cpu_busy:.1f} %"),
        ("status", lambda s: answer(s.status)),
        ("  daemon more", lambda s: size(s.status.daemon_more)),
        ("flows --json", lambda s: answer(s.flows)),
        ("  daemon more", lambda s: size(s.flows.daemon_more)),
        ("  the command", lambda s: size(s.flows.command_most)),
        ("explain, of one", lambda s: answer(s.explain)),
        ("a verdict", lambda s: f"{s.verdict_ns:.0f} ns"),
        ("a run of register", lambda s: f"{s.register_ns:.0f} ns"),
        ("a connect", lambda s: f"{s.connect_us:.1f} us"),
        ("a close, both ends", lambda s: f"{s.close_us:.1f} us"),
        ("stopped within", lambda s: f"{s.stopped_s:.1f} s"),
        ("  left", lambda s: "?" if s.left is None else str(s.left)),
        ("scraped, and with top: CPU", lambda s: "-" if s.watched is None else f"{s.watched.cpu:.1f} %"),
        ("  daemon", lambda s: "-" if s.watched is None else size(s.watched.daemon)),
    )
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "".join(f"{s.connections:>13,}" for s in results)]
    return lines + [f"{name:<{width}}" + "".join(f"{read(s):>13}" for s in results) for name, read in rows]


def run(workshop: Workshop) -> Findings:
    """The suite `scale`."""
    options = workshop.options
    sizes = (options.connections,) if options.connections else SIZES
    results = []
    workshop.progress.begin(STEPS * len(sizes) + sizes.count(WATCHED))
    for number in sizes:
        with workshop.splicing() as splicer:
            found = measure(splicer, number, options.seconds or 8.0, workshop.progress)
        if number == WATCHED and _can_be_scraped(workshop):
            with workshop.splicing() as splicer:
                found = replace(found, watched=measure_watched(splicer, workshop.progress))
        results.append(found)
    workshop.write("\n".join(render(results)))
    failures = [failure for found in results for failure in found.failures()] if options.check else []
    return Findings("scale", [found.to_json() for found in results], failures=failures)
