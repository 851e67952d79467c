# SPDX-License-Identifier: Apache-2.0
"""Probes of sending: what the kernel takes, and what of it arrives."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from socket import MSG_DONTWAIT, MSG_EOR, MSG_MORE, MSG_NOSIGNAL

from conformance.probes import probe
from conformance.probes.reading import _Iovec, _Mmsghdr
from conformance.scene import Scene, pattern

_libc = ctypes.CDLL(None, use_errno=True)


@probe(redirects=False)
def send_of_nothing(s: Scene) -> None:
    """A send of no bytes is 0, and nothing arrives."""
    s.client.send(b"")
    s.client.sendmsg([])
    s.client.sendmsg([b"", b""])
    s.settle()
    s.server.recv(10)
    s.server.poll()


@probe()
def send_sizes(s: Scene) -> None:
    """Messages from one byte to some hundred kilobytes, each taken whole and read whole."""
    for size in (1, 2, 63, 64, 1000, 1448, 4096, 16_384, 65_536, 300_000):
        s.client.push(pattern(size, size))
        s.server.take(size)
        s.server.push(pattern(size, size + 1))
        s.client.take(size)


@probe()
def one_byte_at_a_time(s: Scene) -> None:
    """Many sends of one byte."""
    for number in range(50):
        with s.quiet():
            s.client.send(bytes([number]))
    s.note("50 sends")
    s.settle()
    s.server.take(50)


@probe()
def sendmsg_buffers(s: Scene) -> None:
    """sendmsg(2) gathers its buffers, empty ones too."""
    s.client.sendmsg([b"a", b"", b"bc", pattern(1000), b"d"])
    s.settle()
    s.server.rest()


@probe()
def sendmsg_many_buffers(s: Scene) -> None:
    """A thousand buffers in one sendmsg(2)."""
    buffers = [pattern(7, number) for number in range(1000)]
    s.client.sendmsg(buffers)
    s.server.take(7000)


@probe()
def sendmsg_too_many_buffers(s: Scene) -> None:
    """More buffers than the kernel allows: EMSGSIZE, and nothing arrives."""
    s.client.sendmsg([b"x"] * 1025)
    s.client.send(b"y")
    s.settle()
    s.server.rest()


@probe()
def writev_large(s: Scene) -> None:
    """writev(2) of two megabytes in large buffers: whatever is taken arrives in order."""
    data = pattern(2 << 20, 5)
    view, sent = memoryview(data), 0
    reader = threading.Thread(target=lambda: s.server.take(len(data)))
    reader.start()
    with s.quiet():
        while sent < len(data):
            pieces = [view[at : at + 200_000] for at in range(sent, len(data), 200_000)]
            got = s.client.call("writev", os.writev, s.client.fd, pieces)
            if isinstance(got, str):
                s.client.wait(4)
            else:
                sent += got
        reader.join(10)
    s.note(f"sent {sent}, reader ended: {not reader.is_alive()}")
    s.settle()
    s.server.rest()


@probe()
def write_call(s: Scene) -> None:
    """write(2) is send(2) without flags."""
    s.client.call("write", os.write, s.client.fd, b"0123456789")
    s.settle()
    s.server.rest()
    s.client.call("write of nothing", os.write, s.client.fd, b"")


@probe()
def sendmmsg_call(s: Scene) -> None:
    """sendmmsg(2) sends its messages in order and tells how much of each."""
    s.client.call("sendmmsg", _sendmmsg, s.client.fd, [b"one ", b"two ", pattern(3000), b""])
    s.settle()
    s.server.rest()


def _sendmmsg(fd: int, words: list[bytes]) -> list[int]:
    kept = [ctypes.create_string_buffer(word, len(word) + 1) for word in words]
    iovecs = [_Iovec(ctypes.addressof(each), len(word)) for each, word in zip(kept, words, strict=True)]
    messages = (_Mmsghdr * len(words))()
    for message, iovec in zip(messages, iovecs, strict=True):
        message.hdr.iov = ctypes.pointer(iovec)
        message.hdr.iovlen = 1
    got = _libc.sendmmsg(fd, messages, len(words), 0)
    if got < 0:
        raise OSError(ctypes.get_errno(), "sendmmsg")
    return [messages[number].len for number in range(got)]


@probe()
def sendfile(s: Scene) -> None:
    """sendfile(2) from a file, from its middle, beyond its end."""
    source = os.memfd_create("probe")
    os.write(source, pattern(50_000, 3))
    for offset, count in ((0, 10), (100, 4096), (30_000, 20_000), (49_990, 100), (60_000, 10)):
        s.client.call(f"sendfile({offset}, {count})", os.sendfile, s.client.fd, source, offset, count)
        s.settle()
        s.server.rest()
    os.close(source)


@probe(cuts=8)
def sendfile_large(s: Scene) -> None:
    """sendfile(2) of a megabyte, as web servers send files."""
    source = os.memfd_create("probe")
    data = pattern(1 << 20, 4)
    os.write(source, data)
    sent = 0
    reader = threading.Thread(target=lambda: s.server.take(len(data)))
    reader.start()
    with s.quiet():
        while sent < len(data):
            got = s.client.call("sendfile", os.sendfile, s.client.fd, source, sent, len(data) - sent)
            if isinstance(got, str):
                s.client.wait(4)
            else:
                sent += got
        reader.join(10)
    os.close(source)
    s.note(f"sent {sent}, reader ended: {not reader.is_alive()}")
    s.settle()
    s.server.rest()


@probe(cuts=8)
def header_and_file(s: Scene) -> None:
    """A header with MSG_MORE and a file behind it, as nginx and Apache send responses."""
    source = os.memfd_create("probe")
    os.write(source, pattern(8000, 6))
    for _ in range(4):
        s.client.send(b"HTTP/1.1 200 OK\r\n\r\n", MSG_MORE)
        s.client.call("sendfile", os.sendfile, s.client.fd, source, 0, 8000)
        s.server.take(8019)
    os.close(source)


@probe()
def splice_to_the_socket(s: Scene) -> None:
    """splice(2) from a pipe into the socket: a writer's splice is harmless and byte-exact."""
    out, into = os.pipe()
    for size in (10, 4000, 30_000):
        os.write(into, pattern(size, size))
        s.client.call(f"splice({size})", os.splice, out, s.client.fd, size)
        s.settle()
        s.server.rest()
    os.close(out)
    os.close(into)


@probe()
def vmsplice_and_reuse(s: Scene) -> None:
    """Pages that are changed after send(2) returned do not change what was sent."""
    data = bytearray(b"A" * 10_000)
    s.client.call("send", s.client.sock.send, data)
    data[:] = b"B" * 10_000
    s.settle()
    with s.quiet():
        got = s.server.rest()
    s.note(f"the As arrived: {got == b'A' * 10_000}")


@probe()
def more(s: Scene) -> None:
    """MSG_MORE holds back at most; what follows completes it, in order."""
    s.client.send(b"a", MSG_MORE)
    s.client.send(b"b", MSG_MORE)
    s.client.send(b"c")
    s.server.take(3)
    s.client.send(b"d", MSG_MORE)
    s.server.take(1)
    s.settle()
    s.server.rest()


@probe(cuts=4)
def cork(s: Scene) -> None:
    """TCP_CORK: what is corked arrives when the cork is drawn, in order."""
    s.client.set("CORK", socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    s.client.send(b"header")
    s.client.send(b"body")
    s.client.set("no CORK", socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    s.server.take(10)
    s.client.get("CORK", socket.IPPROTO_TCP, socket.TCP_CORK)
    s.client.set("CORK", socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    s.client.send(b"left in the cork")
    s.server.take(16)


@probe()
def nodelay(s: Scene) -> None:
    """TCP_NODELAY on and off: order stays."""
    for value in (1, 0, 1):
        s.client.set("NODELAY", socket.IPPROTO_TCP, socket.TCP_NODELAY, value)
        for word in (b"a", b"bc", b"def"):
            s.client.send(word)
        s.server.take(6)


@probe()
def end_of_record(s: Scene) -> None:
    """MSG_EOR changes nothing of the stream."""
    s.client.send(b"abc", MSG_EOR)
    s.client.send(b"def", MSG_EOR)
    s.settle()
    s.server.rest()


@probe()
def send_from_nowhere(s: Scene) -> None:
    """A send from memory that is not there is EFAULT; nothing of it arrives, and the connection goes on."""
    s.client.call("send from nowhere", _send_at, s.client.fd, 1, 10)
    s.client.send(b"fine")
    s.settle()
    s.server.rest()


@probe()
def send_from_partly_nowhere(s: Scene) -> None:
    """A send whose memory ends on the way: what the kernel says it took is what arrives."""
    import mmap

    area = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    _areas.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    area[: mmap.PAGESIZE] = pattern(mmap.PAGESIZE)
    _libc.munmap(ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE))
    with s.quiet():
        got = s.client.call("send", _send_at, s.client.fd, start + mmap.PAGESIZE - 100, 300)
        s.settle()
        read = s.server.rest()
    taken = got if isinstance(got, int) else 0
    s.note(f"as much as was taken arrived: {read == pattern(mmap.PAGESIZE)[-100:][:taken]}")
    s.client.send(b"fine")
    s.settle()
    s.server.rest()


_areas: list[object] = []


def _send_at(fd: int, address: int, count: int) -> int:
    got = _libc.send(fd, ctypes.c_void_p(address), ctypes.c_size_t(count), MSG_NOSIGNAL)
    if got < 0:
        raise OSError(ctypes.get_errno(), "send")
    return int(got)


@probe(redirects=False)
def connected_already(s: Scene) -> None:
    """connect(2) again is EISCONN; send with an address is EISCONN or ignored, as TCP has it."""
    address = s.client.sock.getpeername()
    s.client.call("connect", s.client.sock.connect, address)
    s.client.call("sendto", s.client.sock.sendto, b"to", 0, address)
    s.settle()
    s.server.rest()
    s.client.call("listen", s.client.sock.listen, 1)
    s.client.call("bind", s.client.sock.bind, ("127.0.0.1", 0))


@probe()
def control_message_refused(s: Scene) -> None:
    """A control message that TCP does not know is refused; the connection goes on."""
    s.client.call(
        "sendmsg", s.client.sock.sendmsg, [b"x"], [(socket.SOL_SOCKET, 250, b"\0\0\0\0")], MSG_DONTWAIT
    )
    s.client.send(b"y")
    s.settle()
    s.server.rest()


@probe()
def concurrent_writers(s: Scene) -> None:
    """Threads that send small messages on one socket: no message is torn, none is lost."""
    count, writers = 120, 4

    def write(letter: bytes) -> None:
        for _ in range(count):
            while True:
                try:
                    s.client.sock.send(letter * 10)
                    break
                except BlockingIOError:
                    time.sleep(0.001)

    threads = [threading.Thread(target=write, args=(bytes([65 + n]),)) for n in range(writers)]
    s.moment()
    for each in threads:
        each.start()
    with s.quiet():
        data = s.server.take(count * writers * 10)
    for each in threads:
        each.join()
    s.moment()
    whole = all(len(set(data[at : at + 10])) == 1 for at in range(0, len(data), 10))
    counts = {letter: data.count(letter) for letter in sorted(set(data))}
    s.note(f"whole: {whole}, {counts}")
    s.settle()
    s.server.rest()


@probe()
def concurrent_readers(s: Scene) -> None:
    """Threads that read one socket: together they get every byte once."""
    got: list[bytes] = []
    total = 40_000
    lock = threading.Lock()

    def read() -> None:
        while sum(map(len, got)) < total:
            try:
                data = s.server.sock.recv(700)
            except BlockingIOError:
                time.sleep(0.0005)
                continue
            with lock:
                got.append(data)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for each in threads:
        each.start()
    data = pattern(total, 8)
    for at in range(0, total, 1000):
        with s.quiet():
            s.client.send(data[at : at + 1000])
    for each in threads:
        each.join(8)
    everything = b"".join(got)
    s.note(f"{len(everything)} bytes, each once: {sorted(everything) == sorted(data)}")


@probe()
def both_directions_at_once(s: Scene) -> None:
    """Both ends send before either reads."""
    for number in range(5):
        s.client.send(pattern(3000, number))
        s.server.send(pattern(2000, number + 10))
    s.server.take(15_000)
    s.client.take(10_000)


@probe()
def broken_pipe(s: Scene) -> None:
    """send(2) after shutdown(SHUT_WR) is EPIPE, with SIGPIPE unless MSG_NOSIGNAL."""
    seen: list[int] = []
    signal.signal(signal.SIGPIPE, lambda number, frame: seen.append(number))
    s.client.shutdown(socket.SHUT_WR)
    s.client.send(b"late")
    s.note(f"SIGPIPE: {len(seen)}")
    s.client.send(b"late", MSG_NOSIGNAL)
    s.note(f"SIGPIPE: {len(seen)}")
    s.client.call("write", os.write, s.client.fd, b"late")
    s.note(f"SIGPIPE: {len(seen)}")
    s.server.rest()
    s.server.send(b"still open")
    s.settle()
    s.client.rest()
