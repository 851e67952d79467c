# SPDX-License-Identifier: Apache-2.0
"""Where programs to load come from: the cache, or the compiler. Has them loaded by a child (loader.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from splicer.errors import FAILURE, SplicerError
from splicer.kernel import answer
from splicer.kernel.cache import Cache, CacheError
from splicer.kernel.compiled import Compiled
from splicer.kernel.compiler import Sources, collect
from splicer.logs import Logger

_LOAD_TIMEOUT_S = 120


class Store:
    """The programs in the state in which they can be loaded: from the cache, or from the compiler."""

    def __init__(
        self, sources: Sources, cache: Cache, log: Logger, require_compiler: Callable[[], None]
    ) -> None:
        """`require_compiler` raises SplicerError where nothing can be compiled."""
        self.sources = sources
        self._cache = cache
        self._name = sources.name_compiled()
        self._log = log
        self._require_compiler = require_compiler
        self._compiled: Compiled | None = None

    def prepare(self) -> None:
        """Make sure that there will be something to load. Raises SplicerError."""
        try:
            self._compiled = self._cache.read(self._name)
        except CacheError as error:
            self._reject(str(error))
        if self._compiled is None:
            self._require_compiler()

    def _reject(self, why: str) -> None:
        self._log.warning("cache_unusable", path=self._cache.locate(self._name), why=why)

    def load(self, request: dict[str, Any], lock: int) -> dict[str, str]:
        """Have them loaded and pinned. Returns which programs the kernel refused that splicer does without,
        and why."""
        if self._compiled is not None:
            try:
                reply = _run_loader({**request, "compiled": self._compiled.to_document()}, lock, self._log)
                self._log.info("programs_from_cache", path=self._cache.locate(self._name))
                return _read_missing(reply, self._log)
            except SplicerError as error:
                # Whatever it is: with what is compiled now it can only be better.
                self._reject(error.message)
                self._require_compiler()
        self._log.info("compiling", note="this takes some seconds")
        compiled = {"text": self.sources.text, "flags": self.sources.flags}
        reply = _run_loader({**request, **compiled}, lock, self._log)
        self._keep(Compiled.from_document(reply["compiled"]))
        return _read_missing(reply, self._log)

    def fetch(self) -> Compiled:
        """The programs, for somebody who loads one of them. Raises SplicerError."""
        self.prepare()
        if self._compiled is None:
            self._log.info("compiling", note="this takes some seconds")
            request = {"compile": True, "text": self.sources.text, "flags": self.sources.flags}
            self._compiled = Compiled.from_document(_run_loader(request, None, self._log)["compiled"])
            self._keep(self._compiled)
        return self._compiled

    def _keep(self, compiled: Compiled) -> None:
        try:
            self._cache.write(self._name, compiled)
        except CacheError as error:
            path = self._cache.locate(self._name)
            if error.is_read_only:  # as a container's file system may well be
                self._log.info("cache_not_written", path=path, why=str(error))
            else:
                self._log.warning("cache_not_written", path=path, why=str(error))


def _run_loader(request: dict[str, Any], lock: int | None, log: Logger | None = None) -> dict[str, Any]:
    """Have the child load; raise what it reports. It holds the lock, too, for as long as it lives. Returns
    what it replies."""
    # -P keeps the working directory out of the child's module path.
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "splicer.kernel.loader"],
            input=json.dumps({**request, "parent": os.getpid()}),
            pass_fds=() if lock is None else (lock,),
            capture_output=True,
            text=True,
            timeout=_LOAD_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except subprocess.TimeoutExpired:
        raise SplicerError(f"the loader did not come to an end within {_LOAD_TIMEOUT_S} s") from None
    try:
        reply: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise SplicerError(f"the loader failed (exit code {child.returncode}): {last}") from None
    if reply.get("log") and log is not None:
        log.debug("loader_log", text=reply["log"])
    if not reply["ok"]:
        raise SplicerError(
            reply["error"], hint=reply.get("hint"), exit_code=int(reply.get("exit_code", FAILURE))
        )
    return reply


@dataclass(frozen=True)
class Rehearsal:
    """What came of compiling and loading everything, and letting go of it again.

    `refused`: the programs that the kernel refuses, and how that is said, with a hint. `answered`: the class
    that sockets of splicer's would see where the programs are attached that answer FIONREAD; empty if they
    are not to be, or cannot be, and then `unanswered` says why not.
    """

    refused: Mapping[str, tuple[str, str]]
    answered: str = ""
    unanswered: str = ""


def rehearse(max_connections: int, *, answer: bool) -> Rehearsal:
    """Compile and load all programs as `splicer run` would where nothing is kept, with those that answer
    FIONREAD if `answer`. Pins nothing, and attaches nothing but those, for a moment. Takes some seconds.

    Raises SplicerError if they do not compile, or something else is missing.
    """
    sources = collect(max_connections)
    request = {"rehearse": True, "text": sources.text, "flags": sources.flags, "answer": answer}
    reply = _run_loader(request, None)
    refused = {name: (str(error), str(hint or "")) for name, (error, hint) in reply["refused"].items()}
    return Rehearsal(refused, reply["answered"], reply["unanswered"])


def _read_missing(reply: Mapping[str, Any], log: Logger) -> dict[str, str]:
    missing: dict[str, str] = reply["missing"]
    for name, error in missing.items():
        if name not in answer.NAMES:  # whether they are missed the class decides
            log.warning("program_refused", program=name, error=error)
    return missing
