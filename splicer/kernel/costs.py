# SPDX-License-Identifier: Apache-2.0
"""What BPF programs cost, as the kernel counts it. On a noisy machine that says more than ratios of times."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splicer.errors import SplicerError
from splicer.kernel.libbpf import KernelError, check, get_library, open_pin

_RUN_TIME = 0  # BPF_STATS_RUN_TIME, include/uapi/linux/bpf.h


@dataclass(frozen=True)
class Cost:
    """Calls of a program, and nanoseconds spent in them, the kernel's two clock readings included."""

    calls: int
    nanoseconds: int

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(self.calls - earlier.calls, self.nanoseconds - earlier.nanoseconds)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """A context in which the kernel counts, for all programs of the host. It stops by itself if this process
    dies. Raises SplicerError where it cannot (Linux before 5.8)."""
    try:
        fd = check(get_library().bpf_enable_stats(_RUN_TIME), "count the runs of programs")
    except KernelError as error:
        raise SplicerError(f"cannot have the kernel time BPF programs: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(fd)


def read_costs(pins: Path) -> dict[str, Cost]:
    """Of each program pinned below a directory so far, by name. Raises SplicerError."""
    found = {}
    for path in sorted(pins.rglob("programs/*")):
        try:
            fd = open_pin(str(path))
        except KernelError as error:
            raise SplicerError(f"cannot open {path}: {error.strerror}") from error
        try:
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        finally:
            os.close(fd)
        fields = dict(line.split(":", 1) for line in lines)
        found[path.name] = Cost(int(fields["run_cnt"]), int(fields["run_time_ns"]))
    return found
