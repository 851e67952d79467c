# SPDX-License-Identifier: Apache-2.0
"""Probes of beginnings: what is sent before the other end is there is read first. They make connections of
their own, to a service whose policy is `eager`: nothing can be spliced earlier than these."""

from __future__ import annotations

import select
import socket
import time

from conformance.probes import probe
from conformance.scene import End, Scene, pattern

EAGER = 7101  # support/host.py
TCP_FASTOPEN = 23


def _listen(s: Scene, *options: tuple[int, int, int]) -> socket.socket:
    door = s.keep(socket.socket())
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for each in options:
        door.setsockopt(*each)
    door.bind(("127.0.0.1", EAGER))
    door.listen(8)
    return door


def _dial(s: Scene, door: socket.socket) -> End:
    """The client's end of a connection that nobody has accepted yet."""
    sock = s.keep(socket.socket())
    sock.settimeout(5)
    sock.connect(door.getsockname())
    sock.setblocking(False)
    return _end(s, "dialler", sock)


def _accept(s: Scene, door: socket.socket) -> End:
    door.settimeout(5)
    sock = s.keep(door.accept()[0])
    sock.setblocking(False)
    return _end(s, "acceptor", sock)


def _end(s: Scene, name: str, sock: socket.socket) -> End:
    end = End(name, sock)
    end.scene = s
    return end


def _chat(s: Scene, one: End, other: End) -> None:
    """Long enough to become hot by any policy."""
    right = True
    with s.quiet():
        for number in range(30):
            for sender, reader in ((one, other), (other, one)):
                sender.push(pattern(100, number))
                right = right and reader.take(100) == pattern(100, number)
    s.note(f"thirty rounds: {right}")


@probe(redirects=False)
def sent_before_accept(s: Scene) -> None:
    """What waits in the receive queue before accept(2) comes before what is sent afterwards."""
    door = _listen(s)
    client = _dial(s, door)
    for word in (b"one ", b"two "):
        client.send(word)
    server = _accept(s, door)
    client.send(b"three")
    server.take(13)
    server.send(b"answer")
    client.take(6)
    _chat(s, client, server)


@probe(redirects=False)
def defer_accept(s: Scene) -> None:
    """TCP_DEFER_ACCEPT: what the client sent before the server's end existed is read first."""
    door = _listen(s, (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5))
    client = _dial(s, door)
    client.send(b"1111")
    time.sleep(0.02)
    client.send(b"2222")
    server = _accept(s, door)
    client.send(b"3333")
    server.take(12)
    _chat(s, client, server)


@probe(redirects=False)
def server_speaks_first(s: Scene) -> None:
    """A greeting that is read late is in its place."""
    door = _listen(s)
    client = _dial(s, door)
    server = _accept(s, door)
    server.send(b"220 ready ")
    time.sleep(0.02)
    server.send(b"still here ")
    client.send(b"hello")
    server.take(5)
    server.send(b"250 ok")
    client.take(27)
    _chat(s, server, client)


@probe(redirects=False)
def closed_before_accept(s: Scene) -> None:
    """A client that says something and leaves before it is accepted: the server reads it, then the end."""
    door = _listen(s)
    client = _dial(s, door)
    client.send(b"in passing")
    client.sock.close()
    s.note("dialler close")
    server = _accept(s, door)
    server.take(11)


@probe(redirects=False)
def reset_before_accept(s: Scene) -> None:
    """A client that resets before it is accepted."""
    door = _listen(s)
    client = _dial(s, door)
    client.send(b"in passing")
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.sock.close()
    server = _accept(s, door)
    s.until("the RST", lambda: server.state() == 7)
    server.recv(100)
    server.recv(100)
    server.poll()


@probe(redirects=False)
def non_blocking_connect(s: Scene) -> None:
    """connect(2) without waiting: EINPROGRESS, writable when it is done, SO_ERROR 0, and bytes flow."""
    door = _listen(s)
    client = _end(s, "dialler", s.keep(socket.socket()))
    client.sock.setblocking(False)
    client.call("connect", client.sock.connect, door.getsockname())
    client.wait(select.POLLOUT)
    client.error()
    client.poll()
    server = _accept(s, door)
    client.send(b"hello")
    server.take(5)
    _chat(s, client, server)


@probe(redirects=False)
def many_short_connections(s: Scene) -> None:
    """A connection for each request."""
    door = _listen(s)
    for number in range(20):
        client = _dial(s, door)
        server = _accept(s, door)
        with s.quiet():
            client.push(b"request %02d" % number)
            asked = server.take(10)
            server.push(pattern(5000, number))
            server.sock.shutdown(socket.SHUT_WR)
            got = client.take(5001) == pattern(5000, number)
        s.note(f"{asked!r}: {got}")
        client.sock.close()
        server.sock.close()
