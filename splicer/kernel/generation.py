# SPDX-License-Identifier: Apache-2.0
"""One generation of loaded programs: its pins, its attachments, how it is taken over and how it ends.

Pins below the pin directory:

    programs/NAME maps/NAME links/NAME   the objects; watch, measure, tally, enlist and census have no link
    build cgroup                         symbolic links whose targets are texts: what was loaded, and where

The links keep the programs attached when the daemon dies. For those that answer FIONREAD see answer.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field

from splicer.errors import SplicerError
from splicer.host.cgroups import Cgroup
from splicer.host.namespaces import Directory
from splicer.kernel import answer, bpffs, compiler, libbpf
from splicer.kernel.cache import OFF, Cache
from splicer.kernel.census import Census, CensusReport
from splicer.kernel.enlist import Enlister
from splicer.kernel.gauge import Gauge
from splicer.kernel.programs import MAPS, MAPS_TO_DRAIN
from splicer.kernel.settings import SettingsMap
from splicer.kernel.store import Store
from splicer.kernel.sweep import Sweeper
from splicer.kernel.volume import VolumeReader
from splicer.logs import Logger

_CGROUP_LINKS = ("register", "guard")
LINKS = (*_CGROUP_LINKS, "observe", "adopt")
# The loader of a daemon that was killed holds the lock until it has died too.
_LOCK_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class LoadPlan:
    """What to load and where to pin it: `pin_dir` on a bpffs, room for `max_connections`. The generation of
    another build is given `drain_timeout` seconds to drain. `debug` logs all that the verifier says.
    `answer`: FIONREAD shall be answered if the kernel lets it. `cache_dir`: where what was compiled is kept
    (see cache.py)."""

    pin_dir: str
    max_connections: int
    drain_timeout: float
    debug: bool = False
    answer: bool = False
    cache_dir: str = OFF


@dataclass
class Generation:
    """Open descriptors of what is pinned and used again. `taken_over`: it was there before this daemon. No
    `enlist`: the kernel refused it, and adopt does its work. No `census`: older connections are not found. No
    `measure`: what waits unread is not known. No `tally`: what TCP carries of living connections is not.
    `unanswered` says why FIONREAD is not answered though it was to be."""

    pin_dir: str
    maps: dict[str, libbpf.Map]
    links: dict[str, int]
    watch: int
    enlist: int | None
    census: int | None
    measure: int | None
    tally: int | None
    taken_over: bool
    unanswered: str = ""
    mounted: str | None = None
    lock: int = -1
    _directory: Directory = field(default_factory=Directory)

    def sweeper(self) -> Sweeper:
        # Earlier builds had an iterator in its place. Without it adopt drains alone, a little later.
        can_run = libbpf.read_program_type(self.watch) == libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT
        return Sweeper(self.links["adopt"], self.watch if can_run else None, self.maps, self._directory)

    def enlister(self, log: Logger) -> Enlister | None:
        """None if enlist is not there, or cannot be run."""
        if self.enlist is None:
            return None
        try:
            return Enlister(self.enlist, self._directory)
        except OSError as error:
            log.warning("enlist_not_run", error=str(error))
            return None

    def gauge(self) -> Gauge | None:
        """None if the kernel refused its program."""
        return None if self.measure is None else Gauge(self.measure)

    def volumes(self) -> VolumeReader:
        return VolumeReader(self.maps, self.tally, self.pin_dir)

    def find_older(
        self, settings: SettingsMap, cgroup: Cgroup
    ) -> Generator[CensusReport | None, None, None] | None:
        """The steps of a census (see class Census). None if the kernel refused its program."""
        if self.census is None:
            return None
        top = 0 if cgroup.is_root else cgroup.id
        census = Census(self.census, self.maps["older"], settings, cgroup=top, directory=self._directory)
        return census.run()

    @property
    def is_answering(self) -> bool:
        """Are the programs attached that answer FIONREAD?"""
        return all(name in self.links for name in answer.NAMES)

    def stop_answering(self, why: str) -> None:
        """Detach them, for this reason. They are of no use."""
        for name in answer.NAMES:
            os.close(self.links.pop(name))
        answer.detach(self.pin_dir)
        answer.note(self.pin_dir, why)
        self.unanswered = why

    def drain(self, timeout: float) -> int:
        """Without a daemon: take everything out, for up to `timeout` seconds. Returns how many pairs are
        left."""
        sweeper = self.sweeper()
        sweeper.settings.write(registering=False)
        left = sweeper.drain(timeout).left
        sweeper.close()
        return left

    def detach(self) -> None:
        """Detach from the cgroup: when this returns, no socket runs what the links attached."""
        for name in _CGROUP_LINKS:
            with contextlib.suppress(libbpf.KernelError):  # unpinning does it too, a moment later
                libbpf.detach(self.links[name])

    def close(self) -> None:
        """Close the descriptors; what is pinned stays."""
        for item in self.maps.values():
            item.close()
        for fd in (*self.links.values(), self.watch, self.enlist, self.census, self.measure, self.tally):
            if fd is not None:
                os.close(fd)
        self.maps.clear()
        self.links.clear()

    def release(self) -> None:
        """Let another daemon have the pin directory."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def unpin(self, *, keep_root: bool = False) -> list[str]:
        """Detach, close and unpin. Ends still in the SOCKHASH keep it alive until they are closed, and what
        answers FIONREAD for them stays attached."""
        self.detach()
        answer.keep(self.pin_dir, self.links, self.maps["spliced"])
        self.close()
        return _remove_pins(self.pin_dir, keep_root=keep_root)

    def remove(self) -> list[str]:
        """The same, and let others have the pin directory."""
        removed = self.unpin()
        self.release()
        bpffs.release(self.mounted)
        return removed


def _path(pin_dir: str, *parts: str) -> str:
    return os.path.join(pin_dir, *parts)


def _read_note(pin_dir: str, name: str) -> str:
    try:
        return os.readlink(_path(pin_dir, name))
    except OSError:
        return ""


def _lock(pin_dir: str) -> int:
    """Descriptor of the pin directory, locked for as long as it is open, here or in the loader. A crash
    releases the lock."""
    os.makedirs(pin_dir, mode=0o700, exist_ok=True)
    fd = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            os.close(fd)
            raise SplicerError(
                f"the pin directory is in use by another splicer ({pin_dir})",
                hint="give this one another --pin-dir",
            ) from error


def is_in_use(pin_dir: str) -> bool:
    """True if a daemon has this pin directory, or `splicer unload` is at work on it. Raises OSError if that
    may not be looked at."""
    fd = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def exists(pin_dir: str) -> bool:
    """True if anything is pinned there, even half a generation. What is left of earlier ones is nothing."""
    left = {os.path.join(pin_dir, name) for name in answer.list_left(pin_dir)}
    return any(names for directory, _, names in os.walk(pin_dir) if directory not in left)


def _remove_pins(pin_dir: str, *, keep_root: bool = False) -> list[str]:
    """Unpin a generation, and what is left of earlier ones whose last end has gone."""
    removed, _ = answer.release(pin_dir)
    return removed + bpffs.remove_tree(pin_dir, keep_root=keep_root, keep=answer.list_left(pin_dir))


def open_pinned(pin_dir: str, needed: Iterable[str] = MAPS) -> Generation:
    """Open a complete generation, with the maps `needed`. Raises KernelError if a piece is missing."""
    maps: dict[str, libbpf.Map] = {}
    links: dict[str, int] = {}
    try:
        for name in needed:
            maps[name] = libbpf.Map.open(_path(pin_dir, "maps", name))
        for name in LINKS:
            links[name] = libbpf.open_pin(_path(pin_dir, "links", name))
        links |= answer.open_links(pin_dir)
        watch = libbpf.open_pin(_path(pin_dir, "programs", "watch"))
        enlist, census, measure, tally = (
            _open_optional(pin_dir, name) for name in ("enlist", "census", "measure", "tally")
        )
    except BaseException:
        for item in maps.values():
            item.close()
        for fd in links.values():
            os.close(fd)
        raise
    unanswered = _read_note(pin_dir, answer.NOTE)
    return Generation(pin_dir, maps, links, watch, enlist, census, measure, tally, True, unanswered)


def _open_optional(pin_dir: str, name: str) -> int | None:
    """A program that the kernel may have refused."""
    path = _path(pin_dir, "programs", name)
    return libbpf.open_pin(path) if os.path.exists(path) else None


def _attach(pin_dir: str, cgroup: Cgroup) -> None:
    target = os.open(cgroup.path, os.O_RDONLY | os.O_DIRECTORY)
    attach: dict[str, Callable[[int], int]] = {
        # adopt does nothing until it is run. register comes last: from then on there are pairs.
        "adopt": libbpf.link_iterator,
        "observe": libbpf.link_tracepoint,
        "guard": lambda program: libbpf.link_cgroup(program, target, libbpf.BPF_CGROUP_SETSOCKOPT),
        "register": lambda program: libbpf.link_cgroup(program, target, libbpf.BPF_CGROUP_SOCK_OPS),
    }
    try:
        for name, link in attach.items():
            with contextlib.ExitStack() as opened:
                try:
                    program = libbpf.open_pin(_path(pin_dir, "programs", name))
                    opened.callback(os.close, program)
                    fd = link(program)
                    opened.callback(os.close, fd)
                    libbpf.pin(fd, _path(pin_dir, "links", name))
                except libbpf.KernelError as error:
                    raise _explain_failure(name, cgroup, error) from error
    finally:
        os.close(target)


def _explain_failure(name: str, cgroup: Cgroup, error: libbpf.KernelError) -> SplicerError:
    hint = None
    if name in _CGROUP_LINKS and error.errno == errno.EPERM:
        hint = "another program may be attached there without BPF_F_ALLOW_MULTI; see: bpftool cgroup tree"
    return SplicerError(f"cannot attach the {name} program ({cgroup.path}): {error.strerror}", hint=hint)


def take_over_or_load(
    plan: LoadPlan, cgroup: Cgroup, log: Logger, require_compiler: Callable[[], None] = lambda: None
) -> Generation:
    """Take over what a dead daemon left if it is the same build on the same cgroup, else load anew.

    A different build is drained and removed first. Before that `require_compiler` is called, which raises
    SplicerError where nothing can be compiled, unless it was compiled earlier. Raises SplicerError; nothing
    is left behind then.
    """
    mounted = bpffs.prepare(plan.pin_dir)
    if mounted:
        log.info("bpffs_mounted", path=mounted)
    lock = _lock(plan.pin_dir)
    try:
        answer.release(plan.pin_dir)
        sources = compiler.collect(plan.max_connections)
        store = Store(sources, Cache(plan.cache_dir), log, require_compiler)
        build = store.sources.name_build(plan.answer)
        generation = _take_over(plan, cgroup, build, log)
        if generation is None:
            store.prepare()
            _replace(plan, build, log)
            generation = _load(plan, cgroup, store, lock, log)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(plan.pin_dir)
        os.close(lock)
        bpffs.release(mounted)
        raise
    generation.lock = lock
    generation.mounted = mounted
    return generation


def _describe(cgroup: Cgroup) -> str:
    return f"{cgroup.id}:{cgroup.path}"


def _take_over(plan: LoadPlan, cgroup: Cgroup, build: str, log: Logger) -> Generation | None:
    """The generation that is pinned, if it is ours."""
    pinned = _read_note(plan.pin_dir, "build")
    if pinned == build and _read_note(plan.pin_dir, "cgroup") == _describe(cgroup):
        with contextlib.suppress(libbpf.KernelError):
            generation = open_pinned(plan.pin_dir)
            log.info("generation_taken_over", build=build)
            return generation
    return None


def _replace(plan: LoadPlan, build: str, log: Logger) -> None:
    """Drain and remove what is pinned."""
    if exists(plan.pin_dir):
        pinned = _read_note(plan.pin_dir, "build")
        left, _ = _drain_and_remove(plan.pin_dir, plan.drain_timeout)
        log.info("generation_replaced", old=pinned, new=build, unread_connections=left)


def _load(plan: LoadPlan, cgroup: Cgroup, store: Store, lock: int, log: Logger) -> Generation:
    build = store.sources.name_build(plan.answer)
    request = {"pin_dir": plan.pin_dir, "answer": plan.answer, "debug": plan.debug}
    try:
        missing = store.load(request, lock)
        if plan.answer:
            _answer(plan.pin_dir, missing)
        os.symlink(build, _path(plan.pin_dir, "build"))
        os.symlink(_describe(cgroup), _path(plan.pin_dir, "cgroup"))
        # The settings map is all zero: attached, and idle until the daemon writes the policy.
        _attach(plan.pin_dir, cgroup)
        generation = open_pinned(plan.pin_dir)
        generation.taken_over = False
        log.info("generation_loaded", build=build)
        return generation
    except BaseException:
        _remove_pins(plan.pin_dir)
        raise


def _answer(pin_dir: str, missing: Mapping[str, str]) -> None:
    """Attach what answers FIONREAD before anything else is attached, or note why not."""
    refused = [missing[name] for name in answer.NAMES if name in missing]
    if refused:
        answer.detach(pin_dir)
    if why := refused[0] if refused else answer.attach(pin_dir):
        answer.note(pin_dir, why)


def _drain_and_remove(pin_dir: str, timeout: float) -> tuple[int, list[str]]:
    """Returns (pairs that could not be drained in time, what was removed)."""
    try:
        generation = open_pinned(pin_dir, MAPS_TO_DRAIN)
    except libbpf.KernelError:
        return 0, _remove_pins(pin_dir, keep_root=True)  # half a generation never spliced anything
    try:
        left = generation.drain(timeout)
    except BaseException:
        generation.close()
        raise
    return left, generation.unpin(keep_root=True)


def unload(pin_dir: str, run_dir: str, timeout: float) -> list[str]:
    """Drain and remove what a dead daemon left behind; returns lines that say what was done.

    The caller holds the instance lock of `run_dir`, so no daemon starts there meanwhile. Raises SplicerError
    if a daemon with another run directory uses the pins.
    """
    if not exists(pin_dir) and not answer.list_left(pin_dir):
        return []
    lock = _lock(pin_dir)
    left = 0
    removed: list[str] = []
    try:
        if exists(pin_dir):
            left, removed = _drain_and_remove(pin_dir, timeout)
        more, ends = answer.release(pin_dir)
        _remove_pins(pin_dir)
    finally:
        os.close(lock)
    lines = [f"removed {path}" for path in removed + more]
    if left:
        lines.append(f"{left} connections have unread redirected bytes; they keep them, and stay as they are")
    if ends:
        lines.append(
            f"FIONREAD is answered for {ends} sockets that stay so until they are closed ({pin_dir})"
        )
    return lines
