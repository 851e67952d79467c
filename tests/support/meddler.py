# SPDX-License-Identifier: Apache-2.0
"""What other users of BPF do beside splicer: a SOCK_OPS program that takes all callbacks for its own, and a
SOCKHASH that has the socket of somebody else's process."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splicer.kernel import libbpf
from support.loans import borrow

ACTIVE_ESTABLISHED, PASSIVE_ESTABLISHED = 4, 5


def _write(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One instruction, struct bpf_insn."""
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


# At both kinds of ESTABLISHED: bpf_sock_ops_cb_flags_set(context, 0). Returns 1.
FORGET_CALLBACKS = b"".join(
    (
        _write(0xBF, to=6, source=1),
        _write(0x61, to=2, source=1),
        _write(0x15, to=2, offset=2, value=ACTIVE_ESTABLISHED),
        _write(0x15, to=2, offset=1, value=PASSIVE_ESTABLISHED),
        _write(0x05, offset=3),
        _write(0xBF, to=1, source=6),
        _write(0xB7, to=2, value=0),
        _write(0x85, value=59),
        _write(0xB7, to=0, value=1),
        _write(0x95),
    )
)


@contextmanager
def callbacks_forgotten(cgroup: Path) -> Iterator[None]:
    """A program on the cgroup sets the callback flags of each new connection to 0, whatever they were."""
    program, log = libbpf.load_program(libbpf.BPF_PROG_TYPE_SOCK_OPS, "meddler", FORGET_CALLBACKS)
    assert program >= 0, log
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = libbpf.link_cgroup(program, directory, libbpf.BPF_CGROUP_SOCK_OPS)
    finally:
        os.close(directory)
        os.close(program)
    try:
        yield
    finally:
        os.close(link)


@contextmanager
def in_foreign_sockhash(pid: int, fd: int) -> Iterator[None]:
    """A process's socket is in a SOCKHASH that has no programs, which gives it a psock."""
    with borrow(pid, fd) as sock:
        made = libbpf.create_map(libbpf.BPF_MAP_TYPE_SOCKHASH, "meddler", 4, 8, 1)
        try:
            libbpf.Map(made).set(struct.pack("=I", 1), struct.pack("=Q", sock.fileno()))
            yield
        finally:
            os.close(made)
