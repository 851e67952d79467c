# SPDX-License-Identifier: Apache-2.0
"""A peer that does what few programs do: it asks for odd socket options and has a kernel worker read for it.

Run as a script like peer.py and with its operations.
"""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import peer
from conformance.probes.uring import Uring
from connection import Overdue

SO_ATTACH_FILTER = 26
RETURN_CONSTANT = 6  # BPF_RET | BPF_K of classic BPF
TCPI_OPT_ECN = 8  # include/uapi/linux/tcp.h
OP_RECV, ASYNC = 27, 1 << 4  # IORING_OP_RECV, IOSQE_ASYNC


class Quirky(peer.Peer):
    """The operations of a peer, and those of programs that are out of the ordinary."""

    def __init__(self) -> None:
        super().__init__()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._ring: Uring | None = None

    def fileno(self, conn: str) -> int:
        return self._connections[conn].sock.fileno()

    def listener_fileno(self, listener: str) -> int:
        return self._listeners[listener].fileno()

    def attach_filter(self, conn: str) -> None:
        """A socket filter that lets everything pass."""
        code = ctypes.create_string_buffer(struct.pack("=HBBI", RETURN_CONSTANT, 0, 0, 0xFFFFFFFF))
        program = struct.pack("HL", 1, ctypes.addressof(code))
        self._connections[conn].sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)

    def ask(self, conn: str, level: int, option: int, size: int, address: int | None = None) -> str:
        """setsockopt(2) with `size` zero bytes, or what is at `address`; the name of its error, or OK."""
        zeroes = ctypes.create_string_buffer(size)
        where = ctypes.c_void_p(ctypes.addressof(zeroes) if address is None else address)
        done = self._libc.setsockopt(self._connections[conn].sock.fileno(), level, option, where, size)
        return "OK" if done == 0 else errno.errorcode[ctypes.get_errno()]

    def dial_in_vain(self, host: str, port: int) -> int:
        """The time-out (us) of a SYN to somebody who does not answer."""
        with socket.socket() as sock:
            sock.setblocking(False)
            assert sock.connect_ex((host, port)) == errno.EINPROGRESS
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return int(struct.unpack_from("=I", info, 8)[0])  # tcpi_rto

    def has_ecn(self, conn: str) -> bool:
        info = self._connections[conn].sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return bool(info[5] & TCPI_OPT_ECN)

    def open_ring(self) -> None:
        """Get ready for io_uring(7). Fails with ENOSYS or EPERM where there is none."""
        self._ring = Uring()

    def echo_by_worker(self, conn: str, rounds: int, size: int, timeout: float = 10.0) -> int:
        """`echo`, with each message received by a kernel worker of the ring that was opened."""
        assert self._ring is not None
        connection, deadline = self._connections[conn], time.monotonic() + timeout
        buffer = ctypes.create_string_buffer(size)
        for _ in range(rounds):
            left = size
            while left:
                connection.wait(select.POLLIN, deadline)
                self._ring.submit(OP_RECV, self.fileno(conn), ctypes.addressof(buffer), left, sqe_flags=ASYNC)
                got = self._ring.wait(timeout)
                if got is None:
                    raise Overdue
                if got <= 0:
                    raise OSError(-got or errno.ECONNRESET, "recv")
                connection.note_received(buffer.raw[:got])
                left -= got
            self.send(conn, size, timeout=timeout)
        return rounds


if __name__ == "__main__":
    peer.Peer = Quirky  # type: ignore[misc]
    peer.serve()
