# SPDX-License-Identifier: Apache-2.0
"""The daemon under test: started for a spliced leg, asked what it did, and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from splicer.bench.model import Load, Record, Sample, Splicing, Workload
from splicer.bench.testbed import Testbed, TestbedError
from splicer.daemon import control
from splicer.kernel import layout
from splicer.kernel.costs import Cost, counting, read_costs
from splicer.kernel.libbpf import Map
from splicer.kernel.settings import SettingsMap

READY_SECONDS = 30.0
# A stream of more messages than the verdict ever counts.
NEVER = 1 << 20
# More than a stream that is bounded by its reader ever has waiting.
ROOMY_MESSAGES, ROOMY_BYTES = 1 << 20, 64 << 20


class Splicer:
    """The daemon, on the test bed's own cgroup, run directory and bpffs."""

    def __init__(
        self, bed: Testbed, command: Sequence[str], arguments: Sequence[str] = (), timed: bool = False
    ) -> None:
        """`command` is that of `splicer`, `arguments` are for its `run`. `timed`: the kernel times its
        programs."""
        self.bed = self._bed = bed
        self.command = self._command = command
        self._arguments = arguments
        self._timed = timed
        self.run_dir = bed.directory / "run"
        self.failures: list[str] = []

    @contextlib.contextmanager
    def running(self, options: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
        ready = self._bed.directory / "ready"
        ready.unlink(missing_ok=True)
        log_path = self._bed.directory / "splicer.log"
        # By a variable, which versions of splicer leave alone that do not know it.
        command = ["env", f"SPLICER_CACHE_DIR={self._bed.directory / 'cache'}", *self._command, "run"]
        command += ["--cgroup", str(self._bed.cgroup), "--run-dir", str(self.run_dir)]
        command += ["--pin-dir", str(self._bed.bpffs / "splicer"), "--ready-file", str(ready)]
        with log_path.open("wb") as log:
            daemon = self._bed.start([*command, *self._arguments, *options], stderr=log)
        deadline = time.monotonic() + READY_SECONDS
        while not ready.exists():
            if daemon.poll() is not None:
                raise TestbedError(f"splicer run failed ({daemon.returncode}): {_tail(log_path)}")
            if time.monotonic() > deadline:
                raise TestbedError(f"splicer run is not ready after {READY_SECONDS:g} s: {_tail(log_path)}")
            time.sleep(0.02)
        try:
            yield daemon
        finally:
            if (status := self._bed.stop(daemon)) != 0:
                # Not an exception: it would hide the one that may be on its way.
                self.failures.append(f"splicer run ended with {status}: {_tail(log_path)}")

    def measure(self, workload: Workload, load: Load) -> tuple[Sample, Splicing]:
        """A leg with the daemon running, and what it did meanwhile."""
        with self.running(workload.daemon_options) as daemon:
            if workload.always_redirects:
                self._hold_on_to_streams()
            before, cpu, begin = self.status()["totals"], cpu_seconds(daemon.pid), time.monotonic()
            with self._timing() as programs:
                sample = workload.measure(self._bed, load)
            busy = (cpu_seconds(daemon.pid) - cpu) / (time.monotonic() - begin)
            totals = self.status()["totals"]
            keys = ("spliced", "redirected_messages", "redirected_bytes", "passed_messages", "rescued")
            counts = {key: totals[key] - before[key] for key in keys}
            refused = {
                reason: count - before["refused"].get(reason, 0)
                for reason, count in totals["refused"].items()
                if count > before["refused"].get(reason, 0)
            }
            return sample, Splicing(
                **counts,
                cpu_percent=round(100 * busy, 1),
                rss_kib=_rss_kib(daemon.pid),
                programs=programs,
                refused=refused,
            )

    @contextlib.contextmanager
    def _timing(self) -> Iterator[dict[str, Cost]]:
        """What each program cost in the context, known when it is left; nothing without --programs."""
        costs: dict[str, Cost] = {}
        if not self._timed:
            yield costs
            return
        with counting():
            before = read_costs(self._bed.bpffs)
            yield costs
            after = read_costs(self._bed.bpffs)
        costs.update({name: cost - before[name] for name, cost in after.items()})

    def _hold_on_to_streams(self) -> None:
        """Lift the bounds at which the verdict lets go of a connection. No option does that: they are written
        into the settings of the loaded programs, as the daemon writes them. Raises TestbedError."""
        with self._map("settings", layout.SETTINGS.size) as settings:
            SettingsMap(settings).write(
                stream_messages=NEVER, queue_messages=ROOMY_MESSAGES, queue_bytes=ROOMY_BYTES
            )

    @contextlib.contextmanager
    def reading_pairs(self) -> Iterator[Callable[[], list[Record]]]:
        """A function that reads all connections: many times a second, which no command could. Raises
        TestbedError."""

        def read() -> list[Record]:
            found = (layout.read_pair(value) for _, value in pairs.items())
            return [
                Record(each.state == layout.STATE_SPLICED, each.born_ns, each.changed_ns) for each in found
            ]

        with self._map("pairs", layout.PAIR.size) as pairs:
            yield read

    @contextlib.contextmanager
    def _map(self, name: str, size: int) -> Iterator[Map]:
        """The daemon's map of that name, and size of its values. Raises TestbedError."""
        paths = list(self._bed.bpffs.rglob(f"maps/{name}"))
        if len(paths) != 1:
            raise TestbedError(f"{len(paths)} maps called {name} below {self._bed.bpffs}, wanted 1")
        with contextlib.closing(Map.open(str(paths[0]))) as found:
            if found.value_size != size:
                raise TestbedError(f"the splicer under test has other {name} than this one")
            yield found

    def status(self) -> dict[str, Any]:
        command = [*self._command, "status", "--json", "--run-dir", str(self.run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TestbedError(f"splicer status failed ({done.returncode}): {done.stderr.strip()}")
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def ask(self, noun: str) -> dict[str, Any]:
        """The same and more, in a hundredth of the time of a command. Raises SplicerError."""
        return control.request(str(self.run_dir), noun, timeout=READY_SECONDS)


def find_splicer(path: str | None) -> list[str]:
    """The command to measure: this splicer, or the one at `path`, with whatever it imports itself. Raises
    TestbedError."""
    if path is None:
        return [sys.executable, "-m", "splicer"]
    if (found := shutil.which(path)) is None:
        raise TestbedError(f"no such command ({path})", hint="name the splicer of a tree: .venv/bin/splicer")
    # What makes Python find this splicer must not make it find this one there as well.
    return ["env", "-u", "PYTHONPATH", str(Path(found).absolute())]


def refuse_company(command: Sequence[str]) -> None:
    """A splicer that serves the whole host would splice the plain legs as well. Raises TestbedError."""
    done = subprocess.run([*command, "status", "--json"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        status = json.loads(done.stdout)
        raise TestbedError(
            f"splicer already runs here (pid {status['pid']}, {status['cgroup']})",
            hint="stop it first; or have it measured as it is: splicer bench --url URL",
        )


def cpu_seconds(pid: int) -> float:
    # Fields after the command name, which may itself contain spaces: utime and stime are the 12th and 13th.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-8:]) or "no output"
