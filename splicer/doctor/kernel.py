# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernel, of libbpf and of bcc: all by trying."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from functools import partial

from splicer.doctor.check import Check, Outcome, State, ok, unknown, warn
from splicer.doctor.surroundings import Surroundings
from splicer.errors import SplicerError
from splicer.kernel import libbpf, probes, scratch, trials
from splicer.kernel.btf import Btf
from splicer.kernel.programs import PROGRAMS, TAP, Program
from splicer.kernel.trials import Property

_LITTLE = 1 << 16  # bytes
_MUCH = 1 << 20  # bytes
# What becomes different where splicer does without a program.
_WITHOUT = {
    "enlist": "connections are put in by walk, late and dear",
    "census": "connections that are older than splicer stay plain TCP",
    "measure": "what waits unread on spliced connections is not shown",
    "tally": "bytes of connections that are open count when they close",
    "tap": "splicer tap shows nothing",
}


def _check_libbpf(_surroundings: Surroundings) -> Outcome:
    return ok(f"version {libbpf.read_version()}")


def _check_bcc(surroundings: Surroundings) -> Outcome:
    if surroundings.why_no_bcc is not None:
        raise surroundings.why_no_bcc
    return ok("BPF's bcc can be imported")


def _check_btf(_surroundings: Surroundings) -> Outcome:
    Btf().close()
    return ok("/sys/kernel/btf/vmlinux")


def _check_memlock(_surroundings: Surroundings) -> Outcome:
    """Kernels from 5.11 on charge maps to the memory cgroup and not to this limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        return ok("unlimited")
    try:
        with contextlib.ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(soft, _LITTLE), hard))
            stack.callback(resource.setrlimit, resource.RLIMIT_MEMLOCK, (soft, hard))
            scratch.create_map(stack, libbpf.BPF_MAP_TYPE_ARRAY, 4, _MUCH, 1)
    except libbpf.KernelError:
        return warn(f"maps count, and the limit is {hard >> 10} KiB", "ulimit -l unlimited")
    return ok("maps do not count here")


def _check_redirection(surroundings: Surroundings) -> Outcome:
    found = surroundings.kernel
    return ok(f"between sockets, charged to the receiver (class {found.name})")


def _check_property(wanted: Property, _surroundings: Surroundings) -> Outcome:
    found = trials.require(wanted)
    if found.answer is None:
        return unknown(found.evidence)
    return ok(found.evidence) if found.answer else warn(found.evidence, wanted.hint)


def _check_sleepers(_surroundings: Surroundings) -> Outcome:
    btf = Btf()
    try:
        marks = probes.find_switch_marks(btf)
    except OSError as error:
        return warn(f"not told apart ({error.strerror}); blocking readers stay plain TCP")
    finally:
        btf.close()
    return ok(f"told apart by what a thread has (flags {marks:#x})")


def _check_compiler(surroundings: Surroundings) -> Outcome:
    if surroundings.why_no_bcc is not None:
        return unknown("not tried: it takes bcc")
    _ = surroundings.rehearsal
    return ok("the programs compile")


def _check_program(program: Program, surroundings: Surroundings) -> Outcome:
    try:
        refused = surroundings.rehearsal.refused.get(program.name)
    except SplicerError:
        return unknown("not tried: the programs do not compile, or bcc is missing")
    if refused is None:
        return ok(f"the kernel loads it ({program.described})")
    error, hint = refused
    if program.is_optional:
        return warn(f"{_WITHOUT[program.name]} ({error})", hint)
    return Outcome(State.FAIL, error, hint)


def _check_fionread(surroundings: Surroundings) -> Outcome:
    name = surroundings.find_class()
    if not name:
        return unknown("not known without its class: see redirection")
    if name == "C":
        return ok("class C: the kernel's answer is right")
    if surroundings.settings.fionread == "auto" and surroundings.why_no_bcc is not None:
        return unknown(f"class {name}; whether it can be answered was not tried: it takes bcc")
    why = surroundings.find_why_unanswered()
    if not why:
        return ok(f"class {name}, answered by splicer")
    if name == "A":
        raise probes.refuse_class_a(why)
    return warn(f"class {name}, not answered: {why}", probes.name_way_out(why))


def _check_log(surroundings: Surroundings) -> Outcome:
    """A kernel before 6.14 says of what answers FIONREAD that it may corrupt memory."""
    answerer = surroundings.find_who_answers()
    if not answerer:
        return unknown("not known without who answers: see fionread")
    if answerer != "splicer":
        return ok("splicer loads nothing that the kernel warns of")
    return ok("before 6.14 it warns of bpf_probe_write_user: ours")


def list_checks() -> Iterator[Check]:
    """In the order in which they are looked at."""
    yield Check("libbpf", _check_libbpf)
    yield Check("bcc", _check_bcc)
    yield Check("btf", _check_btf)
    yield Check("memlock", _check_memlock, is_needed=False, privileged=True)
    yield Check("redirection", _check_redirection, privileged=True)
    for each in trials.PROPERTIES:
        yield Check(
            each.name, partial(_check_property, each), is_needed=each.is_needed, privileged=each.privileged
        )
    yield Check("sleepers", _check_sleepers, is_needed=False, privileged=True)
    yield Check("compiler", _check_compiler, privileged=True)
    for program in (*PROGRAMS, TAP):
        needed = not program.is_optional
        yield Check(program.name, partial(_check_program, program), is_needed=needed, privileged=True)
    yield Check("fionread", _check_fionread, privileged=True)
    yield Check("kernel_log", _check_log, is_needed=False, privileged=True)
