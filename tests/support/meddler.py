# SPDX-License-Identifier: Apache-2.0
"""What other users of BPF do beside splicer: SOCK_OPS programs that take all callbacks for their own, answer,
or look at what they are given; sockmaps that have the sockets of somebody else's process, with programs and
without."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
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
def _attached(
    cgroup: Path,
    code: bytes,
    kind: int = libbpf.BPF_PROG_TYPE_SOCK_OPS,
    attach_type: int = libbpf.BPF_CGROUP_SOCK_OPS,
) -> Iterator[None]:
    program, log = libbpf.load_program(kind, "meddler", code, attach_type=attach_type)
    assert program >= 0, log
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = libbpf.link_cgroup(program, directory, attach_type)
    finally:
        os.close(directory)
        os.close(program)
    try:
        yield
    finally:
        os.close(link)


@contextmanager
def callbacks_forgotten(cgroup: Path) -> Iterator[None]:
    """A program on the cgroup sets the callback flags of each new connection to 0, whatever they were."""
    with _attached(cgroup, FORGET_CALLBACKS):
        yield


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


HASH, SOCKMAP, SK_SKB = 1, 15, 14  # enum bpf_map_type, bpf_prog_type
STREAM_VERDICT = 5  # enum bpf_attach_type
SK_REDIRECT_MAP = 52  # enum bpf_func_id
LOCAL_PORT = 136  # in struct __sk_buff


@contextmanager
def in_sockmap(*sockets: tuple[int, int]) -> Iterator[None]:
    """These sockets, each a process and its descriptor, are in one SOCKMAP that has no programs, as
    observability agents do it."""
    with ExitStack() as stack:
        made = libbpf.create_map(SOCKMAP, "meddler", 4, 8, len(sockets))
        stack.callback(os.close, made)
        _fill(made, [stack.enter_context(borrow(*each)) for each in sockets])
        yield


def _fill(sockmap: int, sockets: Sequence[socket.socket]) -> None:
    with closing(libbpf.Map(os.dup(sockmap))) as entries:
        for number, sock in enumerate(sockets):
            entries.set(struct.pack("=I", number), struct.pack("=Q", sock.fileno()))


@contextmanager
def joined_in_the_kernel(front: tuple[int, int], back: tuple[int, int]) -> Iterator[None]:
    """What comes to one of two sockets is sent by the other: both are in a SOCKMAP with an sk_skb program,
    as proxies do it that leave copying to the kernel."""
    with ExitStack() as stack:
        made = libbpf.create_map(SOCKMAP, "meddler", 4, 8, 2)
        stack.callback(os.close, made)
        sockets = [stack.enter_context(borrow(*each)) for each in (front, back)]
        code = b"".join(
            (
                _write(0x61, to=2, source=1, offset=LOCAL_PORT),  # r2 = skb->local_port
                _write(0xB7, to=3, value=0),  # r3 = 0, the front
                _write(0x55, to=2, offset=1, value=sockets[0].getsockname()[1]),
                _write(0xB7, to=3, value=1),  # came to the front: r3 = 1, the back
                _write(0x18, to=2, source=1, value=made),  # r2 = map
                _write(0),
                _write(0xB7, to=4, value=0),  # to be sent
                _write(0x85, value=SK_REDIRECT_MAP),
                _write(0x95),
            )
        )
        program, log = libbpf.load_program(SK_SKB, "meddler", code)
        assert program >= 0, log
        stack.callback(os.close, program)
        libbpf.check(
            libbpf.get_library().bpf_prog_attach(program, made, STREAM_VERDICT, 0), "attach an sk_skb program"
        )
        _fill(made, sockets)
        yield


TIMEOUT_INIT, NEEDS_ECN, STATE = 1, 6, 10  # of SOCK_OPS
CALLBACK_FLAGS_SET = 59  # enum bpf_func_id
CALLBACK_FLAGS = 84  # in struct bpf_sock_ops
STATE_FLAG = 1 << 2


def _answer(timeout: int) -> bytes:
    """SOCK_OPS: this time-out of a SYN (jiffies), and ECN for everybody."""
    return b"".join(
        (
            _write(0x61, to=2, source=1),  # r2 = op
            _write(0x55, to=2, offset=2, value=TIMEOUT_INIT),
            _write(0x62, to=1, offset=4, value=timeout),  # reply
            _write(0x05, offset=2),
            _write(0x55, to=2, offset=1, value=NEEDS_ECN),
            _write(0x62, to=1, offset=4, value=1),
            _write(0xB7, to=0, value=1),
            _write(0x95),
        )
    )


@contextmanager
def answering(cgroup: Path, timeout: int) -> Iterator[None]:
    """A program on the cgroup answers what SOCK_OPS programs are asked."""
    with _attached(cgroup, _answer(timeout)):
        yield


def _note_old_state(map_fd: int) -> bytes:
    """SOCK_OPS: asks for changes of state, and counts for each what it was before."""
    return b"".join(
        (
            _write(0xBF, to=6, source=1),
            _write(0x61, to=2, source=6),  # r2 = op
            _write(0x15, to=2, offset=2, value=ACTIVE_ESTABLISHED),
            _write(0x15, to=2, offset=1, value=PASSIVE_ESTABLISHED),
            _write(0x05, offset=5),
            _write(0xBF, to=1, source=6),
            _write(0x61, to=2, source=6, offset=CALLBACK_FLAGS),
            _write(0x47, to=2, value=STATE_FLAG),
            _write(0x85, value=CALLBACK_FLAGS_SET),
            _write(0x05, offset=10),
            _write(0x55, to=2, offset=9, value=STATE),
            _write(0x61, to=2, source=6, offset=4),  # args[0]
            _write(0x63, to=10, source=2, offset=-4),
            _write(0x18, to=1, source=1, value=map_fd),
            _write(0),
            _write(0xBF, to=2, source=10),
            _write(0x07, to=2, value=-4),
            _write(0xBF, to=3, source=2),
            _write(0xB7, to=4, value=0),
            _write(0x85, value=2),  # map_update_elem
            _write(0xB7, to=0, value=1),
            _write(0x95),
        )
    )


@contextmanager
def noting_old_states(cgroup: Path) -> Iterator[libbpf.Map]:
    """A program on the cgroup that is told of changes of state; the keys are what sockets were before."""
    with closing(libbpf.Map(libbpf.create_map(HASH, "meddler", 4, 4, 64))) as states:
        with _attached(cgroup, _note_old_state(states.fd)):
            yield states


SK_LOOKUP, AT_SK_LOOKUP = 30, 36  # enum bpf_prog_type, bpf_attach_type
GETSOCKOPT = 21
PASS = _write(0xB7, to=0, value=1) + _write(0x95)  # returns 1


@contextmanager
def passing_options(cgroup: Path, attach_type: int) -> Iterator[None]:
    """A program on the cgroup lets all options pass that are set, or asked for."""
    with _attached(cgroup, PASS, libbpf.BPF_PROG_TYPE_CGROUP_SOCKOPT, attach_type):
        yield


@contextmanager
def choosing_listeners(namespace: str, code: bytes = PASS) -> Iterator[None]:
    """A program in a network namespace, as `ip netns` knows it, is asked which listener gets a connection."""
    program, log = libbpf.load_program(SK_LOOKUP, "meddler", code, attach_type=AT_SK_LOOKUP)
    assert program >= 0, log
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        link = libbpf.check(
            libbpf.get_library().bpf_link_create(program, inside, AT_SK_LOOKUP, None), "attach to a namespace"
        )
    finally:
        os.close(inside)
        os.close(program)
    try:
        yield
    finally:
        os.close(link)
