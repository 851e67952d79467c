# SPDX-License-Identifier: Apache-2.0
"""Properties of the kernel that the data path relies on, each tried on scratch objects.

What redirected bytes do is in probes.py. Versions are never compared. `splicer run` refuses a kernel by what
is found here, and `splicer doctor` shows it: both ask `require`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from splicer.errors import KERNELS, UNSUPPORTED, SplicerError
from splicer.host import namespaces
from splicer.kernel import libbpf, scratch
from splicer.kernel.btf import Btf
from splicer.kernel.scratch import RefusedError, instruction

_REALTIME = "/sys/kernel/realtime"
_HASH = 1  # enum bpf_map_type
_UPDATE, _SETSOCKOPT = 2, 49  # enum bpf_func_id
_SOL_SOCKET, _SO_RCVLOWAT = 1, 18  # include/uapi/asm-generic/socket.h
_SOL_TCP, _TCP_NOTSENT_LOWAT, _TCP_BPF_SOCK_OPS_CB_FLAGS = 6, 25, 1008  # include/uapi/linux/{tcp,bpf}.h
_ESTABLISHED = 1  # include/net/tcp_states.h
_NOT_VISITED = 0x7FFFFFFF
# Such a failure is this moment's, or this process's, and says nothing of the kernel.
_NO_ANSWER = frozenset(
    {errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT}
)


@dataclass(frozen=True)
class Finding:
    """What a trial found: yes (True), no (False) or don't know (None), and by what."""

    answer: bool | None
    evidence: str


@dataclass(frozen=True)
class Property:
    """Something that the kernel must do, or may. `lacks`: what is said of one that does not. `is_needed`:
    splicer cannot keep its promises without it; else `otherwise` is what becomes different. `privileged`:
    only who may load programs can try it."""

    name: str
    lacks: str
    attempt: Callable[[], Finding]
    is_needed: bool = True
    privileged: bool = True
    otherwise: str = ""
    hint: str = f"splicer needs {KERNELS}"

    def find(self) -> Finding:
        """Try it. Raises SplicerError (exit code 4) if splicer refuses this host for want of something that
        the trial takes, such as BTF."""
        try:
            return self.attempt()
        except RefusedError as error:
            refused = error.errno not in _NO_ANSWER
            return Finding(False if refused else None, str(error.strerror))
        except libbpf.KernelError as error:
            refused = error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, libbpf.ENOTSUPP)
            return Finding(False if refused else None, str(error.strerror))
        except OSError as error:
            return Finding(None, str(error.strerror or error))
        except SplicerError as error:
            if error.exit_code == UNSUPPORTED:
                raise
            return Finding(None, error.message)


# -- from an iterator over TCP sockets ---------------------------------------------------------------------


def _assemble_visit(call: bytes, port: int, offsets: tuple[int, int], map_fd: int) -> bytes:
    """Program of iter/tcp: of the established socket with this local port it makes a `call`, with the socket
    in r6, and leaves the result in an array."""
    port_offset, state_offset = offsets
    note = b"".join(
        (
            instruction(0xBF, dst=7, src=0),  # r7 = r0
            scratch.find_first(map_fd),  # r0 = its only element
            instruction(0x15, dst=0, offset=1),  # if r0 == 0: exit
            instruction(0x63, dst=0, src=7),  # *(u32 *)r0 = r7
        )
    )
    rest = len(call + note) // 8
    return b"".join(
        (
            instruction(0x79, dst=6, src=1, offset=8),  # r6 = ctx->sk_common
            instruction(0x15, dst=6, offset=rest + 4),  # if r6 == 0: exit
            instruction(0x69, dst=1, src=6, offset=port_offset),  # r1 = *(u16 *)(r6 + port_offset)
            instruction(0x55, dst=1, offset=rest + 2, immediate=port),  # if r1 != port: exit
            instruction(0x71, dst=1, src=6, offset=state_offset),  # r1 = *(u8 *)(r6 + state_offset)
            instruction(0x55, dst=1, offset=rest, immediate=_ESTABLISHED),  # if r1 != ESTABLISHED: exit
            call,
            note,
            instruction(0xB7, dst=0),  # r0 = 0
            instruction(0x95),  # exit
        )
    )


def _assemble_setsockopt(level: int, option: int, value: int) -> bytes:
    return b"".join(
        (
            instruction(0x62, dst=10, offset=-8, immediate=value),  # *(u32 *)(fp - 8) = value
            instruction(0xBF, dst=1, src=6),  # r1 = r6
            instruction(0xB7, dst=2, immediate=level),  # r2 = level
            instruction(0xB7, dst=3, immediate=option),  # r3 = option
            instruction(0xBF, dst=4, src=10),  # r4 = fp
            instruction(0x07, dst=4, immediate=-8),  # r4 -= 8
            instruction(0xB7, dst=5, immediate=4),  # r5 = 4
            instruction(libbpf.CALL, immediate=_SETSOCKOPT),
        )
    )


def _assemble_update(map_fd: int) -> bytes:
    return b"".join(
        (
            instruction(0x62, dst=10, offset=-8, immediate=1),  # *(u32 *)(fp - 8) = 1
            instruction(0x18, dst=1, src=1, immediate=map_fd),  # r1 = map
            instruction(0),
            instruction(0xBF, dst=2, src=10),  # r2 = fp
            instruction(0x07, dst=2, immediate=-8),  # r2 -= 8
            instruction(0xBF, dst=3, src=6),  # r3 = r6
            instruction(0xB7, dst=4),  # r4 = BPF_ANY
            instruction(libbpf.CALL, immediate=_UPDATE),
        )
    )


def _prepare_visit(
    stack: contextlib.ExitStack, connection: scratch.Connection, call: bytes
) -> Callable[[], int]:
    """A function that has an iterator's program make the `call` on the receiver. It returns the result,
    0 or -errno, and raises KernelError if the iterator did not come by."""
    btf = Btf()
    try:
        port, state = (btf.locate(f"sock.__sk_common.{name}") for name in ("skc_num", "skc_state"))
        target = btf.find_iterator("tcp")
    finally:
        btf.close()
    if port is None or state is None or target < 0:
        raise RefusedError(errno.ENOENT, "an iterator over TCP sockets", "")
    noted = scratch.create_map(stack, libbpf.BPF_MAP_TYPE_ARRAY, 4, 4, 1)
    program = scratch.load(
        stack,
        "an iterator over TCP sockets",
        libbpf.BPF_PROG_TYPE_TRACING,
        _assemble_visit(call, connection.port, (port.offset, state.offset), noted.fd),
        attach_type=libbpf.BPF_TRACE_ITER,
        btf_id=target,
    )
    link = libbpf.link_iterator(program)
    stack.callback(os.close, link)

    def visit() -> int:
        noted.set(bytes(4), struct.pack("=I", _NOT_VISITED))
        libbpf.finish_iterator(libbpf.create_iterator(link))
        [result] = struct.unpack("=i", noted.get(bytes(4)) or bytes(4))
        if result == _NOT_VISITED:
            raise libbpf.KernelError(errno.ENOENT, "see a socket of ours in an iterator")
        return int(result)

    return visit


def _describe(result: int) -> str:
    return os.strerror(-result) if result < 0 else str(result)


def _poke(option: str, call: bytes, event: int, *, fill: bool) -> Finding:
    """Does setting an option to what it is wake somebody who waits on an edge that he has seen before?"""
    names = {select.EPOLLIN: "EPOLLIN", select.EPOLLOUT: "EPOLLOUT"}
    with contextlib.ExitStack() as stack:
        connection = scratch.Connection(stack)
        visit = _prepare_visit(stack, connection, call)
        poll = stack.enter_context(select.epoll())
        if fill:
            connection.sender.send(b"probe")
        poll.register(connection.receiver, event | select.EPOLLET)
        if not poll.poll(2.0) or poll.poll(0):
            return Finding(None, f"{names[event]} did not come as it should, before {option} was set")
        result = visit()
        if result:
            return Finding(False, f"setting {option} from an iterator: {_describe(result)}")
        woken = bool(poll.poll(0))
    return Finding(woken, f"{option} set from an iterator raises {'' if woken else 'no '}{names[event]}")


def try_reader_poke() -> Finding:
    """What wakes a reader whose end was taken out of the SOCKHASH with TCP bytes unread: take_out() in
    bpf/adopt.c."""
    return _poke("SO_RCVLOWAT", _assemble_setsockopt(_SOL_SOCKET, _SO_RCVLOWAT, 1), select.EPOLLIN, fill=True)


def try_sender_poke() -> Finding:
    """The same for a sender that waits for room."""
    return _poke(
        "TCP_NOTSENT_LOWAT",
        _assemble_setsockopt(_SOL_TCP, _TCP_NOTSENT_LOWAT, 0),
        select.EPOLLOUT,
        fill=False,
    )


def try_insertion() -> Finding:
    """Can an iterator's program put a socket into a SOCKHASH?"""
    with contextlib.ExitStack() as stack:
        connection = scratch.Connection(stack)
        sockets = scratch.create_map(stack, libbpf.BPF_MAP_TYPE_SOCKHASH, 4, 8, 4)
        result = _prepare_visit(stack, connection, _assemble_update(sockets.fd))()
        is_in = next(sockets.walk_keys(), None) == struct.pack("=I", 1)
    if result or not is_in:
        return Finding(False, f"putting a socket into a SOCKHASH from an iterator: {_describe(result)}")
    return Finding(True, "an iterator's program put a socket into a SOCKHASH")


def try_callback_flags() -> Finding:
    """Can an iterator's program ask for a socket's callbacks, so that older connections can be followed?"""
    with contextlib.ExitStack() as stack:
        connection = scratch.Connection(stack)
        call = _assemble_setsockopt(_SOL_TCP, _TCP_BPF_SOCK_OPS_CB_FLAGS, 0)
        result = _prepare_visit(stack, connection, call)()
    if result:
        return Finding(False, f"setting callback flags from an iterator: {_describe(result)}")
    return Finding(True, "an iterator's program set a socket's callback flags")


# -- others ------------------------------------------------------------------------------------------------


def try_batch_lookup() -> Finding:
    """Are many entries of a map read by one call? The daemon lists connections so."""
    with contextlib.ExitStack() as stack:
        entries = scratch.create_map(stack, _HASH, 4, 4, 4)
        for number in (1, 2):
            entries.set(struct.pack("=I", number), struct.pack("=I", number))
        found = len(entries.items())
    return Finding(found == 2, f"{found} of 2 entries were read at once")


def try_test_run() -> Finding:
    """Does the kernel run a raw tracepoint program that is attached to nothing? watch is run so."""
    code = instruction(0xB7, dst=0, immediate=7) + instruction(0x95)  # return 7
    with contextlib.ExitStack() as stack:
        program = scratch.load(stack, "a raw tracepoint program", libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT, code)
        result = libbpf.TestRun(program, 8).run()
    return Finding(result == 7, f"a program that returns 7 was run, and returned {result}")


def try_compilation() -> Finding:
    """Does the kernel make machine code of programs?"""
    code = instruction(0xB7, dst=0) + instruction(0x95)  # return 0
    with contextlib.ExitStack() as stack:
        program = scratch.load(stack, "a raw tracepoint program", libbpf.BPF_PROG_TYPE_RAW_TRACEPOINT, code)
        size = libbpf.read_compiled_size(program)
    return Finding(size > 0, f"2 instructions became {size} bytes of machine code")


def try_namespace_cookie() -> Finding:
    """Have network namespaces numbers that are never used again?"""
    try:
        return Finding(True, f"SO_NETNS_COOKIE says {namespaces.read_own_cookie()}")
    except SplicerError as error:
        return Finding(False, error.message)


def try_preemption(path: str = _REALTIME) -> Finding:
    """Is this a kernel without PREEMPT_RT? One that has it says so in a file of its own."""
    try:
        with open(path, encoding="ascii") as stream:
            is_realtime = stream.read().strip() == "1"
    except FileNotFoundError:
        is_realtime = False
    return Finding(not is_realtime, f"{path} {'says 1' if is_realtime else 'is not there, or says 0'}")


PROPERTIES = (
    Property(
        "netns_cookie",
        "this kernel has no network namespace cookies (SO_NETNS_COOKIE)",
        try_namespace_cookie,
        privileged=False,
    ),
    Property("batch_lookup", "this kernel does not read a map in batches", try_batch_lookup),
    Property(
        "test_run",
        "this kernel does not run a program that is attached to nothing (BPF_PROG_TEST_RUN)",
        try_test_run,
    ),
    Property(
        "insertion", "this kernel does not let an iterator over TCP sockets put one into a map", try_insertion
    ),
    Property(
        "reader_poke",
        "on this kernel SO_RCVLOWAT does not wake a reader; one that goes back to TCP could hang",
        try_reader_poke,
    ),
    Property(
        "sender_poke",
        "on this kernel TCP_NOTSENT_LOWAT does not wake a sender; one that goes back to TCP could hang",
        try_sender_poke,
    ),
    Property(
        "preemption",
        "this kernel is one for real time (PREEMPT_RT); splicer has not been made for it",
        try_preemption,
        privileged=False,
        hint="boot a kernel without PREEMPT_RT",
    ),
    Property(
        "jit",
        "this kernel interprets BPF programs",
        try_compilation,
        is_needed=False,
        otherwise="programs are interpreted, and slow",
        hint="sysctl -w net.core.bpf_jit_enable=1",
    ),
    Property(
        "callback_flags",
        "this kernel does not let an iterator ask for a socket's callbacks",
        try_callback_flags,
        is_needed=False,
        otherwise="connections that are older than splicer stay plain TCP",
        hint="Linux 6.12 and newer let it",
    ),
)


def require(wanted: Property) -> Finding:
    """Yes or don't know, or no where splicer does without it. Raises SplicerError (exit code 4) where not."""
    found = wanted.find()
    if found.answer is False and wanted.is_needed:
        said = found.evidence if found.evidence == wanted.lacks else f"{wanted.lacks}: {found.evidence}"
        raise SplicerError(said, hint=wanted.hint, exit_code=UNSUPPORTED)
    if found.answer is False and wanted.otherwise:
        return replace(found, evidence=f"{wanted.otherwise} ({found.evidence})")
    return found
