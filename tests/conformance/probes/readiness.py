# SPDX-License-Identifier: Apache-2.0
"""Probes of readiness: what poll, select and epoll say, when, and how often."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from select import EPOLLET, EPOLLIN, EPOLLONESHOT, EPOLLOUT, EPOLLPRI, EPOLLRDHUP

from conformance.probes import probe
from conformance.scene import End, Scene, names, pattern

EPOLLEXCLUSIVE = 1 << 28
QUIET = 0.03  # seconds in which nothing must happen
SOON = 3.0  # seconds in which something must


class Watch:
    """An epoll set with one end in it."""

    def __init__(self, s: Scene, end: End, mask: int) -> None:
        self.scene = s
        self.name = end.name
        self.epoll = s.keep(select.epoll())
        self.epoll.register(end.sock, mask)

    def wait(self, timeout: float = SOON) -> str:
        """epoll_wait(2); what it says goes into the transcript."""
        return str(
            self.scene.call(
                f"{self.name} epoll_wait",
                lambda: names(sum(mask for _, mask in self.epoll.poll(timeout))),
            )
        )

    def nothing(self) -> str:
        return self.wait(QUIET)


@probe()
def poll_call(s: Scene) -> None:
    """poll(2): readable while bytes wait and only then, writable all along."""
    s.server.poll()
    s.client.send(b"ab")
    s.settle()
    s.server.poll()
    s.server.recv(1)
    s.server.poll()
    s.server.recv(1)
    s.server.poll()


@probe()
def select_call(s: Scene) -> None:
    """select(2) says the same."""
    s.server.select()
    s.client.send(b"ab")
    s.settle()
    s.server.select()
    s.server.recv(2)
    s.server.select()
    s.client.shutdown(socket.SHUT_WR)
    s.server.select()


@probe()
def epoll_level(s: Scene) -> None:
    """Level-triggered epoll reports what waits until it was read."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLRDHUP)
    watch.nothing()
    s.client.send(b"abc")
    s.settle()
    for _ in range(3):
        watch.wait()
        watch.wait()
        s.server.recv(1)
    watch.nothing()
    s.client.send(b"d")
    s.settle()
    watch.wait()
    s.server.recv(10)
    s.client.shutdown(socket.SHUT_WR)
    watch.wait()
    watch.wait()
    s.server.recv(10)


@probe()
def epoll_edge(s: Scene) -> None:
    """EPOLLET: one report for each arrival, none without, whatever was read."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLRDHUP | EPOLLET)
    watch.nothing()
    s.client.send(b"a")
    s.settle()
    watch.wait()
    watch.nothing()
    s.client.send(b"b")
    s.settle()
    watch.wait()
    s.server.rest()
    watch.nothing()
    s.client.send(b"c")
    s.settle()
    watch.wait()
    s.server.rest()
    s.client.shutdown(socket.SHUT_WR)
    watch.wait()
    watch.nothing()
    s.server.recv(1)


@probe()
def epoll_edge_short_reads(s: Scene) -> None:
    """An edge-triggered reader that stops at a short read, as epoll(7) allows, gets everything."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLET)
    total = b""
    for number in range(8):
        s.client.send(pattern(500, number))
        s.client.send(pattern(300, number + 50))
        s.settle()
        expected = len(total) + 800
        with s.quiet():
            while len(total) < expected:
                if watch.wait() == "-":
                    break
                while True:
                    got = s.server.recv(4096)
                    if isinstance(got, str):
                        break
                    total += got
                    if len(got) < 4096:
                        break
        s.note(f"server has {len(total)} bytes")


@probe()
def epoll_edge_every_message(s: Scene) -> None:
    """Each of many messages wakes an edge-triggered reader that reads to EAGAIN."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLET)
    with s.quiet():
        for number in range(40):
            s.client.send(b"x" * (number + 1))
            got = 0
            while got <= number and watch.wait() != "-":
                while isinstance(data := s.server.recv(4096), bytes):
                    got += len(data)
            if got <= number:
                break
    s.note(f"{number + 1} messages")


@probe()
def epoll_oneshot(s: Scene) -> None:
    """EPOLLONESHOT: one report until it is armed again; armed with bytes there, at once."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLONESHOT)
    s.client.send(b"a")
    s.settle()
    watch.wait()
    watch.nothing()
    s.client.send(b"b")
    s.settle()
    watch.nothing()
    s.call("arm", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLONESHOT)
    watch.wait()
    s.server.rest()
    s.call("arm", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLONESHOT)
    watch.nothing()
    s.client.send(b"c")
    s.settle()
    watch.wait()
    s.server.rest()


@probe()
def epoll_oneshot_edge(s: Scene) -> None:
    """EPOLLONESHOT with EPOLLET, as Go and Tokio use: arming with bytes there reports them."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLONESHOT | EPOLLET)
    for word in (b"a", b"b", b"c"):
        s.client.send(word)
        s.settle()
        watch.wait()
        watch.nothing()
        s.server.rest()
        s.call("arm", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLONESHOT | EPOLLET)
    watch.nothing()
    s.client.send(b"d")
    s.settle()
    watch.wait()
    s.call("arm", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLONESHOT | EPOLLET)
    watch.wait()
    s.server.rest()


@probe()
def epoll_exclusive(s: Scene) -> None:
    """EPOLLEXCLUSIVE in two sets: at least one of them is told."""
    watches = [Watch(s, s.server, EPOLLIN | EPOLLEXCLUSIVE) for _ in range(2)]
    for word in (b"a", b"b"):
        s.client.send(word)
        s.settle()
        with s.quiet():
            told = [each.wait(0.2) for each in watches]
        s.note(f"somebody was told: {'IN' in told}")
        s.server.rest()
    with s.quiet():
        told = [each.nothing() for each in watches]
    s.note(f"told: {told}")


@probe(cuts=3)
def epoll_exclusive_asleep(s: Scene) -> None:
    """Two threads asleep in epoll_wait on EPOLLEXCLUSIVE sets: each message wakes somebody who reads it."""
    got: list[bytes] = []

    def serve() -> None:
        epoll = select.epoll()
        epoll.register(s.server.sock, EPOLLIN | EPOLLEXCLUSIVE)
        while b"!" not in b"".join(got):
            if epoll.poll(0.05):
                try:
                    got.append(s.server.sock.recv(100))
                except BlockingIOError:
                    continue
        epoll.close()

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for each in threads:
        each.start()
    for word in (b"one ", b"two ", b"!"):
        time.sleep(0.01)
        s.client.send(word)
        size = sum(map(len, (b"one ", b"two ", b"!"))) if word == b"!" else 0
        s.until("it was read", lambda w=word: w in b"".join(got))
    for each in threads:
        each.join(5)
    s.note(f"{b''.join(got)!r}, {size} bytes, threads ended: {not any(t.is_alive() for t in threads)}")


@probe()
def epoll_asleep(s: Scene) -> None:
    """A thread asleep in epoll_wait is woken by a message, and not before."""
    _asleep(s, EPOLLIN)


@probe()
def epoll_edge_asleep(s: Scene) -> None:
    """The same, edge-triggered."""
    _asleep(s, EPOLLIN | EPOLLET)


def _asleep(s: Scene, mask: int) -> None:
    epoll = s.keep(select.epoll())
    epoll.register(s.server.sock, mask)
    for number in range(4):
        seen: list[str] = []

        def sleep(seen: list[str] = seen) -> None:
            seen.append(names(sum(found for _, found in epoll.poll(5.0))))

        thread = threading.Thread(target=sleep)
        thread.start()
        time.sleep(0.01)
        early = bool(seen)
        s.client.send(b"wake %d" % number)
        thread.join(6)
        s.note(f"woken by {seen}, early: {early}")
        s.server.rest()


@probe()
def poll_asleep(s: Scene) -> None:
    """A thread asleep in poll(2) is woken by a message and by the end of the stream."""
    for last in (False, True):
        seen: list[str] = []
        mask = select.POLLIN | select.POLLRDHUP

        def sleep(seen: list[str] = seen, mask: int = mask) -> None:
            poller = select.poll()
            poller.register(s.server.sock, mask)
            seen.append(names(sum(found for _, found in poller.poll(5000))))

        thread = threading.Thread(target=sleep)
        thread.start()
        time.sleep(0.01)
        if last:
            s.client.shutdown(socket.SHUT_WR)
        else:
            s.client.send(b"x")
        thread.join(6)
        s.note(f"woken by {seen}")
        s.server.rest()


@probe()
def epoll_added_late(s: Scene) -> None:
    """A set that is made when bytes wait already reports them, edge-triggered too."""
    s.client.send(b"here before")
    s.settle()
    Watch(s, s.server, EPOLLIN | EPOLLET).wait()
    Watch(s, s.server, EPOLLIN).wait()
    s.server.rest()
    Watch(s, s.server, EPOLLIN | EPOLLET).nothing()


@probe()
def epoll_modified(s: Scene) -> None:
    """EPOLL_CTL_MOD with bytes waiting reports them again, edge-triggered too."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLET)
    s.client.send(b"ab")
    s.settle()
    watch.wait()
    s.server.recv(1)
    s.call("modify", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLET)
    watch.wait()
    s.server.rest()
    s.call("modify", watch.epoll.modify, s.server.sock, EPOLLIN | EPOLLET)
    watch.nothing()


@probe()
def epoll_both_ways(s: Scene) -> None:
    """EPOLLIN and EPOLLOUT in one edge-triggered set, as event loops register once for all."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
    watch.wait()
    watch.nothing()
    s.client.send(b"question")
    s.settle()
    watch.wait()
    s.server.rest()
    s.server.send(b"answer")
    s.settle()
    s.client.rest()
    with s.quiet():
        watch.wait(0.0)  # the ACK of the answer may be an edge of its own
    s.client.send(b"again")
    s.settle()
    watch.wait()
    s.server.rest()


@probe()
def nested_epoll(s: Scene) -> None:
    """An epoll set inside another passes the news on."""
    inner = Watch(s, s.server, EPOLLIN)
    outer = s.keep(select.epoll())
    outer.register(inner.epoll, EPOLLIN)
    s.call("outer", lambda: len(outer.poll(QUIET)))
    s.client.send(b"x")
    s.settle()
    s.call("outer", lambda: len(outer.poll(SOON)))
    inner.wait()
    s.server.rest()
    s.call("outer", lambda: len(outer.poll(QUIET)))


@probe()
def epoll_of_a_duplicate(s: Scene) -> None:
    """A duplicate of the descriptor in the set reports as the original would, and goes on after that is
    closed."""
    twin = s.keep(socket.socket(fileno=os.dup(s.server.fd)))
    watch = Watch(s, End("twin", twin), EPOLLIN)
    s.client.send(b"ab")
    s.settle()
    watch.wait()
    s.call("twin recv", twin.recv, 1)
    watch.wait()
    s.server.rest()
    watch.nothing()


@probe(redirects=False)
def priority_events(s: Scene) -> None:
    """EPOLLPRI is not reported without urgent data."""
    watch = Watch(s, s.server, EPOLLPRI)
    s.client.send(b"ordinary")
    s.settle()
    watch.nothing()
    s.server.rest()


@probe(cuts=3)
def writable_again(s: Scene) -> None:
    """A sender that was told EAGAIN is writable again when the reader has read, level- and edge-triggered."""
    level, edge = Watch(s, s.client, EPOLLOUT), Watch(s, s.client, EPOLLOUT | EPOLLET)
    level.wait()
    edge.wait()
    total = s.client.fill(30_000)
    with s.quiet():
        edge.wait(0.0)
    total += s.client.fill(30_000)
    level.nothing()
    with s.quiet():
        got = len(s.server.take(total))
    s.note(f"all of it: {got == total}")
    level.wait()
    edge.wait()
    s.client.send(b"more")
    s.settle()
    s.server.rest()


@probe()
def rdhup(s: Scene) -> None:
    """EPOLLRDHUP when the other side has shut down writing, with and without bytes that still wait."""
    watch = Watch(s, s.server, EPOLLRDHUP)
    s.client.send(b"last words")
    s.settle()
    watch.nothing()
    s.client.shutdown(socket.SHUT_WR)
    watch.wait()
    s.server.poll()
    s.server.rest()
    watch.wait()
    s.server.poll()
    s.server.shutdown(socket.SHUT_WR)
    s.server.poll()
    s.client.poll()


@probe()
def hangup(s: Scene) -> None:
    """EPOLLHUP and EPOLLERR after a reset, and SO_ERROR that goes with them."""
    watch = Watch(s, s.server, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)
    watch.wait()
    s.client.reset()
    watch.wait()
    watch.nothing()
    s.server.poll()
    s.server.error()
    s.server.poll()
    s.server.recv(1)
    s.server.send(b"x", socket.MSG_NOSIGNAL)


@probe()
def sigio(s: Scene) -> None:
    """O_ASYNC: SIGIO comes for what arrives."""
    import fcntl
    import signal

    seen: list[int] = []
    signal.signal(signal.SIGIO, lambda number, frame: seen.append(number))
    fcntl.fcntl(s.server.fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(s.server.fd, fcntl.F_GETFL)
    fcntl.fcntl(s.server.fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    for word in (b"a", b"b"):
        seen.clear()
        s.client.send(word)
        s.settle()
        s.until("SIGIO", lambda: seen, 8.0)
        s.note("SIGIO came")
        s.server.rest()
    fcntl.fcntl(s.server.fd, fcntl.F_SETFL, flags)
