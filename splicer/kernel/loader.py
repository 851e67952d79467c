# SPDX-License-Identifier: Apache-2.0
"""Load and pin the BPF programs; run as a short-lived child: `python -m splicer.kernel.loader`.

It compiles them if it has to, and then maps LLVM, which is why it is not done by the daemon. The child reads
one JSON object from stdin:

    pin_dir, answer, debug
    compiled      what was compiled earlier (see class Compiled); or, where there is nothing such,
    text, flags   what to compile
    rehearse      true: pin nothing
    compile       true: load nothing
    parent        it dies with this process

and prints one: {"ok": true, "missing": {program: why it does without}, "compiled": what it has compiled}, or
{"ok": false, "error", "hint", "exit_code", "log"}. What it says of a rehearsal is in class Rehearsal, in
store.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from splicer.errors import FAILURE, UNSUPPORTED, SplicerError
from splicer.host.sessions import end_with_parent
from splicer.kernel import compiler, libbpf, probes
from splicer.kernel.btf import Btf
from splicer.kernel.compiled import Compiled
from splicer.kernel.layout import ENLIST_SIZE, MEASURE_REQUEST, TALLY_REQUEST_SIZE, WATCH_REQUEST_SIZE
from splicer.kernel.programs import ANSWERS, KERNEL_HINT, MAPS, PROGRAMS, TAP, Program, explain_refusal


def _try_to_run(program: Program, fd: int) -> None:
    """watch, measure, tally and enlist are run like this for ever; better know at once that they can be."""
    try:
        if program.name == "watch":
            libbpf.TestRun(fd, WATCH_REQUEST_SIZE).run()
        elif program.name == "measure":
            libbpf.TestRun(fd, MEASURE_REQUEST.size).run()
        elif program.name == "tally":
            libbpf.TestRun(fd, TALLY_REQUEST_SIZE).run()
        elif program.name == "enlist":
            libbpf.PacketRun(fd, ENLIST_SIZE).run(1)
    except libbpf.KernelError as error:
        raise SplicerError(
            f"the kernel loads the {program.name} program and does not run it: {error.strerror}",
            hint=f"this kernel, or a security policy, lacks or forbids BPF_PROG_TEST_RUN; {KERNEL_HINT}",
            exit_code=UNSUPPORTED,
        ) from error


class _Pins:
    """What is pinned below a directory; taken away again if the context is left by an exception."""

    def __init__(self, pin_dir: str) -> None:
        self._pin_dir = pin_dir
        self._pinned: list[str] = []

    def __enter__(self) -> _Pins:
        for directory in ("maps", "programs", "links"):
            os.makedirs(os.path.join(self._pin_dir, directory), mode=0o700, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for path in self._pinned:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def pin(self, fd: int, directory: str, name: str) -> None:
        path = os.path.join(self._pin_dir, directory, name)
        libbpf.pin(fd, path)
        self._pinned.append(path)


class Linker:
    """Loads programs of what was compiled, one by one."""

    def __init__(self, compiled: Compiled, maps: Mapping[str, int], debug: bool) -> None:
        self._compiled = compiled
        self._maps = maps
        self._debug = debug
        self._btf = Btf()
        self._cast = self._btf.find_function("bpf_rdonly_cast")

    def close(self) -> None:
        self._btf.close()

    def load(self, program: Program) -> int:
        """Its descriptor. Raises SplicerError if the kernel refuses it, or does not run it."""
        fd, log = libbpf.load_program(
            program.kind,
            program.name,
            compiler.link_cast(self._compiled.link(program.function, self._maps), self._cast),
            attach_type=program.attach_type,
            btf_id=program.find_target(self._btf),
            verbose=self._debug,
        )
        if fd < 0:
            raise explain_refusal(program, -fd, log)
        _try_to_run(program, fd)
        return fd


def load(
    compiled: Compiled, maps: Mapping[str, int], pin_dir: str, *, debug: bool, answer: bool
) -> dict[str, str]:
    """Load and pin everything below `pin_dir`, with what answers FIONREAD if `answer`; removes what it pinned
    when it fails half-way. Returns which programs the kernel refused that splicer does without, and why."""
    missing: dict[str, str] = {}
    with contextlib.closing(Linker(compiled, maps, debug)) as linker, _Pins(pin_dir) as pins:
        for program in (*PROGRAMS, *(ANSWERS if answer else ())):
            try:
                fd = linker.load(program)
            except SplicerError as error:
                if not program.is_optional:
                    raise
                missing[program.name] = error.message
                continue
            pins.pin(fd, "programs", program.name)
            if program.name == "verdict":
                libbpf.attach_program_to_map(fd, maps["spliced"])
        for name in MAPS:
            pins.pin(maps[name], "maps", name)
    return missing


def rehearse(compiled: Compiled, maps: Mapping[str, int], *, debug: bool, answer: bool) -> dict[str, Any]:
    """Load everything, and say what the kernel refuses. What answers FIONREAD is attached as well, until this
    process ends, which is at once: see class Rehearsal in store.py."""
    refused: dict[str, tuple[str, str | None]] = {}
    loaded: dict[str, int] = {}
    with contextlib.closing(Linker(compiled, maps, debug)) as linker:
        for program in (*PROGRAMS, TAP, *(ANSWERS if answer else ())):
            try:
                loaded[program.name] = linker.load(program)
            except SplicerError as error:
                refused[program.name] = (error.message, error.hint)
    answered, unanswered = _rehearse_answer(maps, loaded, refused) if answer else ("", "")
    return {"refused": refused, "answered": answered, "unanswered": unanswered}


def _rehearse_answer(
    maps: Mapping[str, int], loaded: Mapping[str, int], refused: Mapping[str, tuple[str, str | None]]
) -> tuple[str, str]:
    """The class that a socket of ours sees with the answers attached, or why there are none."""
    names = [program.name for program in ANSWERS]
    for name in names:
        if name in refused:
            return "", refused[name][0]
    try:
        for name in names:
            libbpf.link_function(loaded[name])
        return probes.find_class(libbpf.Map(os.dup(maps["ends"]))).name, ""
    except libbpf.KernelError as error:
        return "", str(error.strerror)


@contextlib.contextmanager
def _prepare(request: Mapping[str, Any]) -> Iterator[tuple[Compiled, dict[str, int]]]:
    """What is to be loaded, and its maps."""
    if request.get("compiled"):
        compiled = Compiled.from_document(request["compiled"])
        yield compiled, compiled.create_maps()
    else:
        sources = compiler.Sources(request["text"], tuple(request["flags"]))
        compiled, module = compiler.compile_programs(sources)
        yield compiled, compiler.find_maps(module)


def main() -> int:
    request = json.load(sys.stdin)
    if "parent" in request:
        # Not outlive the daemon: the next one must not find us pinning beside its own loader.
        end_with_parent(request["parent"], signal.SIGKILL)
    try:
        done: dict[str, Any]
        with _prepare(request) as (compiled, maps):
            how = {name: request.get(name, False) for name in ("debug", "answer")}
            if request.get("compile"):
                done = {"compiled": compiled.to_document()}
            elif request.get("rehearse"):
                done = rehearse(compiled, maps, **how)
            else:
                kept = None if request.get("compiled") else compiled.to_document()
                done = {"missing": load(compiled, maps, request["pin_dir"], **how), "compiled": kept}
        json.dump({"ok": True, **done}, sys.stdout)
        return 0
    except SplicerError as error:
        reply = {
            "ok": False,
            "error": str(error),
            "hint": error.hint,
            "exit_code": error.exit_code,
            "log": getattr(error, "log", ""),
        }
    except OSError as error:
        message = f"cannot load the BPF programs: {error.strerror}"
        reply = {"ok": False, "error": message, "exit_code": FAILURE}
    json.dump(reply, sys.stdout)
    return 1


if __name__ == "__main__":
    sys.exit(main())
