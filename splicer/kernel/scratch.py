# SPDX-License-Identifier: Apache-2.0
"""Scratch objects to try things on: a connection of our own, and programs that are written by hand."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from splicer.kernel import libbpf

_SO_MAX_PACING_RATE = 47  # include/uapi/asm-generic/socket.h
_RATE = 1 << 30  # bytes per second; nothing here is held up by it


class RefusedError(libbpf.KernelError):
    """The kernel does not load a program; `log` is what its verifier said."""

    def __init__(self, number: int, what: str, log: str) -> None:
        last = next((line.strip() for line in reversed(log.splitlines()) if _says_why(line)), "")
        super().__init__(number, f"load {what}" + (f" ({last})" if last else ""))
        self.log = log


def _says_why(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(("processed ", "verification time", "stack depth"))


def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    """One instruction, struct bpf_insn."""
    return struct.pack("=BBhi", code, src << 4 | dst, offset, immediate)


def find_first(map_fd: int) -> bytes:
    """Leaves the address of an array's first element in r0, or 0; uses r1, r2 and fp - 4."""
    return b"".join(
        (
            instruction(0x62, dst=10, offset=-4),  # *(u32 *)(fp - 4) = 0
            instruction(0x18, dst=1, src=1, immediate=map_fd),  # r1 = map
            instruction(0),
            instruction(0xBF, dst=2, src=10),  # r2 = fp
            instruction(0x07, dst=2, immediate=-4),  # r2 -= 4
            instruction(libbpf.CALL, immediate=1),  # call map_lookup_elem
        )
    )


def load(
    stack: contextlib.ExitStack, what: str, kind: int, code: bytes, *, attach_type: int = 0, btf_id: int = 0
) -> int:
    """Descriptor of a program, open until the stack is closed. Raises RefusedError."""
    fd, log = libbpf.load_program(kind, "probe", code, attach_type=attach_type, btf_id=btf_id)
    if fd < 0:
        raise RefusedError(-fd, what, log)
    stack.callback(os.close, fd)
    return fd


def create_map(
    stack: contextlib.ExitStack, kind: int, key_size: int, value_size: int, max_entries: int
) -> libbpf.Map:
    """A map, there until the stack is closed; sizes in bytes."""
    made = libbpf.Map(libbpf.create_map(kind, "probe", key_size, value_size, max_entries))
    stack.callback(made.close)
    return made


class Connection:
    """A TCP connection of this process with itself, over the loopback device.

    A daemon may be at work on this host, with programs that put sockets into a SOCKHASH as they connect. A
    socket can be in no two with programs, so ours asks for something that keeps it out of that one, if it is
    to be `plain`.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        address: str = "127.0.0.1",
        family: int = socket.AF_INET,
        *,
        plain: bool = True,
    ) -> None:
        listener = stack.enter_context(socket.create_server((address, 0), family=family))
        self.sender = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        if plain:
            self.sender.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _RATE)
        self.sender.settimeout(2.0)
        self.sender.connect(listener.getsockname()[:2])
        self.sender.settimeout(None)
        self.receiver = stack.enter_context(listener.accept()[0])
        self.port: int = listener.getsockname()[1]
        """Of the receiver."""
