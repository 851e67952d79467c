# SPDX-License-Identifier: Apache-2.0
"""Probes of endings: shutdown, close, reset, errors, and what the other end sees of them."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import threading
import time
from socket import MSG_NOSIGNAL, SHUT_RD, SHUT_RDWR, SHUT_WR

from support.pauses import Stopwatch

from conformance.probes import probe
from conformance.scene import End, Scene, pattern

LINGER = socket.SO_LINGER
_CLOSED, _CLOSE_WAIT = 7, 8


def _wait_closing(s: Scene, end: End) -> None:
    """Until an end has seen the other's FIN or RST."""
    s.until("the end arrives", lambda: end.state() not in (1, 4, 5))


@probe()
def end_of_stream(s: Scene) -> None:
    """The end of the stream comes after all bytes, and again at each later read."""
    s.client.send(b"all of it")
    s.client.shutdown(SHUT_WR)
    s.server.recv(4)
    s.server.recv(100)
    s.server.recv(100)
    s.server.recv(100)
    s.server.error()


@probe(cuts=3)
def end_after_many_messages(s: Scene) -> None:
    """The end of the stream comes after a thousand small messages."""
    with s.quiet():
        for number in range(900):
            s.client.send(pattern(20, number))
    s.note("900 messages")
    s.client.shutdown(SHUT_WR)
    s.server.take(18_001)


@probe()
def close_after_sending(s: Scene) -> None:
    """close(2) right after sending: the reader gets everything, then the end."""
    s.client.send(pattern(5000))
    s.client.close()
    _wait_closing(s, s.server)
    s.server.poll()
    s.server.rest()
    s.server.recv(10)


@probe()
def close_then_read_late(s: Scene) -> None:
    """The same, read when the closed socket is long gone."""
    for number in range(10):
        s.client.send(pattern(300, number))
    s.client.close()
    time.sleep(0.06)
    s.server.fionread()
    s.server.take(3001)
    s.server.send(b"anyone?", MSG_NOSIGNAL)
    _wait_reset(s, s.server)
    s.server.send(b"no?", MSG_NOSIGNAL)


def _wait_reset(s: Scene, end: End) -> None:
    s.until("the RST arrives", lambda: end.state() == _CLOSED)


@probe()
def half_close(s: Scene) -> None:
    """After shutdown(SHUT_WR) the other side answers, and its answer is complete."""
    s.client.send(b"request")
    s.client.shutdown(SHUT_WR)
    s.server.rest()
    s.server.push(pattern(100_000, 1))
    s.client.take(100_000)
    s.server.send(b"trailer")
    s.server.shutdown(SHUT_WR)
    s.client.rest()
    s.client.poll()
    s.server.poll()


@probe()
def half_close_both_ways(s: Scene) -> None:
    """Both ends shut down writing with bytes on their way both ways."""
    s.client.send(b"from the client")
    s.server.send(b"from the server")
    s.client.shutdown(SHUT_WR)
    s.server.shutdown(SHUT_WR)
    s.client.rest()
    s.server.rest()
    s.client.poll()
    s.server.poll()
    s.client.send(b"late", MSG_NOSIGNAL)
    s.server.send(b"late", MSG_NOSIGNAL)


@probe()
def half_closed_answer_read_late(s: Scene) -> None:
    """A half-closed response that is read after the server has closed is complete."""
    s.client.send(b"request")
    s.client.shutdown(SHUT_WR)
    s.server.rest()
    for number in range(10):
        s.server.send(pattern(300, number))
    s.server.close()
    time.sleep(0.06)
    s.client.take(3001)
    s.client.error()


@probe()
def shutdown_of_reading(s: Scene) -> None:
    """After shutdown(SHUT_RD) an empty queue reads as the end; what still comes can be read."""
    s.server.shutdown(SHUT_RD)
    s.server.recv(10)
    s.server.poll()
    s.client.send(b"still")
    s.settle()
    s.server.recv(10)
    s.server.recv(10)
    s.server.send(b"and back")
    s.settle()
    s.client.rest()


@probe()
def shutdown_of_reading_with_bytes_there(s: Scene) -> None:
    """shutdown(SHUT_RD) leaves what waits readable."""
    s.client.send(b"before")
    s.settle()
    s.server.shutdown(SHUT_RD)
    s.server.poll()
    s.server.recv(3)
    s.server.recv(10)
    s.server.recv(10)


@probe()
def shutdown_of_both(s: Scene) -> None:
    """shutdown(SHUT_RDWR): the other end gets everything and the end; this end reads what it had."""
    s.client.send(b"to the server")
    s.server.send(b"to the client")
    s.settle()
    s.client.shutdown(SHUT_RDWR)
    s.server.rest()
    s.client.poll()
    s.client.rest()
    s.client.send(b"late", MSG_NOSIGNAL)
    s.client.shutdown(SHUT_RDWR)


@probe(redirects=False)
def shutdown_twice(s: Scene) -> None:
    """shutdown(2) again is no error; of a socket that the other end has closed too it is ENOTCONN."""
    s.client.shutdown(SHUT_WR)
    s.client.shutdown(SHUT_WR)
    s.server.shutdown(SHUT_WR)
    s.until("both are through", lambda: s.server.state() == _CLOSED)
    s.server.call("shutdown", s.server.sock.shutdown, SHUT_WR)
    s.server.call("shutdown", s.server.sock.shutdown, SHUT_WR)


@probe()
def reset(s: Scene) -> None:
    """A RST is ECONNRESET once, then the end; a send is EPIPE."""
    s.client.reset()
    s.server.poll()
    s.server.recv(10)
    s.server.recv(10)
    s.server.send(b"x", MSG_NOSIGNAL)
    s.server.error()


@probe()
def reset_seen_by_sending(s: Scene) -> None:
    """A RST that a send comes upon first."""
    s.client.reset()
    s.server.send(b"x", MSG_NOSIGNAL)
    s.server.send(b"x", MSG_NOSIGNAL)
    s.server.recv(10)


@probe()
def reset_seen_by_so_error(s: Scene) -> None:
    """A RST that SO_ERROR takes away: reads are the end then."""
    s.client.reset()
    s.server.error()
    s.server.error()
    s.server.recv(10)
    s.server.send(b"x", MSG_NOSIGNAL)


@probe()
def reset_behind_unread_bytes(s: Scene) -> None:
    """Bytes that arrived before a RST."""
    s.client.send(b"last words")
    s.settle()
    s.client.reset()
    s.server.poll()
    s.server.fionread()
    s.server.recv(4)
    s.server.recv(100)
    s.server.recv(100)


@probe()
def reset_with_bytes_both_ways(s: Scene) -> None:
    """A RST by an end that has not read all, while the other has not either."""
    s.client.send(b"to the server")
    s.server.send(b"to the client")
    s.settle()
    s.client.reset()
    s.server.rest()
    s.server.error()


@probe(cuts=6)
def reset_in_flight(s: Scene) -> None:
    """A RST in the middle of a transfer ends the sender with ECONNRESET or EPIPE, and soon."""
    outcome: list[str] = []

    def send() -> None:
        data = pattern(20_000)
        while not outcome:
            try:
                s.server.sock.send(data, MSG_NOSIGNAL)
            except BlockingIOError:
                s.server.wait(select.POLLOUT)
            except OSError as error:
                outcome.append(type(error).__name__)

    thread = threading.Thread(target=send)
    thread.start()
    with s.quiet():
        s.client.take(200_000)
    s.client.reset()
    thread.join(5)
    s.note(f"sender ended: {bool(set(outcome) & {'ConnectionResetError', 'BrokenPipeError'})}")


@probe()
def close_with_unread_data(s: Scene) -> None:
    """close(2) with bytes unread sends a RST: the other end learns that they were not read."""
    s.client.send(b"never read")
    s.settle()
    s.server.close()
    _wait_closing(s, s.client)
    s.client.poll()
    s.client.recv(10)
    s.client.recv(10)
    s.client.send(b"x", MSG_NOSIGNAL)


@probe()
def close_with_unread_data_both_ways(s: Scene) -> None:
    """The same when the other end has bytes to read too."""
    s.client.send(b"never read")
    s.server.send(b"to be read")
    s.settle()
    s.server.close()
    _wait_closing(s, s.client)
    s.client.recv(100)
    s.client.recv(100)
    s.client.recv(100)


@probe()
def close_with_partly_read_data(s: Scene) -> None:
    """A message of which a part was read does not count as read."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.recv(5)
    s.server.close()
    _wait_closing(s, s.client)
    s.client.recv(10)
    s.client.recv(10)


@probe()
def send_to_a_closed_peer(s: Scene) -> None:
    """Sending to a peer that has closed: the first is taken and answered by a RST, then EPIPE."""
    s.server.close()
    _wait_closing(s, s.client)
    s.client.recv(10)
    s.client.send(b"anyone?", MSG_NOSIGNAL)
    _wait_reset(s, s.client)
    s.client.poll()
    s.client.send(b"no?", MSG_NOSIGNAL)
    s.client.recv(10)
    s.client.error()


@probe()
def peer_closes_while_sending(s: Scene) -> None:
    """A sender whose peer closes gets EPIPE or ECONNRESET in the end and no other error."""
    closer = threading.Thread(target=lambda: (time.sleep(0.01), s.server.sock.close()))
    s.moment()
    closer.start()
    outcome, end = "", time.monotonic() + 8
    while not outcome and time.monotonic() < end:
        try:
            s.client.sock.send(b"x" * 100, MSG_NOSIGNAL)
        except BlockingIOError:
            time.sleep(0.001)
        except OSError as error:
            outcome = type(error).__name__
    closer.join()
    s.note(f"ended: {outcome in ('BrokenPipeError', 'ConnectionResetError')}")


@probe()
def linger_zero(s: Scene) -> None:
    """SO_LINGER 0: close(2) is a RST whatever waits to be sent."""
    s.client.set("LINGER 0", socket.SOL_SOCKET, LINGER, struct.pack("ii", 1, 0))
    s.client.send(b"thrown after you")
    s.settle()
    s.client.close()
    _wait_closing(s, s.server)
    s.server.poll()
    s.server.recv(100)
    s.server.recv(100)
    s.server.recv(100)


@probe()
def linger_some_time(s: Scene) -> None:
    """SO_LINGER of some seconds: close(2) of a non-blocking socket returns, and everything arrives."""
    s.client.set("LINGER 2", socket.SOL_SOCKET, LINGER, struct.pack("ii", 1, 2))
    s.client.send(pattern(20_000))
    with Stopwatch() as watch:
        s.client.close()
    s.note(f"close took less than half a second: {watch.seconds < 0.5}")
    s.server.take(20_001)


@probe()
def linger_zero_with_bytes_to_read(s: Scene) -> None:
    """SO_LINGER 0 with bytes to read on both sides."""
    s.client.send(b"a")
    s.server.send(b"b")
    s.settle()
    s.client.reset()
    s.server.recv(10)
    s.server.recv(10)
    s.server.recv(10)


@probe()
def time_wait_is_left_alone(s: Scene) -> None:
    """After an orderly end on both sides both sockets are in their last states."""
    s.client.send(b"bye")
    s.client.shutdown(SHUT_WR)
    s.server.rest()
    s.server.send(b"bye")
    s.server.shutdown(SHUT_WR)
    s.client.rest()
    s.until("closed", lambda: s.server.state() == _CLOSED)
    s.note("server closed")
    s.client.poll()
    s.server.poll()
    s.server.recv(1)
    s.client.recv(1)


@probe()
def disconnected_and_connected_again(s: Scene) -> None:
    """connect(AF_UNSPEC) throws away what was unread; the next connection begins with nothing."""
    s.server.send(b"of the old connection")
    s.settle()
    s.client.call("disconnect", _disconnect, s.client.sock)
    s.client.recv(10)
    s.client.poll()
    s.client.fionread()
    door = s.keep(socket.socket())
    door.bind(("127.0.0.1", 0))
    door.listen(1)
    s.client.sock.settimeout(5)
    s.client.call("connect", s.client.sock.connect, door.getsockname())
    s.client.sock.setblocking(False)
    second = s.keep(door.accept()[0])
    second.setblocking(False)
    s.client.recv(64)
    s.client.fionread()
    second.send(b"new")
    s.client.take(3)
    s.client.send(b"answer")
    s.call("second recv", lambda: (select.select([second], [], [], 3), second.recv(64))[1])
    second.send(b"x" * 100)
    s.client.take(100)
    s.server.recv(10)


@probe()
def disconnected_with_redirected_bytes_of_its_own(s: Scene) -> None:
    """connect(AF_UNSPEC) by the sender: its peer gets what was sent, then a RST."""
    s.client.send(b"last")
    s.settle()
    s.client.call("disconnect", _disconnect, s.client.sock)
    s.until("the RST", lambda: s.server.state() == _CLOSED)
    s.server.recv(10)
    s.server.recv(10)
    s.server.recv(10)


def _disconnect(sock: socket.socket) -> None:
    nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), nowhere, len(nowhere)) < 0:
        raise OSError(ctypes.get_errno(), "connect")


@probe()
def disconnected_and_listening(s: Scene) -> None:
    """A socket that is disconnected and then listens accepts connections; nothing of the old one is left."""
    s.server.send(b"of the old connection")
    s.settle()
    s.client.call("disconnect", _disconnect, s.client.sock)
    s.client.sock.bind(("127.0.0.1", 0))
    s.client.call("listen", s.client.sock.listen, 4)
    guest = s.keep(socket.create_connection(s.client.sock.getsockname(), 5))
    s.client.sock.settimeout(5)
    accepted = s.keep(s.client.sock.accept()[0])
    guest.sendall(b"hello")
    s.call("accepted recv", accepted.recv, 64)
    accepted.sendall(b"welcome")
    s.call("guest recv", guest.recv, 64)


@probe()
def duplicate_and_close(s: Scene) -> None:
    """Closing one of two descriptors ends nothing; closing the other does."""
    twin = s.keep(socket.socket(fileno=os.dup(s.client.fd)))
    s.client.sock.close()
    s.note("client close")
    s.call("twin send", twin.send, b"by the twin")
    s.server.take(11)
    s.server.send(b"answer")
    s.call("twin recv", lambda: (select.select([twin], [], [], 3), twin.recv(64))[1])
    s.server.poll()
    twin.close()
    _wait_closing(s, s.server)
    s.server.rest()


@probe()
def duplicate_over_the_socket(s: Scene) -> None:
    """dup2(2) over the last descriptor closes the connection."""
    nothing = os.open(os.devnull, os.O_RDWR)
    s.client.send(b"before")
    s.moment()
    os.dup2(nothing, s.client.fd)
    os.close(nothing)
    s.until("the end", lambda: s.server.state() == _CLOSE_WAIT)
    s.server.take(7)


@probe(cuts=1, drains=1, storms=0)
def keep_alive(s: Scene) -> None:
    """Keep-alive with short times on a connection that is used, and on one that is idle: it lives."""
    for end in (s.client, s.server):
        end.set("KEEPALIVE", socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.set("KEEPIDLE", socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        end.set("KEEPINTVL", socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        end.set("KEEPCNT", socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
    for _ in range(2):
        s.client.send(b"ping")
        s.server.take(4)
        time.sleep(0.7)
    s.client.error()
    s.server.error()
    s.client.send(b"ping")
    s.server.take(4)


@probe(cuts=1, drains=1)
def user_timeout(s: Scene) -> None:
    """TCP_USER_TIMEOUT: a reader that is slow and alive does not end the connection."""
    s.client.set("USER_TIMEOUT", socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 300)
    s.client.send(pattern(1000))
    time.sleep(0.5)
    s.client.error()
    s.client.send(pattern(1000))
    s.server.take(2000)
    s.client.error()
    s.client.get("USER_TIMEOUT", socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


@probe()
def signal_during_close(s: Scene) -> None:
    """A signal that arrives while an end closes changes nothing."""
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    s.client.send(b"words")
    os.kill(os.getpid(), signal.SIGUSR1)
    s.client.close()
    _wait_closing(s, s.server)
    s.server.rest()


@probe()
def peeks_and_closes(s: Scene) -> None:
    """A peeked message was not read: closing then is a RST."""
    s.client.send(b"0123456789")
    s.settle()
    s.server.recv(10, socket.MSG_PEEK)
    s.server.close()
    _wait_closing(s, s.client)
    s.client.recv(10)
