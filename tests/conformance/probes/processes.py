# SPDX-License-Identifier: Apache-2.0
"""Probes with more than one process: descriptors that move, processes that end, signals that interrupt."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from conformance.probes import probe
from conformance.scene import End, Scene, pattern


class Child:
    """A fork that carries out `work` and ends; whatever goes wrong in it is its exit code 1."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def _echo(sock: socket.socket, count: int) -> None:
    """Read `count` bytes and send them back in capitals."""
    got = b""
    while len(got) < count:
        select.select([sock], [], [], 5)
        got += sock.recv(count - len(got))
    sock.sendall(got.upper())


@probe()
def passed_to_another_process(s: Scene) -> None:
    """A descriptor sent by SCM_RIGHTS: the other process reads what waits and answers."""
    here, there = socket.socketpair()

    def work() -> None:
        here.close()
        _, descriptors, _, _ = socket.recv_fds(there, 16, 1)
        _echo(socket.socket(fileno=descriptors[0]), 10)

    child = Child(work)
    there.close()
    s.client.send(b"waits ")
    socket.send_fds(here, [b"take it"], [s.server.fd])
    s.moment()
    s.server.sock.close()
    s.client.send(b"more")
    s.client.take(10)
    s.note(f"child ended with {child.wait()}")
    s.until("the end", lambda: s.client.state() not in (1, 4, 5))
    s.client.rest()
    here.close()


@probe()
def passed_in_flight(s: Scene) -> None:
    """A descriptor that is nowhere but in a socket's queue: the connection lives, and what comes waits."""
    here, there = socket.socketpair()
    socket.send_fds(here, [b"take it"], [s.server.fd])
    s.moment()
    s.server.sock.close()
    s.client.send(b"while it travels")
    s.client.poll()
    time.sleep(0.02)
    _, descriptors, _, _ = socket.recv_fds(there, 16, 1)
    back = s.server.sock = socket.socket(fileno=descriptors[0])
    back.setblocking(False)
    s.settle()
    s.server.rest()
    s.server.send(b"arrived")
    s.settle()
    s.client.rest()
    here.close()
    there.close()


@probe()
def fork_and_read_in_the_child(s: Scene) -> None:
    """A forked server: the child reads and answers, the parent closes its descriptor."""
    child = Child(lambda: _echo(s.server.sock, 12))
    s.server.close()
    s.client.send(b"to the child")
    s.client.take(12)
    s.note(f"child ended with {child.wait()}")
    s.until("the end", lambda: s.client.state() not in (1, 4, 5))
    s.client.rest()


@probe()
def fork_and_both_read(s: Scene) -> None:
    """Parent and child read from the same socket in turns: each byte once, in order."""
    turn_out, turn_in = os.pipe()
    told_out, told_in = os.pipe()

    def work() -> None:
        for _ in range(6):
            os.read(turn_out, 1)
            select.select([s.server.sock], [], [], 5)
            os.write(told_in, s.server.sock.recv(3))

    child = Child(work)
    got = b""
    for number in range(6):
        s.client.send(b"%03d" % number)
        s.client.send(b"%03d" % (number + 500))
        s.settle()
        with s.quiet():
            got += s.server.recv(3)
        os.write(turn_in, b"x")
        got += os.read(told_out, 10)
    s.note(f"{got!r}, child ended with {child.wait()}")
    s.server.recv(1)
    for each in (turn_out, turn_in, told_out, told_in):
        os.close(each)


@probe()
def fork_and_both_write(s: Scene) -> None:
    """Parent and child send on the same socket: no small message is torn, none is lost."""

    def write(letter: bytes) -> None:
        for _ in range(100):
            while True:
                try:
                    s.client.sock.send(letter * 20)
                    break
                except BlockingIOError:
                    time.sleep(0.001)

    s.moment()
    child = Child(lambda: write(b"c"))
    write(b"p")
    with s.quiet():
        data = s.server.take(4000)
    s.moment()
    whole = all(len(set(data[at : at + 20])) == 1 for at in range(0, len(data), 20))
    s.note(f"whole: {whole}, {data.count(b'c')} {data.count(b'p')}, child ended with {child.wait()}")
    s.settle()
    s.server.rest()


@probe()
def fork_and_one_uses_each_end(s: Scene) -> None:
    """The client lives on in the parent, the server in the child."""

    def work() -> None:
        s.client.sock.close()
        for _ in range(20):
            _echo(s.server.sock, 10)

    child = Child(work)
    s.server.sock.close()
    for number in range(20):
        with s.quiet():
            s.client.send(b"question%02d" % number)
            answer = s.client.take(10)
        s.note(f"{answer!r}")
    s.note(f"child ended with {child.wait()}")


@probe()
def child_exits_parent_goes_on(s: Scene) -> None:
    """A child that inherited both ends ends: nothing happens to the connection."""
    s.client.send(b"waits")
    s.settle()
    s.note(f"child ended with {Child(lambda: None).wait()}")
    s.server.rest()
    s.client.send(b"goes on")
    s.settle()
    s.server.rest()
    s.client.poll()


@probe()
def exec_closes(s: Scene) -> None:
    """A descriptor with close-on-exec is closed by execve(2): the peer gets everything and the end."""
    out, into = os.pipe()

    def work() -> None:
        s.server.sock.close()
        s.client.sock.send(b"before exec")
        os.set_inheritable(out, True)
        os.execv("/bin/sh", ["sh", "-c", f"read line <&{out}"])

    child = Child(work)
    s.client.close()
    s.until("the end", lambda: s.server.state() not in (1, 4, 5))
    s.server.rest()
    os.write(into, b"\n")
    s.note(f"child ended with {child.wait()}")
    os.close(out)
    os.close(into)


@probe()
def sender_killed(s: Scene) -> None:
    """SIGKILL to a sender: its peer gets all that was sent, then the end."""
    out, into = os.pipe()

    def work() -> None:
        s.server.sock.close()
        for number in range(30):
            s.client.sock.send(pattern(100, number))
        os.write(into, b"x")
        time.sleep(10)

    child = Child(work)
    s.client.close()
    os.read(out, 1)
    s.moment()
    s.note(f"child ended with {child.kill()}")
    s.server.take(3001)
    os.close(out)
    os.close(into)


@probe()
def reader_killed(s: Scene) -> None:
    """SIGKILL to a reader that has read everything: the other end gets the end, then EPIPE."""
    out, into = os.pipe()

    def work() -> None:
        s.client.sock.close()
        _echo(s.server.sock, 5)
        os.write(into, b"x")
        time.sleep(10)

    child = Child(work)
    s.server.close()
    s.client.send(b"hello")
    s.client.take(5)
    os.read(out, 1)
    s.moment()
    s.note(f"child ended with {child.kill()}")
    s.until("the end", lambda: s.client.state() not in (1, 4, 5))
    s.client.rest()
    s.client.send(b"anyone?", socket.MSG_NOSIGNAL)
    s.until("the RST", lambda: s.client.state() == 7)
    s.client.send(b"no?", socket.MSG_NOSIGNAL)
    os.close(out)
    os.close(into)


@probe()
def reader_killed_with_unread_bytes(s: Scene) -> None:
    """SIGKILL to a reader with bytes unread: a RST."""
    out, into = os.pipe()

    def work() -> None:
        s.client.sock.close()
        os.write(into, b"x")
        time.sleep(10)

    child = Child(work)
    os.read(out, 1)
    s.server.close()
    s.client.send(b"never read")
    s.until("it has arrived", lambda: True)
    time.sleep(0.02)
    s.note(f"child ended with {child.kill()}")
    s.until("the end", lambda: s.client.state() not in (1, 4, 5))
    s.client.recv(10)
    os.close(out)
    os.close(into)


@probe()
def stopped_reader(s: Scene) -> None:
    """A reader that is stopped (SIGSTOP) and goes on: everything is there."""

    def work() -> None:
        s.client.sock.close()
        _echo(s.server.sock, 3000)

    child = Child(work)
    s.server.close()
    os.kill(child.pid, signal.SIGSTOP)
    for number in range(3):
        s.client.send(pattern(1000, number).lower())
    time.sleep(0.05)
    s.client.recv(10)
    os.kill(child.pid, signal.SIGCONT)
    s.client.take(3000)
    s.note(f"child ended with {child.wait()}")


@probe()
def signal_during_poll(s: Scene) -> None:
    """A signal interrupts epoll_wait with EINTR; the next one reports what came."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    epoll = s.keep(select.epoll())
    epoll.register(s.server.sock, select.EPOLLIN)
    events = ctypes.create_string_buffer(12)
    # Again and again: the first may come before it waits.
    signal.setitimer(signal.ITIMER_REAL, 0.03, 0.03)
    got = libc.epoll_wait(epoll.fileno(), events, 1, 2000)
    signal.setitimer(signal.ITIMER_REAL, 0)
    s.note(f"epoll_wait = {got} {ctypes.get_errno() if got < 0 else ''}")
    s.client.send(b"x")
    s.settle()
    s.call("epoll_wait", lambda: len(epoll.poll(2)))
    s.server.rest()


@probe()
def signals_during_a_transfer(s: Scene) -> None:
    """A hail of signals while bytes flow: none is lost."""
    count = [0]

    def note(number: int, frame: object) -> None:
        count[0] += 1

    signal.signal(signal.SIGALRM, note)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    right = True
    number = 0
    while number < 40 or (count[0] <= 3 and number < 4000):
        data, number = pattern(20_000, number), number + 1
        with s.quiet():
            s.client.push(data, 3000)
            right = right and s.server.take(20_000) == data
    signal.setitimer(signal.ITIMER_REAL, 0)
    s.note(f"right: {right}, signals came: {count[0] > 3}")


@probe()
def thread_ends_while_the_socket_is_in_use(s: Scene) -> None:
    """The thread that used the socket so far ends; another goes on."""
    for number in range(4):
        thread = threading.Thread(target=lambda n=number: s.client.send(b"thread %d" % n))
        thread.start()
        thread.join()
        s.settle()
        s.server.rest()


@probe(redirects=False)
def closed_by_another_thread(s: Scene) -> None:
    """shutdown(2) by another thread wakes a reader that waits in poll(2)."""
    seen: list[int] = []
    ends: list[End] = [s.server]

    def wait() -> None:
        poller = select.poll()
        poller.register(ends[0].sock, select.POLLIN)
        seen.extend(mask for _, mask in poller.poll(3000))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    s.server.shutdown(socket.SHUT_RDWR)
    thread.join(4)
    s.note(f"woken: {bool(seen)}")
    s.server.recv(1)
    s.client.rest()
