# SPDX-License-Identifier: Apache-2.0
"""Probes of reading: what each call gets, counts, and leaves."""

from __future__ import annotations

import ctypes
import os
import socket
from socket import MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC, MSG_WAITALL

from conformance.probes import probe
from conformance.scene import Scene, pattern

# Enough for all that a probe sends at once.
_ROOM = (socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)


@probe()
def byte_stream(s: Scene) -> None:
    """A read takes part of a message, or several at once; nothing left is EAGAIN."""
    s.client.send(b"abcdefgh")
    s.settle()
    s.server.recv(3)
    s.server.recv(5)
    s.server.recv(1)
    for word in (b"ab", b"cd", b"ef"):
        s.client.send(word)
    s.settle()
    s.server.rest()
    s.server.send(b"answer")
    s.settle()
    s.client.recv(100)


@probe()
def several_messages_in_one_read(s: Scene) -> None:
    """Messages that wait together are read together, up to the size of the buffer."""
    for word in (b"one ", b"two ", b"three "):
        s.client.send(word)
    s.settle()
    s.server.recv(100)
    s.server.rest()


@probe()
def read_of_nothing(s: Scene) -> None:
    """A read of no bytes is 0 with data there, and takes nothing."""
    s.client.send(b"data")
    s.settle()
    s.server.recv(0)
    s.server.read(0)
    s.server.recv(10)


@probe(redirects=False)
def read_of_nothing_when_empty(s: Scene) -> None:
    """A read of no bytes with nothing there is 0 as well."""
    s.server.recv(0)
    s.server.recv(1)


@probe()
def read_call(s: Scene) -> None:
    """read(2) is recv(2) without flags."""
    s.server.read(10)
    s.client.send(b"0123456789")
    s.settle()
    s.server.read(4)
    s.server.read(100)
    s.server.read(1)


@probe()
def readv_call(s: Scene) -> None:
    """readv(2) fills one buffer after the other."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.readv(3, 4, 2)
    s.server.readv(3, 4)
    s.server.readv(1, 1)


@probe()
def readv_across_messages(s: Scene) -> None:
    """readv(2) fills a buffer from two messages."""
    s.client.send(b"01234")
    s.client.send(b"56789")
    s.settle()
    s.server.readv(3, 4, 10)
    s.server.rest()


@probe()
def recvmsg_buffers(s: Scene) -> None:
    """recvmsg(2) with several buffers; no control messages, no flags."""
    s.client.send(pattern(5000))
    s.settle()
    s.server.recvmsg(1, 1000, 3, 2000, ancillary=256)
    s.server.recvmsg(4000, 1)
    s.server.recvmsg(1)


@probe()
def recvmsg_trunc_flag(s: Scene) -> None:
    """recvmsg(2) never says MSG_TRUNC of a stream."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.recvmsg(2)
    s.server.recvmsg(20)


@probe()
def recvmmsg_call(s: Scene) -> None:
    """recvmmsg(2) takes one read's worth for each of its messages."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recvmmsg", _recvmmsg, s.server.fd, 3, 4)
    s.server.call("recvmmsg", _recvmmsg, s.server.fd, 3, 4)


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


class _Msghdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Mmsghdr(ctypes.Structure):
    _fields_ = [("hdr", _Msghdr), ("len", ctypes.c_uint32)]


_libc = ctypes.CDLL(None, use_errno=True)


def _recvmmsg(fd: int, count: int, size: int) -> list[bytes]:
    buffers = [ctypes.create_string_buffer(size) for _ in range(count)]
    iovecs = [_Iovec(ctypes.addressof(each), size) for each in buffers]
    messages = (_Mmsghdr * count)()
    for message, iovec in zip(messages, iovecs, strict=True):
        message.hdr.iov = ctypes.pointer(iovec)
        message.hdr.iovlen = 1
    got = _libc.recvmmsg(fd, messages, count, MSG_DONTWAIT, None)
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return [buffers[number].raw[: messages[number].len] for number in range(got)]


@probe()
def trunc_discards(s: Scene) -> None:
    """recv(MSG_TRUNC) throws bytes away and counts them; the next read gets what follows."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recv(4, TRUNC)", lambda: len(s.server.sock.recv(4, MSG_TRUNC)))
    s.server.recv(100)


@probe()
def trunc_into_nothing(s: Scene) -> None:
    """recv(NULL, n, MSG_TRUNC) is how a reader skips bytes without a buffer for them."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recv(NULL, 4, TRUNC)", _skip, s.server.fd, 4)
    s.server.recv(100)


def _skip(fd: int, count: int) -> int:
    got = _libc.recv(fd, None, ctypes.c_size_t(count), MSG_TRUNC)
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(got)


@probe()
def peek(s: Scene) -> None:
    """MSG_PEEK shows what the next read returns and takes nothing."""
    s.client.send(b"abcdefg")
    s.settle()
    s.server.recv(2, MSG_PEEK)
    s.server.recv(100, MSG_PEEK)
    s.server.recv(1)
    s.server.recv(3, MSG_PEEK)
    s.server.recv(100)
    s.server.recv(1, MSG_PEEK)


@probe()
def peek_across_messages(s: Scene) -> None:
    """MSG_PEEK shows several messages at once."""
    s.client.send(b"abc")
    s.client.send(b"defg")
    s.settle()
    s.server.recv(100, MSG_PEEK)
    s.server.rest()


@probe(drains=4)
def peek_then_larger(s: Scene) -> None:
    """A server that peeks until a whole request is there, as protocol sniffers do, sees it grow."""
    for part in (b"GET ", b"/ HTTP", b"/1.1"):
        s.client.send(part)
        s.settle()
        s.server.recv(100, MSG_PEEK)
    s.server.rest()


@probe()
def peek_at_the_end(s: Scene) -> None:
    """MSG_PEEK sees the end of the stream, again and again."""
    s.client.send(b"last")
    s.client.shutdown(socket.SHUT_WR)
    s.server.recv(10, MSG_PEEK)
    s.server.recv(10)
    s.server.recv(10, MSG_PEEK)
    s.server.recv(10, MSG_PEEK)
    s.server.recv(10)


@probe()
def recvmsg_peek(s: Scene) -> None:
    """recvmsg(MSG_PEEK) into several buffers."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.recvmsg(2, 3, flags=MSG_PEEK)
    s.server.recvmsg(2, 30)


@probe()
def dontwait(s: Scene) -> None:
    """MSG_DONTWAIT with nothing there is EAGAIN, with something a read."""
    s.server.recv(1, MSG_DONTWAIT)
    s.client.send(b"x")
    s.settle()
    s.server.recv(1, MSG_DONTWAIT)


@probe()
def waitall_on_nonblocking(s: Scene) -> None:
    """MSG_WAITALL means nothing on a non-blocking socket."""
    s.client.send(b"abc")
    s.settle()
    s.server.recv(10, MSG_WAITALL)
    s.server.recv(10, MSG_WAITALL)


@probe()
def fionread(s: Scene) -> None:
    """FIONREAD is the number of bytes that wait."""
    s.server.fionread()
    s.client.send(pattern(100))
    s.settle()
    s.server.fionread()
    s.server.recv(30)
    s.server.fionread()
    s.server.rest()
    s.server.fionread()


@probe(drains=4)
def fionread_several_messages(s: Scene) -> None:
    """FIONREAD counts all messages that wait."""
    for size in (100, 5000, 1):
        s.client.send(pattern(size))
        s.settle()
        s.server.fionread()
    s.server.rest()


@probe()
def fionread_while_peeking(s: Scene) -> None:
    """MSG_PEEK changes nothing of what FIONREAD counts."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.recv(4, MSG_PEEK)
    s.server.fionread()
    s.server.rest()


@probe(drains=4)
def fionread_at_the_end(s: Scene) -> None:
    """FIONREAD does not count the FIN."""
    s.client.send(b"0123456789")
    s.client.shutdown(socket.SHUT_WR)
    s.server.fionread()
    s.server.rest()
    s.server.fionread()


@probe(drains=4)
def exact_reader(s: Scene) -> None:
    """A reader that asks FIONREAD when it is readable, and reads as much, as nginx does, gets everything and
    is never told 0 while it is readable."""
    for size in (1, 700, 20_000, 3, 64):
        s.client.push(pattern(size, size))
        got, zero = b"", 0
        while len(got) < size:
            s.server.wait(1)
            with s.quiet():
                waiting = s.server.fionread()
                zero += not waiting
                if waiting:
                    got += s.server.recv(waiting)
        s.note(f"server read {len(got)}, told 0 {zero} times, right: {got == pattern(size, size)}")


@probe()
def bad_buffer(s: Scene) -> None:
    """A read into memory that is not there is EFAULT; afterwards the bytes are still to be read."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recv into nowhere", _recv_at, s.server.fd, 1, 10)
    s.server.recv(100)


def _recv_at(fd: int, address: int, count: int) -> int:
    got = _libc.recv(fd, ctypes.c_void_p(address), ctypes.c_size_t(count), 0)
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(got)


@probe()
def partly_bad_buffer(s: Scene) -> None:
    """A buffer that ends in the middle of what is read: no byte is lost or read twice."""
    _read_beyond(s, pattern(300), 100)


@probe(options=((_ROOM,), ()))
def partly_bad_buffer_for_much(s: Scene) -> None:
    """The same in a send(2) of several page fragments."""
    _read_beyond(s, pattern(100_000), 50_000)


def _read_beyond(s: Scene, data: bytes, room: int) -> None:
    import mmap

    area = s.keep(mmap.mmap(-1, 16 * mmap.PAGESIZE))
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = start + 15 * mmap.PAGESIZE
    _libc.munmap(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE))
    s.client.send(data)
    s.settle()
    with s.quiet():
        got = s.server.call("recv", _recv_at, s.server.fd, end - room, len(data))
    read = ctypes.string_at(end - room, got) if isinstance(got, int) else b""
    with s.quiet():
        left = s.server.rest()
    s.note(f"all there: {(read + left) == data}, after {'EFAULT' if got == 'EFAULT' else 'some'}")
    # The mapping is half gone; Python must not unmap it again.
    s._open.remove(area)
    _kept.append(area)


_kept: list[object] = []


@probe()
def recv_into_many_small(s: Scene) -> None:
    """One byte at a time."""
    s.client.send(b"0123456789")
    s.settle()
    got = b""
    for _ in range(10):
        with s.quiet():
            got += s.server.recv(1)
    s.note(f"server got {got!r}")
    s.server.recv(1)


@probe(redirects=False)
def errqueue_is_empty(s: Scene) -> None:
    """recvmsg(MSG_ERRQUEUE) on a healthy connection is EAGAIN, data or not."""
    s.server.recvmsg(10, flags=socket.MSG_ERRQUEUE, ancillary=64)
    s.client.send(b"x")
    s.settle()
    s.server.recvmsg(10, flags=socket.MSG_ERRQUEUE, ancillary=64)
    s.server.recv(10)


@probe(redirects=False)
def oob_without_urgent_data(s: Scene) -> None:
    """recv(MSG_OOB) with no urgent data is EINVAL."""
    s.server.recv(1, socket.MSG_OOB)
    s.client.send(b"x")
    s.settle()
    s.server.recv(1, socket.MSG_OOB)
    s.server.recv(10)


@probe()
def urgent_data(s: Scene) -> None:
    """MSG_OOB: the urgent byte is out of the stream, announced by EPOLLPRI, read with MSG_OOB."""
    s.client.send(b"ab!", socket.MSG_OOB)
    s.settle()
    s.server.poll()
    s.server.recv(10)
    s.server.recv(1, socket.MSG_OOB)
    s.server.recv(10)


@probe()
def from_address(s: Scene) -> None:
    """recvfrom(2) of a connected stream names no sender."""
    s.client.send(b"x")
    s.settle()
    s.server.call("recvfrom(10)", lambda: str(s.server.sock.recvfrom(10)))
