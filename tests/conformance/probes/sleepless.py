# SPDX-License-Identifier: Apache-2.0
"""Probes on a server whose socket blocks and which waits in poll(2) before it reads, or reads with
MSG_DONTWAIT."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from support.connection import count_waiting

from conformance.probes import probe
from conformance.scene import Scene, error_name, pattern

SIZE = 64
EACH = 4  # messages each way in a round of heat
POLL = {"7", "271", "73"}  # poll(2) and ppoll(2), asm/unistd.h


def _is_in_poll(thread: threading.Thread) -> bool:
    """Asleep in it: of a thread that is on its CPU the kernel says "running"."""
    return Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0] in POLL


def _await(sock: socket.socket) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.poll()


def _take(sock: socket.socket, flags: int) -> None:
    got = 0
    while got < SIZE:
        _await(sock)
        got += len(sock.recv(SIZE - got, flags))


def _answer(server: socket.socket, flags: int) -> None:
    for _ in range(EACH):
        _take(server, flags)
        server.sendall(bytes(SIZE))


def _heat(client: socket.socket, server: socket.socket, flags: int = 0) -> None:
    """Some messages each way. The client reads when the server waits for the next one, so that it is seen."""
    answering = threading.Thread(target=_answer, args=(server, flags))
    answering.start()
    for number in range(EACH):
        client.sendall(bytes(SIZE))
        _await(client)
        deadline = time.monotonic() + 1
        while number < EACH - 1 and not _is_in_poll(answering) and time.monotonic() < deadline:
            time.sleep(0.0002)
        _take(client, 0)
    answering.join()


def _heat_without_waiting(client: socket.socket, server: socket.socket) -> None:
    _heat(client, server, socket.MSG_DONTWAIT)


POLLS = {"blocking": (False, True), "heat": _heat}
DONTWAIT = {"blocking": (False, True), "heat": _heat_without_waiting}
# It begins to sleep, and its process is remembered: it plays once.
SLEEPS = {**POLLS, "redirects": False, "cuts": 1, "drains": 1, "storms": 0}


def _read(s: Scene, count: int) -> Any:
    s.server.wait(select.POLLIN)
    return s.server.recv(count)


@probe(**POLLS)
def sleepless_messages(s: Scene) -> None:
    """Messages of several sizes both ways, each read after a poll(2)."""
    for number, size in enumerate((1, 100, 5000, 20_000)):
        s.client.push(pattern(size, number))
        s.settle()
        left = size
        with s.quiet():
            while left:
                left -= len(_read(s, left))
        s.note(f"{size} read")
        s.server.push(pattern(size, number + 1))
        s.client.take(size)
    s.server.poll()


@probe(**POLLS)
def sleepless_partial_reads(s: Scene) -> None:
    """A message read in parts: poll(2) goes on to say that there is something until there is nothing."""
    s.client.send(b"0123456789")
    s.settle()
    for count in (3, 3, 100):
        s.server.poll()
        _read(s, count)
    s.server.poll()


@probe(**POLLS)
def sleepless_half_close(s: Scene) -> None:
    """After the end of a request the answer is complete."""
    s.client.send(b"request")
    s.client.shutdown(socket.SHUT_WR)
    _read(s, 100)
    _read(s, 100)
    s.server.push(pattern(50_000, 1))
    s.client.take(50_000)
    s.server.shutdown(socket.SHUT_WR)
    s.client.rest()


@probe(**POLLS)
def sleepless_reset(s: Scene) -> None:
    """A RST is seen by poll(2), and the read after it says ECONNRESET once, then the end."""
    s.client.send(b"before")
    s.settle()
    _read(s, 100)
    s.client.reset()
    s.server.poll()
    s.server.recv(10)
    s.server.recv(10)


@probe(**POLLS)
def sleepless_interrupted(s: Scene) -> None:
    """A signal comes while it waits in poll(2); what is sent then is read as ever."""
    caught: list[int] = []
    signal.signal(signal.SIGALRM, lambda number, frame: caught.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    threading.Timer(0.08, lambda: s.client.sock.send(b"at last")).start()
    _read(s, 100)
    s.note(f"caught {len(caught)}")


@probe(**POLLS)
def sleepless_fionread(s: Scene) -> None:
    """It asks how much there is, and reads as much, until it has all."""
    for number in range(4):
        s.client.send(pattern(200, number))
        s.settle()
        s.moment()
        got, deadline = b"", time.monotonic() + 4
        while len(got) < 200 and time.monotonic() < deadline:
            s.server.wait(select.POLLIN)
            told = count_waiting(s.server.sock)
            got += s.server.sock.recv(told) if told else b""
        s.note(f"right: {got == pattern(200, number)}")


@probe(**POLLS, cuts=2)
def sleepless_sender(s: Scene) -> None:
    """A send(2) on its socket sleeps until its reader makes room; all of it is taken in one call."""
    data = pattern(24_000_000)
    sent: list[int] = []
    thread = threading.Thread(target=lambda: sent.append(s.server.sock.send(data)))
    thread.start()
    time.sleep(0.05)
    s.note(f"asleep: {not sent}")
    with s.quiet():
        right = s.client.take(len(data)) == data
    thread.join(5)
    s.note(f"right: {right}, sent {sent}")
    s.client.send(b"and on")
    _read(s, 100)


@probe(**DONTWAIT)
def sleepless_without_waiting(s: Scene) -> None:
    """MSG_DONTWAIT says EAGAIN where nothing is there, and gets what is."""
    s.server.recv(100, socket.MSG_DONTWAIT)
    for number in range(3):
        s.client.send(pattern(20, number))
        s.settle()
        s.server.recv(100, socket.MSG_DONTWAIT)
        s.server.recv(100, socket.MSG_DONTWAIT)
        s.server.send(pattern(30, number))
        s.client.take(30)


@probe(**DONTWAIT)
def sleepless_reset_without_waiting(s: Scene) -> None:
    """A RST is ECONNRESET once, then the end."""
    s.client.reset()
    s.server.recv(10, socket.MSG_DONTWAIT)
    s.server.recv(10, socket.MSG_DONTWAIT)


def _sleep(s: Scene) -> tuple[threading.Thread, list[Any]]:
    """A thread that sleeps in a read of the server's."""
    got: list[Any] = []

    def carry_out() -> None:
        try:
            got.append(s.server.sock.recv(100))
        except OSError as error:
            got.append(error_name(error))

    thread = threading.Thread(target=carry_out)
    thread.start()
    time.sleep(0.05)
    s.note(f"asleep: {not got}")
    return thread, got


@probe(**SLEEPS)
def sleepless_sleeps_at_last(s: Scene) -> None:
    """It sleeps in a read after all, and again: what is sent wakes it, and the end does."""
    for word in (b"one", b"two"):
        thread, got = _sleep(s)
        s.client.send(word)
        thread.join(3)
        s.note(f"got {got}")
    thread, got = _sleep(s)
    s.client.shutdown(socket.SHUT_WR)
    thread.join(3)
    s.note(f"got {got}")


@probe(**SLEEPS)
def sleepless_first_sleep_is_reset(s: Scene) -> None:
    """The first time that it sleeps in a read the other end resets: ECONNRESET."""
    thread, got = _sleep(s)
    s.client.reset()
    thread.join(3)
    s.note(f"got {got}")


@probe(**SLEEPS)
def sleepless_first_sleep_is_interrupted(s: Scene) -> None:
    """The first time that it sleeps in a read a signal comes: EINTR."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(100)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    got = libc.recv(s.server.fd, buffer, 100, 0)
    s.note(f"recv = {got}, {os.strerror(ctypes.get_errno())}")
