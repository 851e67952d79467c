# SPDX-License-Identifier: Apache-2.0
"""Probes of options that are set while the connection is in use, and of what can be asked of it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import threading
import time

from conformance.probes import probe
from conformance.scene import End, Scene, error_name, names, pattern, received_bytes

SO_PEEK_OFF, SO_ZEROCOPY, SO_INCOMING_CPU = 42, 60, 49
TCP_ULP, TCP_REPAIR, TCP_NOTSENT_LOWAT = 31, 19, 25
MSG_ZEROCOPY = 0x4000000
SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP


@probe()
def outq_while_data_waits(s: Scene) -> None:
    """SIOCOUTQ is 0 once everything has arrived, read or not."""
    s.client.outq()
    s.client.send(pattern(3000))
    s.until("acknowledged", lambda: _outq(s) == 0)
    s.client.outq()
    s.server.fionread()
    s.server.rest()
    s.client.outq()


def _outq(s: Scene) -> int:
    return int(struct.unpack("i", fcntl.ioctl(s.client.sock, 0x5411, b"\0" * 4))[0])


@probe(cuts=4)
def outq_of_a_full_connection(s: Scene) -> None:
    """SIOCOUTQ tells what waits to be sent when the reader does not read."""
    total = s.client.fill(50_000)
    s.note(f"something waits: {_outq(s) > 0}")
    with s.quiet():
        s.server.take(total)
    s.until("all is acknowledged", lambda: _outq(s) == 0)
    s.client.outq()


@probe(redirects=False)
def receive_low_water(s: Scene) -> None:
    """SO_RCVLOWAT asked for later holds for what comes then: not readable before that many bytes."""
    s.server.set("RCVLOWAT", SOL, socket.SO_RCVLOWAT, 1000)
    s.server.get("RCVLOWAT", SOL, socket.SO_RCVLOWAT)
    s.client.send(pattern(400))
    s.settle()
    s.server.poll(0.02)
    s.client.send(pattern(600))
    s.settle()
    s.server.poll(1.0)
    s.server.rest()
    s.server.set("RCVLOWAT", SOL, socket.SO_RCVLOWAT, 1)
    s.client.send(b"x")
    s.settle()
    s.server.poll(1.0)
    s.server.rest()


@probe()
def receive_low_water_with_bytes_there(s: Scene) -> None:
    """SO_RCVLOWAT asked for while bytes wait: these count."""
    s.client.send(pattern(400))
    s.settle()
    s.server.set("RCVLOWAT", SOL, socket.SO_RCVLOWAT, 1000)
    s.server.poll(0.02)
    s.client.send(pattern(600))
    s.settle()
    s.server.poll(1.0)
    s.server.rest()


@probe(redirects=False)
def peek_offset(s: Scene) -> None:
    """SO_PEEK_OFF asked for later: each peek goes on where the last ended; reads move it back."""
    s.server.set("PEEK_OFF", SOL, SO_PEEK_OFF, 0)
    s.client.send(b"0123456789")
    s.settle()
    s.server.recv(3, socket.MSG_PEEK)
    s.server.recv(3, socket.MSG_PEEK)
    s.server.get("PEEK_OFF", SOL, SO_PEEK_OFF)
    s.server.recv(2)
    s.server.get("PEEK_OFF", SOL, SO_PEEK_OFF)
    s.server.recv(100, socket.MSG_PEEK)
    s.server.rest()
    s.server.set("PEEK_OFF", SOL, SO_PEEK_OFF, -1)


@probe(redirects=False)
def zero_copy(s: Scene) -> None:
    """SO_ZEROCOPY asked for later: MSG_ZEROCOPY sends arrive, and their completion too."""
    s.client.set("ZEROCOPY", SOL, SO_ZEROCOPY, 1)
    s.client.send(pattern(20_000), MSG_ZEROCOPY)
    s.server.take(20_000)
    s.client.wait(select.POLLERR)
    s.client.recvmsg(1, flags=socket.MSG_ERRQUEUE, ancillary=128)


@probe()
def zero_copy_not_asked_for(s: Scene) -> None:
    """MSG_ZEROCOPY without SO_ZEROCOPY is an ordinary send, without completion."""
    s.client.send(pattern(20_000), MSG_ZEROCOPY)
    s.server.take(20_000)
    s.client.recvmsg(1, flags=socket.MSG_ERRQUEUE, ancillary=128)


@probe(redirects=False)
def upper_layer_protocol(s: Scene) -> None:
    """TCP_ULP "tls" is granted or refused as ever, an unknown one is ENOENT; bytes flow on."""
    s.client.set("ULP none", TCP, TCP_ULP, b"none")
    s.client.send(b"before")
    s.settle()
    s.server.rest()
    s.client.set("ULP tls", TCP, TCP_ULP, b"tls")
    s.server.send(b"after")
    s.settle()
    s.client.rest()


@probe()
def repair(s: Scene) -> None:
    """TCP_REPAIR on a living connection: on, the queues can be chosen; off, it goes on."""
    s.server.send(b"waits")
    s.settle()
    s.client.set("REPAIR", TCP, TCP_REPAIR, 1)
    s.client.set("REPAIR_QUEUE", TCP, 20, 1)
    s.client.set("no REPAIR", TCP, TCP_REPAIR, 0)
    s.client.rest()
    s.client.send(b"goes on")
    s.settle()
    s.server.rest()


@probe()
def repair_checkpoint(s: Scene) -> None:
    """What CRIU does: TCP_REPAIR, then a peek into the receive queue finds the bytes that wait."""
    s.server.send(b"to be saved")
    s.settle()
    s.client.set("REPAIR", TCP, TCP_REPAIR, 1)
    s.client.set("REPAIR_QUEUE", TCP, 20, 1)
    s.client.recv(100, socket.MSG_PEEK)
    s.client.set("no REPAIR", TCP, TCP_REPAIR, 0)
    s.client.rest()


def await_stamps(s: Scene, sender: End, reader: End) -> None:
    """The first on a host to ask for time stamps switches them on, and the kernel takes its time."""

    def is_stamped() -> bool:
        sender.sock.send(b"?")
        s.settle()
        return bool(reader.sock.recvmsg(1, 256)[1])

    s.until("stamps are on", is_stamped)


@probe(redirects=False)
def timestamps(s: Scene) -> None:
    """SO_TIMESTAMPNS asked for later: recvmsg(2) carries a time."""
    s.server.set("TIMESTAMPNS", SOL, 35, 1)
    await_stamps(s, s.client, s.server)
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("recvmsg", lambda: len(s.server.sock.recvmsg(4, 256)[1]))
    s.server.rest()


@probe(redirects=False, cuts=3)
def socket_filter(s: Scene) -> None:
    """A filter that lets nothing through (SO_ATTACH_FILTER) holds for what is sent afterwards."""
    expect_filtered(s)


def expect_filtered(s: Scene) -> None:
    """With a filter that lets nothing through nothing comes, and everything when it is taken away."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    s.server.set("ATTACH_FILTER", SOL, 26, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
    s.client.send(b"filtered")
    time.sleep(0.03)
    s.server.recv(10)
    s.server.set("DETACH_FILTER", SOL, 27, 0)
    s.server.take(8)


@probe(redirects=False)
def pacing(s: Scene) -> None:
    """SO_MAX_PACING_RATE asked for later: everything still arrives."""
    s.client.set("MAX_PACING_RATE", SOL, 47, 50_000_000)
    s.client.push(pattern(100_000))
    s.server.take(100_000)


@probe()
def buffer_sizes(s: Scene) -> None:
    """SO_SNDBUF and SO_RCVBUF set later: the numbers are as ever, and so is the stream."""
    for end, option in ((s.client, socket.SO_SNDBUF), (s.server, socket.SO_RCVBUF)):
        end.set("buffer", SOL, option, 20_000)
        end.get("buffer", SOL, option)
    reader = threading.Thread(target=lambda: s.server.take(300_000))
    with s.quiet():
        reader.start()
        s.client.push(pattern(300_000), 10_000)
        reader.join(8)
    s.note(f"reader ended: {not reader.is_alive()}")


def _fill_small_buffers(s: Scene, chunk: int, kilobytes: int) -> None:
    s.client.set("SNDBUF", SOL, socket.SO_SNDBUF, 10_000)
    s.server.set("RCVBUF", SOL, socket.SO_RCVBUF, 10_000)
    total = s.client.fill(chunk)
    s.note(f"less than {kilobytes} kB on the way: {total < kilobytes * 1000}")
    with s.quiet():
        s.server.take(total)


@probe(cuts=2, drains=1, storms=0)
def small_send_buffer_bounds(s: Scene) -> None:
    """SO_SNDBUF and SO_RCVBUF bound what a sender can have on its way."""
    _fill_small_buffers(s, 1000, 200)


@probe(cuts=2, drains=1, storms=0)
def small_buffers_and_large_messages(s: Scene) -> None:
    """The same with large messages."""
    _fill_small_buffers(s, 40_000, 500)


@probe()
def traffic_in_tcp_info(s: Scene) -> None:
    """TCP_INFO counts the bytes that came."""
    before = received_bytes(s.server.sock)
    s.client.send(pattern(1000))
    s.settle()
    s.note(f"received {received_bytes(s.server.sock) - before}")
    s.server.rest()


@probe()
def not_sent_low_water(s: Scene) -> None:
    """TCP_NOTSENT_LOWAT set later."""
    s.client.set("NOTSENT_LOWAT", TCP, TCP_NOTSENT_LOWAT, 16_384)
    s.client.poll()
    s.client.send(pattern(5000))
    s.settle()
    s.client.poll()
    s.server.rest()


@probe()
def names_of_the_ends(s: Scene) -> None:
    """getsockname and getpeername of the two ends mirror each other; type, domain and error are as ever."""
    s.client.call("mirrored", lambda: s.client.sock.getsockname() == s.server.sock.getpeername())
    s.server.call("mirrored", lambda: s.server.sock.getsockname() == s.client.sock.getpeername())
    for end in (s.client, s.server):
        end.get("TYPE", SOL, socket.SO_TYPE)
        end.get("DOMAIN", SOL, socket.SO_DOMAIN)
        end.get("ACCEPTCONN", SOL, socket.SO_ACCEPTCONN)
        end.get("KEEPALIVE", SOL, socket.SO_KEEPALIVE)
        end.get("RCVLOWAT", SOL, socket.SO_RCVLOWAT)
        end.error()
    s.client.send(b"x")
    s.settle()
    s.server.rest()


@probe()
def state_of_the_connection(s: Scene) -> None:
    """TCP_INFO tells the state, with bytes waiting and after half an end."""
    s.client.call("state", s.client.state)
    s.client.send(b"x")
    s.settle()
    s.server.call("state", s.server.state)
    s.client.shutdown(socket.SHUT_WR)
    s.server.call("state", s.server.state)
    s.server.rest()
    s.server.call("state", s.server.state)


@probe()
def congestion_control(s: Scene) -> None:
    """TCP_CONGESTION set later."""
    s.client.set("CONGESTION", TCP, socket.TCP_CONGESTION, b"reno")
    s.client.send(pattern(2000))
    s.settle()
    s.server.rest()


@probe()
def receive_timeout_on_nonblocking(s: Scene) -> None:
    """SO_RCVTIMEO means nothing where the socket does not block."""
    s.server.set("RCVTIMEO", SOL, socket.SO_RCVTIMEO, struct.pack("ll", 5, 0))
    s.server.recv(10)
    s.client.send(b"x")
    s.settle()
    s.server.recv(10)


@probe()
def blocking_mode_by_ioctl(s: Scene) -> None:
    """FIONBIO says what O_NONBLOCK says: set again it changes nothing."""
    s.server.call("FIONBIO", fcntl.ioctl, s.server.sock, 0x5421, struct.pack("i", 1))
    s.server.recv(10)
    s.client.send(b"x")
    s.settle()
    s.server.recv(10)


def _recv(s: Scene) -> object:
    try:
        return s.server.sock.recv(100)
    except OSError as error:
        return error_name(error)


@probe()
def blocking_from_now_on(s: Scene) -> None:
    """O_NONBLOCK cleared on a connection in use: a read with bytes there gets them, an empty one waits."""
    s.client.send(b"first")
    s.settle()
    s.server.sock.setblocking(True)
    s.server.recv(100)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(_recv(s)))
    thread.start()
    time.sleep(0.05)
    s.note(f"waits: {not got}")
    s.client.send(b"second")
    thread.join(3)
    s.note(f"got {got}")


@probe(redirects=False)
def wait_all_from_now_on(s: Scene) -> None:
    """O_NONBLOCK cleared, then MSG_WAITALL: all of it in one read."""
    s.server.sock.setblocking(True)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(s.server.sock.recv(900, socket.MSG_WAITALL)))
    thread.start()
    for number in range(3):
        time.sleep(0.03)
        s.client.send(pattern(300, number))
    thread.join(3)
    s.note(f"got {[len(each) for each in got if isinstance(each, bytes)]}")


@probe(redirects=False)
def blocking_reader_reset(s: Scene) -> None:
    """O_NONBLOCK cleared, then a read that sleeps while the other end resets: ECONNRESET."""
    s.server.sock.setblocking(True)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(_recv(s)))
    thread.start()
    time.sleep(0.05)
    s.client.reset()
    thread.join(3)
    s.note(f"got {got}")


# The process is remembered: it plays once.
@probe(redirects=False, cuts=4, drains=1, storms=0)
def splice_from_now_on(s: Scene) -> None:
    """splice(2) from a socket that was read by recv(2) until now, with nothing there and then with bytes."""
    out, into = os.pipe()
    s.server.call("splice", os.splice, s.server.fd, into, 4096)
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("splice", os.splice, s.server.fd, into, 4096)
    s.call("pipe", os.read, out, 100)
    s.client.send(b"more")
    s.settle()
    s.server.rest()
    os.close(out)
    os.close(into)


@probe(cuts=3, drains=1, storms=0)
def splice_while_bytes_wait(s: Scene) -> None:
    """splice(2) gets bytes that wait already, on a socket that was read by recv(2) until now."""
    out, into = os.pipe()
    s.client.send(b"0123456789")
    s.settle()
    s.server.call("splice", os.splice, s.server.fd, into, 4096)
    s.server.rest()
    os.close(out)
    os.close(into)


@probe()
def priority_and_mark(s: Scene) -> None:
    """SO_PRIORITY and IP_TOS set later: what they are set to, and bytes flow on."""
    s.client.set("PRIORITY", SOL, socket.SO_PRIORITY, 5)
    s.client.set("TOS", socket.IPPROTO_IP, socket.IP_TOS, 0x10)
    s.client.send(b"marked")
    s.settle()
    s.server.rest()
    s.client.get("PRIORITY", SOL, socket.SO_PRIORITY)
    s.client.get("TOS", socket.IPPROTO_IP, socket.IP_TOS)


@probe()
def busy_poll(s: Scene) -> None:
    """SO_BUSY_POLL set later."""
    s.server.set("BUSY_POLL", SOL, 46, 50)
    s.client.send(b"x")
    s.settle()
    s.server.poll()
    s.server.rest()
    s.server.recv(1)


@probe()
def quick_acknowledgements(s: Scene) -> None:
    """TCP_QUICKACK on and off."""
    for value in (0, 1):
        s.server.set("QUICKACK", TCP, socket.TCP_QUICKACK, value)
        s.client.send(b"x")
        s.settle()
        s.server.rest()


@probe()
def both_ends_in_one_poll(s: Scene) -> None:
    """poll(2) of both ends together, with a message each way."""
    s.client.send(b"a")
    s.server.send(b"b")
    s.settle()
    poller = select.poll()
    for end in (s.client, s.server):
        poller.register(end.sock, select.POLLIN | select.POLLOUT)
    s.call("poll", lambda: sorted(names(mask) for _, mask in poller.poll(1000)))
    s.client.rest()
    s.server.rest()
