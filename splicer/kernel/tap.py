# SPDX-License-Identifier: Apache-2.0
"""The tap: a program that verdict goes on in while somebody wants to see what is redirected.

verdict has a map of programs with one place (`taps`), which is empty. A tail call into an empty place costs a
few instructions. Whoever taps has a lock on the directory of pinned programs, which ends with his process. If
a program stands there and nobody has the lock, the daemon takes it away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from splicer.errors import NOT_RUNNING, SplicerError
from splicer.kernel import compiler, libbpf, objects
from splicer.kernel.cache import Cache
from splicer.kernel.layout import TAP_FLOW, TAP_PORTS, TAP_SETTINGS, TapChoice
from splicer.kernel.loader import Linker
from splicer.kernel.programs import MAPS, TAP, TAP_MAPS
from splicer.kernel.ring import Ring
from splicer.kernel.store import Store
from splicer.logs import Logger

MAX_FLOWS = 65536
PIECE = 16384
"""Bytes of one record at most."""
_PLACE = struct.pack("=i", 0)
_NAME = struct.Struct("=Q")
_TWO = (struct.pack("=i", 0), struct.pack("=i", 1))


@dataclass(frozen=True)
class TapPlan:
    """Whose programs (`pin_dir`), `buffer` in bytes, a power of two; so many bytes of each piece are `kept`.
    `ports`: only connections with one of these. `choose`: the command decides, connection by connection."""

    pin_dir: str
    buffer: int
    kept: int
    ports: frozenset[int] = frozenset()
    choose: bool = False
    cache_dir: str = "off"


class Tap:
    """One that is open. `close` ends it, and so does the end of the process."""

    def __init__(self, plan: TapPlan, log: Logger, require_compiler: Callable[[], None]) -> None:
        """Raises SplicerError: nothing is loaded, somebody else taps, or the kernel refuses."""
        self._plan = plan
        self._files = contextlib.ExitStack()
        try:
            self._open(log, require_compiler)
        except BaseException:
            self._files.close()
            raise

    def _open(self, log: Logger, require_compiler: Callable[[], None]) -> None:
        plan = self._plan
        try:
            verdict = self._keep(libbpf.open_pin(os.path.join(plan.pin_dir, "programs", "verdict")))
            self._verdict = objects.read_program(verdict).id
            pinned = {
                name: self._keep(libbpf.open_pin(os.path.join(plan.pin_dir, "maps", name))) for name in MAPS
            }
        except OSError as error:
            raise SplicerError(
                f"no programs of splicer are loaded ({plan.pin_dir})",
                hint="start them with: splicer run; if they are elsewhere: --pin-dir",
                exit_code=NOT_RUNNING,
            ) from error
        self._pairs = libbpf.Map(os.dup(pinned["pairs"]))
        self._files.callback(self._pairs.close)
        self._files.enter_context(_claim(plan.pin_dir))
        sources = compiler.collect(self._pairs.max_entries)
        built = os.readlink(os.path.join(plan.pin_dir, "build"))
        if built not in (sources.name_build(True), sources.name_build(False)):
            raise SplicerError(
                "the programs that are loaded are of another version of splicer than this command",
                hint="restart the daemon, or use the command that belongs to it",
            )
        self._taps = libbpf.Map(os.dup(pinned["taps"]))
        self._files.callback(self._taps.close)
        compiled = Store(sources, Cache(plan.cache_dir), log, require_compiler).fetch()
        sizes = {"tap_flows": MAX_FLOWS, "tap_choices": MAX_FLOWS, "tap_ring": plan.buffer}
        own = {}
        for shape in compiled.maps:
            if shape.name in TAP_MAPS:
                entries = sizes.get(shape.name, shape.max_entries)
                own[shape.name] = self._keep(
                    libbpf.create_like(dataclasses.replace(shape, max_entries=entries, types=0))
                )
        self._flows, self._choices, self._unknown, settings = (
            libbpf.Map(os.dup(own[name]))
            for name in ("tap_flows", "tap_choices", "tap_unknown", "tap_settings")
        )
        for item in (self._flows, self._choices, self._unknown, settings):
            self._files.callback(item.close)
        self.ring = Ring(own["tap_ring"], plan.buffer)
        self._files.callback(self.ring.close)
        ports = sorted(plan.ports) if len(plan.ports) <= TAP_PORTS else []
        choice = TapChoice.UNDECIDED if plan.choose else TapChoice.WANTED
        padded = ports + ports[-1:] * (TAP_PORTS - len(ports)) if ports else [0] * TAP_PORTS
        settings.set(_PLACE, TAP_SETTINGS.pack(choice, min(plan.kept, PIECE), len(ports), *padded))
        with contextlib.closing(Linker(compiled, {**pinned, **own}, False)) as linker:
            program = self._keep(linker.load(TAP))
        try:
            self._taps.set(_PLACE, _NAME.pack(program)[:4])
        except libbpf.KernelError as error:
            raise SplicerError(f"the kernel does not let verdict go on in tap: {error.strerror}") from error

    def _keep(self, fd: int) -> int:
        self._files.callback(os.close, fd)
        return fd

    @property
    def is_of_use(self) -> bool:
        """Are the programs that it belongs to still those that are pinned?"""
        try:
            fd = libbpf.open_pin(os.path.join(self._plan.pin_dir, "programs", "verdict"))
        except OSError:
            return False
        try:
            return objects.read_program(fd).id == self._verdict
        finally:
            os.close(fd)

    def stop(self) -> None:
        """Record nothing more. What is in the ring can still be read."""
        self._taps.delete(_PLACE)

    def choose(self, name: int, choice: TapChoice) -> None:
        """Decide about a connection, by its name."""
        with contextlib.suppress(libbpf.KernelError):  # no room: it is asked about again
            self._choices.set(_NAME.pack(name), struct.pack("=I", choice))

    def is_closed(self, name: int) -> bool:
        """Has the connection no record any more?"""
        return self._pairs.get(_NAME.pack(name)) is None

    def read_missed(self, name: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes and pieces of a connection that found no room: what its client sent, and its server."""
        value = self._flows.get(_NAME.pack(name))
        if value is None:
            return (0, 0), (0, 0)
        fields = TAP_FLOW.unpack(value)
        return (fields[2], fields[4]), (fields[3], fields[5])

    def forget(self, name: int) -> None:
        """Make room for others."""
        self._flows.delete(_NAME.pack(name))
        self._choices.delete(_NAME.pack(name))

    def read_unknown(self) -> tuple[int, int]:
        """Bytes and messages of connections that are more than can be told apart."""
        found = [self._unknown.get(key) or bytes(8) for key in _TWO]
        return _NAME.unpack(found[0])[0], _NAME.unpack(found[1])[0]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stop()
        self._files.close()


class _ClaimedError(SplicerError):
    """Somebody else taps."""


@contextlib.contextmanager
def _claim(pin_dir: str) -> Iterator[None]:
    """Be the only one. Ends with the process. Raises SplicerError."""
    fd = os.open(os.path.join(pin_dir, "programs"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise _ClaimedError("somebody taps already, and there can be one", hint="end the other one") from None
    finally:
        os.close(fd)


def remove_dead(pin_dir: str, taps: libbpf.Map) -> bool:
    """Take away the program of somebody who is gone. One look at a map, if there is none. Raises OSError."""
    if taps.get(_PLACE) is None:
        return False
    try:
        with _claim(pin_dir):
            return taps.delete(_PLACE)
    except _ClaimedError:
        return False
