# SPDX-License-Identifier: Apache-2.0
"""What this kernel does with redirected bytes, found by trying it on a scratch SOCKHASH.

Versions are never compared: distributions backport. A probe answers yes or no, or raises KernelError when it
could not find out.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import termios
import threading
import time
from dataclasses import dataclass

from splicer.errors import COUNTING, KERNELS, UNSUPPORTED, SplicerError
from splicer.kernel import libbpf, scratch
from splicer.kernel.btf import Btf
from splicer.kernel.scratch import instruction

_SO_MEMINFO = 55  # include/uapi/asm-generic/socket.h
_BYTES = b"probe"
# Of /proc/PID/syscall, where a thread sleeps in it (arch/x86/entry/syscalls/syscall_64.tbl).
_RECVFROM = "45 "
_READS_ASLEEP, _READS_AWAKE = 8, 32
_SLEEP_TIMEOUT_S = 2.0
_LOCKDOWN = "/sys/kernel/security/lockdown"
# Why FIONREAD is not answered, where nothing but the settings is the reason.
SWITCHED_OFF = "the settings say fionread = off"
# What such a program makes the kernel's log say.
LOG_WARNING = "kernels before 6.14 log a warning about bpf_probe_write_user when it is loaded"


@dataclass(frozen=True)
class KernelClass:
    """How FIONREAD and memory accounting see a socket in a SOCKHASH.

    `counts_redirected`, `counts_tcp`: FIONREAD includes redirected bytes, bytes that came through TCP.
    `accounts_memory`: redirected bytes are charged to the receiver's sk_rmem_alloc.
    """

    counts_redirected: bool
    counts_tcp: bool
    accounts_memory: bool

    @property
    def name(self) -> str:
        """A, B or C as in docs/kernels.md."""
        if not self.counts_redirected:
            return "A"
        return "C" if self.counts_tcp else "B"


def _assemble_redirect(map_fd: int) -> bytes:
    """SK_MSG program: redirect every message to the socket under key 1, or pass when there is none."""

    return b"".join(
        (
            instruction(0x62, dst=10, offset=-4, immediate=1),  # *(u32 *)(fp - 4) = 1
            instruction(0x18, dst=2, src=1, immediate=map_fd),  # r2 = map
            instruction(0),
            instruction(0xBF, dst=3, src=10),  # r3 = fp
            instruction(0x07, dst=3, immediate=-4),  # r3 -= 4
            instruction(0xB7, dst=4, immediate=1),  # r4 = BPF_F_INGRESS
            instruction(libbpf.CALL, immediate=71),  # call msg_redirect_hash
            instruction(0xB7, dst=0, immediate=1),  # r0 = SK_PASS
            instruction(0x95),  # exit
        )
    )


def can_cast(btf: Btf) -> bool:
    """Has the kernel a bpf_rdonly_cast() that an SK_MSG program may call, for all program types alike?"""
    function, structure = btf.find_function("bpf_rdonly_cast"), btf.find_structure("sock")
    if min(function, structure) < 0:
        return False
    program = b"".join(
        (
            instruction(0xB7, dst=1, immediate=0),  # r1 = 0
            instruction(0xB7, dst=2, immediate=structure),  # r2 = BTF id
            instruction(libbpf.CALL, src=libbpf.PSEUDO_KFUNC_CALL, immediate=function),
            instruction(0x61, dst=0, src=0),  # r0 = *(u32 *)r0: faults, and is 0
            instruction(0xB7, dst=0, immediate=1),  # r0 = SK_PASS
            instruction(0x95),  # exit
        )
    )
    fd, _ = libbpf.load_program(
        libbpf.BPF_PROG_TYPE_SK_MSG, "probe", program, attach_type=libbpf.BPF_SK_MSG_VERDICT
    )
    if fd < 0:
        return False
    os.close(fd)
    return True


def _redirect_over(address: str, family: int, ends: libbpf.Map | None) -> KernelClass:
    """Redirect five bytes over a connection of our own and see how they are counted."""
    with contextlib.ExitStack() as stack:
        sockets = scratch.create_map(stack, libbpf.BPF_MAP_TYPE_SOCKHASH, 4, 4, 4)
        program = scratch.load(
            stack,
            "an SK_MSG program",
            libbpf.BPF_PROG_TYPE_SK_MSG,
            _assemble_redirect(sockets.fd),
            attach_type=libbpf.BPF_SK_MSG_VERDICT,
        )
        libbpf.attach_program_to_map(program, sockets.fd)
        connection = scratch.Connection(stack, address, family)
        sender, receiver = connection.sender, connection.receiver

        if ends is not None:
            ends.set(struct.pack("=I", receiver.fileno()), bytes(ends.value_size))
        sockets.set(struct.pack("=I", 1), struct.pack("=I", receiver.fileno()))
        sender.send(_BYTES)
        _wait_readable(receiver)
        counts_tcp = _count_waiting(receiver) == len(_BYTES)
        receiver.recv(len(_BYTES))

        sockets.set(struct.pack("=I", 0), struct.pack("=I", sender.fileno()))
        before = _count_charged(receiver)
        sender.send(_BYTES)
        _wait_readable(receiver)
        counts_redirected = _count_waiting(receiver) == len(_BYTES)
        accounts_memory = _count_charged(receiver) == before + len(_BYTES)
        receiver.recv(len(_BYTES))
    return KernelClass(counts_redirected, counts_tcp, accounts_memory)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def _count_waiting(sock: socket.socket) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, value)
    return value[0]


def _count_charged(sock: socket.socket) -> int:
    return int(struct.unpack_from("=I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64))[0])


def _wait_readable(sock: socket.socket) -> None:
    """Loopback delivers at once; a busy host may take a moment."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        time.sleep(0.001)


def find_class(ends: libbpf.Map | None = None) -> KernelClass:
    """Redirect five bytes over a connection of our own and see how they are counted.

    With the map `ends` of a generation whose programs answer FIONREAD: the class that its sockets see, over
    IPv6 as well. Raises KernelError if the kernel has no SOCKHASH or refuses the program.
    """
    found = _redirect_over("127.0.0.1", socket.AF_INET, ends)
    if ends is None or not _has_ipv6():
        return found
    other = _redirect_over("::1", socket.AF_INET6, ends)
    return KernelClass(
        found.counts_redirected and other.counts_redirected,
        found.counts_tcp and other.counts_tcp,
        found.accounts_memory and other.accounts_memory,
    )


def require_class(*, may_answer: bool) -> KernelClass:
    """The kernel's class, as it is by itself. Raises SplicerError (exit code 4) if splicer could not keep its
    promises there. `may_answer`: it might, if FIONREAD can be answered; that is known later."""
    try:
        found = find_class()
    except libbpf.KernelError as error:
        raise SplicerError(
            f"this kernel cannot redirect between sockets ({error.strerror})",
            hint=f"splicer needs {KERNELS}, with CONFIG_BPF_SYSCALL and CONFIG_NET_SOCK_MSG",
            exit_code=UNSUPPORTED,
        ) from error
    if not found.accounts_memory:
        raise SplicerError(
            "this kernel does not charge redirected bytes to the receiver; a sender could not be held back",
            hint="use a newer kernel",
            exit_code=UNSUPPORTED,
        )
    if found.name == "A" and not may_answer:
        raise refuse_class_a(SWITCHED_OFF)
    return found


def _assemble_note(map_fd: int, port: int, port_offset: int, flags_offset: int) -> bytes:
    """Raw tracepoint program on reads: of sockets with this local port it notes the thread's flags, and
    counts them."""
    return b"".join(
        (
            instruction(0x79, dst=6, src=1),  # r6 = sk
            instruction(0x69, dst=1, src=6, offset=port_offset),  # r1 = *(u16 *)(r6 + port_offset)
            instruction(0x55, dst=1, offset=13, immediate=port),  # if r1 != port: exit
            instruction(libbpf.CALL, immediate=158),  # call get_current_task_btf
            instruction(0x61, dst=7, src=0, offset=flags_offset),  # r7 = *(u32 *)(r0 + flags_offset)
            scratch.find_first(map_fd),  # r0 = its only element
            instruction(0x15, dst=0, offset=4),  # if r0 == 0: exit
            instruction(0x63, dst=0, src=7),  # *(u32 *)r0 = r7
            instruction(0x61, dst=1, src=0, offset=4),  # r1 = *(u32 *)(r0 + 4)
            instruction(0x07, dst=1, immediate=1),  # r1 += 1
            instruction(0x63, dst=0, src=1, offset=4),  # *(u32 *)(r0 + 4) = r1
            instruction(0xB7, dst=0),  # r0 = 0
            instruction(0x95),  # exit
        )
    )


class _ScratchReader:
    """One end of a connection of our own, and what a tracepoint program has noted of its reads."""

    def __init__(self, btf: Btf, stack: contextlib.ExitStack) -> None:
        flags, port = btf.locate("task_struct.thread_info.flags"), btf.locate("sock.__sk_common.skc_num")
        if flags is None or port is None:
            raise libbpf.KernelError(errno.ENOENT, "find a thread's flags")
        connection = scratch.Connection(stack)
        self._sender, self._receiver = connection.sender, connection.receiver
        self._noted = scratch.create_map(stack, libbpf.BPF_MAP_TYPE_ARRAY, 4, 8, 1)
        program = scratch.load(
            stack,
            "a tracepoint program",
            libbpf.BPF_PROG_TYPE_TRACING,
            _assemble_note(self._noted.fd, connection.port, port.offset, flags.offset),
            attach_type=libbpf.BPF_TRACE_RAW_TP,
            btf_id=btf.find_tracepoint("tcp_rcv_space_adjust"),
        )
        stack.callback(os.close, libbpf.link_tracepoint(program))

    def _take_note(self) -> int:
        """The flags of the one read that was done since the last time."""
        raw = self._noted.get(struct.pack("=I", 0)) or bytes(8)
        self._noted.set(struct.pack("=I", 0), bytes(8))
        found, reads = struct.unpack("=2I", raw)
        if reads != 1:
            raise libbpf.KernelError(errno.EIO, "see one read")
        return int(found)

    def read_awake(self) -> int:
        """Flags of a thread that reads what is there."""
        self._sender.send(b"x")
        if not select.select([self._receiver], [], [], _SLEEP_TIMEOUT_S)[0]:
            raise libbpf.KernelError(errno.ETIMEDOUT, "send over the loopback device")
        self._receiver.recv(1)
        return self._take_note()

    def read_asleep(self) -> int:
        """Flags of a thread that slept in its read."""
        reader = threading.Thread(target=self._receiver.recv, args=(1,), daemon=True)
        reader.start()
        try:
            # Of a thread that is not off its CPU the kernel says "running".
            deadline, state = (
                time.monotonic() + _SLEEP_TIMEOUT_S,
                f"/proc/self/task/{reader.native_id}/syscall",
            )
            while not _read_text(state).startswith(_RECVFROM):
                if time.monotonic() > deadline:
                    raise libbpf.KernelError(errno.ETIMEDOUT, "see a thread sleep")
                time.sleep(0.0005)
        finally:
            self._sender.send(b"x")
            reader.join()
        return self._take_note()


def _read_text(path: str) -> str:
    with open(path) as file:
        return file.read()


def choose_marks(asleep: list[int], awake: list[int]) -> int:
    """Flags that are there after each read that slept, and seldom after others: of these some have lost their
    CPU to another thread."""

    def tells(bit: int) -> bool:
        return all(flags & bit for flags in asleep) and sum(bool(flags & bit) for flags in awake) * 4 <= len(
            awake
        )

    return sum(bit for bit in (1 << n for n in range(32)) if tells(bit))


def find_switch_marks(btf: Btf) -> int:
    """The flags that a thread has from when it leaves its CPU until it is back in user mode: who has one of
    them at the end of a read, slept in it, or was made to make room for another.

    Found by trying, since a kernel names them nowhere (x86 has one for the FPU: TIF_NEED_FPU_LOAD). Elsewhere
    than on x86 there is none that all threads have. Raises OSError if nothing can be found out.
    """
    if platform.machine() != "x86_64":
        raise libbpf.KernelError(errno.EOPNOTSUPP, "tell who slept")
    with contextlib.ExitStack() as stack:
        reader = _ScratchReader(btf, stack)
        asleep = [reader.read_asleep() for _ in range(_READS_ASLEEP)]
        awake = [reader.read_awake() for _ in range(_READS_AWAKE)]
    marks = choose_marks(asleep, awake)
    if not marks:
        raise libbpf.KernelError(errno.ENODATA, "tell who slept")
    return marks


def refuse_class_a(why: str) -> SplicerError:
    """The kernel does not count redirected bytes, and FIONREAD is not answered for this reason."""
    return SplicerError(
        "on this kernel FIONREAD does not count redirected bytes (class A); nginx and others would hang; "
        f"and splicer does not answer it: {why}",
        hint=f"{name_way_out(why)}, or use a kernel that counts them: {COUNTING}",
        exit_code=UNSUPPORTED,
    )


def name_way_out(why: str) -> str:
    """What lets splicer answer FIONREAD itself."""
    if "fionread" in why:
        return "have splicer answer it: --fionread auto"
    if read_lockdown() not in ("", "none"):
        return (
            "splicer would answer it, but lockdown forbids that; boot without it "
            "(Secure Boot off, no lockdown= on the kernel's command line)"
        )
    return "splicer would answer it, where fexit programs may be loaded that use bpf_probe_write_user"


def read_lockdown() -> str:
    """How far the kernel is locked down: "none", "integrity" or "confidentiality"; empty where it has no such
    thing, or does not tell."""
    try:
        with open(_LOCKDOWN, encoding="ascii") as stream:
            # "none [integrity] confidentiality"
            return stream.read().partition("[")[2].partition("]")[0]
    except OSError:
        return ""
