# SPDX-License-Identifier: Apache-2.0
"""A bpffs of the tests' own, and what the kernel holds of programs, maps and links."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from splicer.errors import SplicerError
from splicer.host.cgroups import read_mounts
from splicer.kernel import layout, libbpf
from support.pauses import Stopwatch

BPF_STATS_RUN_TIME = 0  # enum bpf_stats_type, include/uapi/linux/bpf.h
KINDS = ("prog", "map", "link")
_HELD = re.compile(r"^(prog|map|link)_id:\s*(\d+)", re.MULTILINE)


class Bpffs:
    """A BPF file system mounted on `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
        # A kernel with CONFIG_BPF_PRELOAD puts two iterators of its own into every new bpffs.
        self._preloaded = set(path.rglob("*"))

    def pins(self) -> list[Path]:
        """Every file and directory below the mount point that was not there from the start."""
        return sorted(set(self.path.rglob("*")) - self._preloaded)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@dataclass(frozen=True)
class BpfObject:
    kind: str
    id: int
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id} {self.name}"


def list_objects() -> dict[tuple[str, int], BpfObject]:
    """Every program, map and link in the kernel, by (kind, id)."""
    found = {}
    for kind in KINDS:
        for entry in _bpftool("-j", kind, "show"):
            name = str(entry.get("name") or entry.get("type") or "")
            found[kind, int(entry["id"])] = BpfObject(kind, int(entry["id"]), name)
    return found


def list_pinned(bpffs: Path) -> set[tuple[str, int]]:
    """Objects pinned below `bpffs`, as (kind, id)."""
    return {
        (kind, int(entry["id"]))
        for kind in KINDS
        for entry in _bpftool("-j", "-f", kind, "show")
        if any(Path(pin).is_relative_to(bpffs) for pin in entry.get("pinned", []))
    }


def list_foreign(own_pids: set[int], own_bpffs: Path) -> set[tuple[str, int]]:
    """Objects that belong to somebody else: held by a process not ours, or pinned in a bpffs not ours, also
    in one that only another mount namespace has.

    Whatever else such a program uses or such a link attaches counts as foreign too.
    """
    foreign: set[tuple[str, int]] = set()
    for process in list_processes():
        if int(process.name) not in own_pids:
            foreign |= list_held(process)
    for pin, found in list_pins():
        if not pin.is_relative_to(own_bpffs):
            foreign |= found
    return foreign | list_used(foreign)


def list_used(objects: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """The maps that the programs among `objects` use."""
    return {
        ("map", int(map_id))
        for entry in _bpftool("-j", "prog", "show")
        if ("prog", int(entry["id"])) in objects
        for map_id in entry.get("map_ids", [])
    }


def find_leftovers(
    before: dict[tuple[str, int], BpfObject], own_pids: set[int], own_bpffs: Path, timeout: float = 15.0
) -> list[BpfObject]:
    """Objects made since `before` that are nobody else's.

    The kernel frees programs and maps a little after their last user has gone: `timeout` seconds are given,
    not counting pauses of the machine.
    """
    with Stopwatch() as watch:
        while True:
            now = list_objects()
            new = {key: value for key, value in now.items() if key not in before}
            if new:
                foreign = list_foreign(own_pids, own_bpffs)
                # Somebody else may have let go of one between the two looks: of those that are there still.
                still = list_objects()
                new = {key: value for key, value in new.items() if key in still and key not in foreign}
            if not new or watch.seconds > timeout:
                return sorted(new.values(), key=lambda each: (each.kind, each.id))
            time.sleep(0.1)


def list_attached(cgroup: Path) -> list[str]:
    """Types of the programs attached to a cgroup directory itself."""
    return [str(entry.get("attach_type")) for entry in _bpftool("-j", "cgroup", "show", str(cgroup))]


def count_spliced(pin_dir: Path) -> int:
    """How many sockets the pinned SOCKHASH holds."""
    pins = [pin for pin in pin_dir.glob("maps/spliced") if not pin.is_dir()]
    if len(pins) != 1:
        raise RuntimeError(f"expected one pinned map 'spliced' below {pin_dir}, found {pins}")
    done = subprocess.run(
        ["bpftool", "-j", "map", "dump", "pinned", str(pins[0])], capture_output=True, text=True, check=False
    )
    # The values cannot be read from user space and bpftool may end with an error; it lists the keys anyway.
    return done.stdout.count('"key"')


def list_processes() -> list[Path]:
    """The directories of all processes."""
    return [each for each in Path("/proc").iterdir() if each.name.isdigit()]


def list_held(process: Path) -> set[tuple[str, int]]:
    """What a process has open, and the programs that its links attach."""
    held = set()
    try:
        for fd in os.listdir(process / "fd"):
            if "bpf" in os.readlink(process / "fd" / fd):
                held |= _read_ids(process / "fdinfo" / fd)
    except OSError:
        pass  # it ended meanwhile, or is one that not even root may look into
    return held


def list_held_named(pid: int, prefix: str) -> set[tuple[str, int]]:
    """What the process or a descendant of it has open, of objects whose names begin so. Unlike what is new in
    the kernel it is nobody else's: the tests run in two lanes."""
    held: set[tuple[str, int]] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        me = psutil.Process(pid)
        for process in (me, *me.children(recursive=True)):
            held |= list_held(Path(f"/proc/{process.pid}"))
    return {key for key, each in list_objects().items() if key in held and each.name.startswith(prefix)}


@contextlib.contextmanager
def watching_others() -> Iterator[set[tuple[str, int]]]:
    """Objects that are held meanwhile by processes that this one has started neither itself nor through
    others: those of another run of the tests."""
    found: set[tuple[str, int]] = set()
    is_over = threading.Event()

    def look() -> None:
        me = psutil.Process()
        while True:
            own = {me.pid, *(child.pid for child in me.children(recursive=True))}
            seen = {process: list_held(process) for process in list_processes()}
            # One that has begun meanwhile may be ours.
            own |= {child.pid for child in me.children(recursive=True)}
            for process, held in seen.items():
                if int(process.name) not in own:
                    found.update(held)
            if is_over.wait(0.1):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def list_pins() -> list[tuple[Path, set[tuple[str, int]]]]:
    """Every pin in any mount namespace, as its path there, with what it holds."""
    seen, pins = set(), []
    for process in list_processes():
        with contextlib.suppress(OSError, SplicerError):  # it ended meanwhile: another one is there as well
            namespace = os.readlink(process / "ns/mnt")
            if namespace not in seen:
                mounts = read_mounts(process / "mountinfo")
                pins += [
                    pin for each in mounts if each.kind == "bpf" for pin in walk_pins(process, each.point)
                ]
                seen.add(namespace)
    return pins


def walk_pins(process: Path, point: str) -> Iterator[tuple[Path, set[tuple[str, int]]]]:
    """Every pin in the file system mounted on `point`, as a process sees it, with what it holds."""
    root = process / "root"
    for directory, _, names in os.walk(root / point.lstrip("/")):
        for name in names:
            path = Path(directory, name)
            with contextlib.suppress(OSError):  # it is unpinned by now, or something else is mounted there
                fd = libbpf.open_pin(str(path))
                try:
                    yield Path("/") / path.relative_to(root), _read_ids(Path(f"/proc/self/fdinfo/{fd}"))
                finally:
                    os.close(fd)


def _read_ids(fdinfo: Path) -> set[tuple[str, int]]:
    return {(kind, int(number)) for kind, number in _HELD.findall(fdinfo.read_text())}


def _bpftool(*arguments: str) -> list[dict[str, object]]:
    done = subprocess.run(["bpftool", *arguments], capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.strip() or "[]")
    except json.JSONDecodeError:
        raise RuntimeError(f"bpftool {' '.join(arguments)}: {done.stdout}{done.stderr}") from None
    if isinstance(answer, dict):
        raise RuntimeError(f"bpftool {' '.join(arguments)}: {answer}")
    return list(answer)


@contextlib.contextmanager
def counting_runs() -> Iterator[None]:
    """A context in which the kernel counts the runs of all programs."""
    fd = libbpf.get_library().bpf_enable_stats(BPF_STATS_RUN_TIME)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.close(fd)


def read_runs(pin_dir: Path, program: str) -> int:
    """How often a pinned program was run while runs were counted."""
    fd = libbpf.open_pin(str(pin_dir / "programs" / program))
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return int(dict(line.split(":", 1) for line in lines)["run_cnt"])


def read_counter(pin_dir: Path, name: str) -> int:
    """A counter of bpf/types.h, over all CPUs."""
    counters = libbpf.Map.open(str(pin_dir / "maps" / "counters"))
    try:
        raw = counters.get(struct.pack("=I", layout.COUNTERS.index(name)))
    finally:
        counters.close()
    assert raw is not None
    return sum(struct.unpack(f"={len(raw) // 8}Q", raw))
