# SPDX-License-Identifier: Apache-2.0
"""The programs and maps of one generation, as the kernel wants them, and what it means when it does not."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from splicer.errors import KERNELS, UNSUPPORTED, SplicerError
from splicer.kernel import libbpf
from splicer.kernel.btf import Btf

KERNEL_HINT = f"splicer needs {KERNELS}; if this is one, please report its version"


@dataclass(frozen=True)
class Program:
    """A program as the kernel wants it: C function, program type, attach type and BTF target (a tracepoint,
    an iterator, or a kernel function with `parameters`); what people call this kind of program; and whether
    splicer does without it where the kernel refuses it."""

    name: str
    function: str
    described: str
    kind: int
    attach_type: int = 0
    tracepoint: str = ""
    iterator: str = ""
    traced: str = ""
    parameters: int = 0
    is_optional: bool = False

    def find_target(self, btf: Btf) -> int:
        """BTF id of what it is attached to, 0 if there is none such. Raises SplicerError if the kernel lacks
        it."""
        if self.tracepoint:
            target, wanted = btf.find_tracepoint(self.tracepoint), self.tracepoint
        elif self.iterator:
            target, wanted = btf.find_iterator(self.iterator), f"iterator over {self.iterator}"
        elif self.traced:
            target, wanted = btf.find_function(self.traced), f"{self.traced}() as it is known"
            if target > 0 and btf.count_parameters(target) != self.parameters:
                target = -1
        else:
            return 0
        if target < 0:
            raise SplicerError(f"this kernel has no {wanted}", hint=KERNEL_HINT, exit_code=UNSUPPORTED)
        return target


PROGRAMS = (
    Program(
        "register",
        "register_end",
        "SOCK_OPS program",
        libbpf.BPF_PROG_TYPE_SOCK_OPS,
        libbpf.BPF_CGROUP_SOCK_OPS,
    ),
    Program(
        "guard",
        "guard",
        "setsockopt program",
        libbpf.BPF_PROG_TYPE_CGROUP_SOCKOPT,
        libbpf.BPF_CGROUP_SETSOCKOPT,
    ),
    Program("verdict", "verdict", "SK_MSG program", libbpf.BPF_PROG_TYPE_SK_MSG, libbpf.BPF_SK_MSG_VERDICT),
    Program(
        "observe",
        "observe",
        "raw tracepoint program with BTF",
        libbpf.BPF_PROG_TYPE_TRACING,
        libbpf.BPF_TRACE_RAW_TP,
        tracepoint="tcp_rcv_space_adjust",
    ),
    Program(
        "adopt",
        "bpf_iter__tcp",
        "iterator over TCP sockets",
        libbpf.BPF_PROG_TYPE_TRACING,
        libbpf.BPF_TRACE_ITER,
        iterator="tcp",
    ),
    Program("enlist", "enlist", "tc program", libbpf.BPF_PROG_TYPE_SCHED_CLS, is_optional=True),
    Program("watch", "watch", "raw tracepoint program", libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT),
    Program(
        "measure",
        "measure",
        "raw tracepoint program",
        libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT,
        is_optional=True,
    ),
    Program(
        "tally",
        "tally",
        "raw tracepoint program",
        libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT,
        is_optional=True,
    ),
    Program(
        "census",
        "census",
        "iterator over TCP sockets",
        libbpf.BPF_PROG_TYPE_TRACING,
        libbpf.BPF_TRACE_ITER,
        iterator="tcp",
        is_optional=True,
    ),
)
# What puts FIONREAD right; loaded where the kernel's class needs it and the settings allow it.
ANSWERS = tuple(
    Program(
        name,
        name,
        "fexit program",
        libbpf.BPF_PROG_TYPE_TRACING,
        libbpf.BPF_TRACE_FEXIT,
        traced=function,
        parameters=3,
        is_optional=True,
    )
    for name, function in (("answer4", "inet_ioctl"), ("answer6", "inet6_ioctl"))
)
# What `splicer tap` loads for itself.
TAP = Program(
    "tap",
    "tap",
    "SK_MSG program",
    libbpf.BPF_PROG_TYPE_SK_MSG,
    libbpf.BPF_SK_MSG_VERDICT,
    is_optional=True,
)
MAPS = (
    "spliced",
    "ends",
    "seeds",
    "pairs",
    "young",
    "tenants",
    "rendezvous",
    "waiting",
    "hints",
    "splicers",
    "sleepers",
    "muted",
    "older",
    "rules",
    "networks",
    "traffic",
    "recent",
    "volumes",
    "standing",
    "bases",
    "strangers",
    "settings",
    "sweep",
    "counters",
    "blank",
    "events",
    "taps",
)
# Not pinned: the command makes them for its program.
TAP_MAPS = ("tap_settings", "tap_flows", "tap_choices", "tap_unknown", "tap_ring")

# What it takes to drain a generation; those of other builds may lack the rest.
MAPS_TO_DRAIN = ("spliced", "seeds", "pairs", "settings", "sweep", "counters")


class LoadError(SplicerError):
    """Compiling or loading failed; `log` is all that clang or the verifier said."""

    def __init__(self, message: str, log: str, **keys: Any) -> None:
        super().__init__(message, **keys)
        self.log = log


# What the verifier says of its work, whatever came of it.
_STATISTICS = ("processed ", "verification time", "stack depth", "func#")


def explain_refusal(program: Program, number: int, log: str) -> LoadError:
    """What the kernel's refusal to load a program (errno, verifier log) means, and what to do about it."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_STATISTICS)]
    if lines:
        detail, hint = lines[-1], "run again with --debug for the verifier's log"
    elif number == errno.EPERM:
        detail = os.strerror(number)
        hint = (
            "the verifier had nothing to object to: this kernel, or a security policy such as lockdown "
            f"or an LSM, forbids this kind of program ({program.described})"
        )
    else:
        detail = os.strerror(number) if number != libbpf.ENOTSUPP else "Operation is not supported"
        hint = f"this kernel lacks something of this kind of program ({program.described}); {KERNEL_HINT}"
    if number == errno.ENOMEM:
        hint = "free some memory, of this machine or of the cgroup that splicer runs in"
    name = errno.errorcode.get(number, "ENOTSUPP" if number == libbpf.ENOTSUPP else str(number))
    return LoadError(
        f"the kernel refused the {program.name} program ({name}): {detail}",
        log,
        hint=hint,
        exit_code=UNSUPPORTED,
    )
