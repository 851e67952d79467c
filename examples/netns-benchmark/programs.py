# SPDX-License-Identifier: Apache-2.0
"""What the BPF programs cost, as the kernel counts it. On a noisy machine that says more than a ratio."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed import TestbedError

BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type, include/uapi/linux/bpf.h


@dataclass(frozen=True)
class Cost:
    """Calls of a program, and nanoseconds spent in them, the kernel's two clock readings included."""

    calls: int
    nanoseconds: int

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(self.calls - earlier.calls, self.nanoseconds - earlier.nanoseconds)


def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("bpf")
    if name is None:
        raise TestbedError("--programs needs libbpf; try: make setup")
    return ctypes.CDLL(name, use_errno=True)


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """A context in which the kernel counts, for all programs. It stops by itself if the benchmark dies.

    Raises TestbedError where it cannot (Linux before 5.8).
    """
    fd = _library().bpf_enable_stats(BPF_STATS_RUN_TIME)
    if fd < 0:
        raise TestbedError(f"cannot have the kernel time BPF programs: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        os.close(fd)


def read_costs(pins: Path) -> dict[str, Cost]:
    """Of each program pinned below a directory so far, by name; the kernel's figures are in fdinfo."""
    library = _library()
    found = {}
    for path in sorted(pins.rglob("programs/*")):
        fd = library.bpf_obj_get(os.fsencode(path))
        if fd < 0:
            raise TestbedError(f"cannot open {path}: {os.strerror(ctypes.get_errno())}")
        try:
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        finally:
            os.close(fd)
        fields = dict(line.split(":", 1) for line in lines)
        found[path.name] = Cost(int(fields["run_cnt"]), int(fields["run_time_ns"]))
    return found
