# SPDX-License-Identifier: Apache-2.0
"""A peer that does what few programs do: it stops inside recv(2) until told to go on, has two threads at one
socket, and leaves the network namespace that its connections are in.

Run as a script like peer.py and with the operations of habits.py as well.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import habits
import peer
from connection import FaultingMemory, Overdue

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
BYTES_RECEIVED = 128  # offset of tcpi_bytes_received in struct tcp_info, <linux/tcp.h>


class Held:
    """One recv(2) of a thread, which sits in the kernel with the socket locked until it is released."""

    def __init__(self, sock: socket.socket, count: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._memory = FaultingMemory(self._libc)
        self._got = 0
        self._thread = threading.Thread(target=self._receive, args=(sock.fileno(), count))
        self._thread.start()

    def is_held(self, timeout: float) -> bool:
        """True once the kernel waits for the memory."""
        poller = select.poll()
        poller.register(self._memory.fd, select.POLLIN)
        return bool(poller.poll(timeout * 1000))

    def release(self) -> bytes:
        self._memory.provide()
        self._thread.join()
        data = ctypes.string_at(self._memory.address, max(self._got, 0))
        self._memory.close()
        if self._got < 0:
            raise OSError(errno.EIO, "recv failed")
        return data

    def _receive(self, fd: int, count: int) -> None:
        self._got = self._libc.recv(fd, ctypes.c_void_p(self._memory.address), count, 0)


class Juggler(habits.Habitual):
    """The operations of habits.py, and these."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, Held] = {}
        self._sends: dict[str, tuple[threading.Thread, list[Any]]] = {}
        self._home = -1
        self._cookie = 0

    # a reader that stops

    def hold(self, conn: str, count: int, timeout: float = 5.0) -> None:
        """Begin a recv(2) of bytes that wait; returns when it sits in the kernel with the socket locked."""
        self._held[conn] = Held(self._connections[conn].sock, count)
        if not self._held[conn].is_held(timeout):
            raise Overdue

    def release(self, conn: str) -> int:
        """Let the recv(2) of `hold` go on; what it got."""
        data = self._held.pop(conn).release()
        self._connections[conn].note_received(data)
        return len(data)

    # two threads at one socket

    def begin_send(self, conn: str, count: int) -> None:
        """A thread of its own does one send(2) of stream bytes."""
        done: list[Any] = []

        def send() -> None:
            try:
                done.append(self._connections[conn].put_stream(count))
            except OSError as error:
                done.append(errno.errorcode.get(error.errno or 0, "UNKNOWN"))

        thread = threading.Thread(target=send, daemon=True)
        self._sends[conn] = thread, done
        thread.start()

    def wait_for_lock(self, conn: str, timeout: float = 5.0) -> None:
        """Returns when the send(2) of `begin_send` waits for the socket's lock: nothing else there sleeps
        uninterruptibly."""
        deadline = time.monotonic() + timeout
        stat = Path(f"/proc/self/task/{self._sends[conn][0].native_id}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "D":
            if time.monotonic() > deadline:
                raise Overdue
            time.sleep(0.001)

    def finish_send(self, conn: str, timeout: float = 10.0) -> Any:
        """What the send(2) of `begin_send` answered."""
        thread, done = self._sends[conn]
        thread.join(timeout)
        if thread.is_alive():
            raise Overdue
        return done[0]

    # going elsewhere

    def leave_home(self) -> int:
        """Go to a new network namespace with nothing but a loopback interface; its cookie."""
        self._home = _open_namespace("self")
        _enter(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        self._cookie = super().netns_cookie()
        return self._cookie

    def follow(self, pid: int) -> int:
        """Go to the network namespace of another process; its cookie."""
        self._home, there = _open_namespace("self"), _open_namespace(pid)
        try:
            _enter(ctypes.CDLL(None, use_errno=True).setns(there, CLONE_NEWNET))
        finally:
            os.close(there)
        self._cookie = super().netns_cookie()
        return self._cookie

    def go_home(self) -> None:
        """Go back, and leave the connections where they are."""
        _enter(ctypes.CDLL(None, use_errno=True).setns(self._home, CLONE_NEWNET))
        os.close(self._home)

    def netns_cookie(self) -> int:
        """Of the namespace that its connections are in."""
        return self._cookie or super().netns_cookie()

    # looking at a socket

    def fileno(self, conn: str) -> int:
        return self._connections[conn].sock.fileno()

    def count_through_tcp(self, conn: str) -> int:
        """Bytes that have come to this end through TCP."""
        info = self._connections[conn].sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("=Q", info, BYTES_RECEIVED)[0])


def _open_namespace(pid: int | str) -> int:
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "cannot change the network namespace")


if __name__ == "__main__":
    peer.Peer = Juggler  # type: ignore[misc]
    peer.serve()
