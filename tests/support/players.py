# SPDX-License-Identifier: Apache-2.0
"""The test's side of the peers: a handle on each process, and the two ends of a connection."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.cgroup import Cgroup
from support.daemon import wait_until
from support.pauses import SLOWNESS

PROGRAM = Path(__file__).with_name("peer.py")
# The same with operations of their own.
HABITS, JUGGLER, QUIRKS = (PROGRAM.with_name(f"{name}.py") for name in ("habits", "juggler", "quirks"))
POSITIONAL = {
    "send": ("count",),
    "recv": ("count",),
    "say": ("text",),
    "hear": ("count",),
    "setsockopt": ("level", "option", "value"),
}
ANSWER_GRACE = 10.0 * SLOWNESS  # seconds beyond an operation's own timeout before its process counts as hung


# recvfrom, poll, ppoll, select, pselect6, epoll_wait and epoll_pwait; of x86-64 and of others (asm/unistd.h).
_WAITING = frozenset(["45", "7", "271", "23", "270", "232", "281", "207", "73", "72", "22"])


class PeerError(Exception):
    """An operation of a peer failed; `name` is the errno's name, or TIMEOUT."""

    def __init__(self, operation: str, answer: dict[str, Any]) -> None:
        super().__init__(f"{operation}: {answer['error']} ({answer['message']}), had {answer['value']!r}")
        self.name = str(answer["error"])
        self.value = answer["value"]


class PeerHung(Exception):
    """A peer has not answered in time: it is stuck in a system call."""


class Peer:
    """A running peer process; the operations of support/peer.py can be called, begun or attempted by name."""

    def __init__(self, namespace: str | None, cgroup: Cgroup | None, program: Path = PROGRAM) -> None:
        command = [sys.executable, "-I", "-S", str(program)]
        if namespace is not None:
            command = ["nsenter", f"--net=/run/netns/{namespace}", *command]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid
        self._unread = b""
        self._pending: str | None = "start"
        self._timeout = 10.0 * SLOWNESS
        try:
            self.finish()
            if cgroup is not None:
                cgroup.add(self.pid)
        except BaseException:
            self.stop()
            raise

    def call(self, operation: str, **arguments: Any) -> Any:
        """Carry out an operation and wait for its value. Raises PeerError, PeerHung."""
        __tracebackhide__ = True
        self.begin(operation, **arguments)
        return self.finish()

    def attempt(self, operation: str, **arguments: Any) -> Any:
        """As `call`, but the name of an error is a value too."""
        try:
            return self.call(operation, **arguments)
        except PeerError as error:
            return error.name

    def begin(self, operation: str, **arguments: Any) -> None:
        """Start an operation; `finish` gets its value. One at a time."""
        assert self._pending is None, f"{self._pending} is still going on"
        self._pending = operation
        own = float(arguments.get("timeout", 10.0)) + float(arguments.get("seconds", 0.0))
        self._timeout = own + ANSWER_GRACE
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": operation, **arguments}).encode() + b"\n")

    def is_waiting(self, seconds: float = 0.0) -> bool:
        """True if the operation begun has not answered after `seconds`."""
        return self._pending is not None and b"\n" not in self._unread and not self._readable(seconds)

    def is_asleep_for_data(self) -> bool:
        """Is it asleep in a read of a socket, or where it waits for one? Of a process that is on its CPU, or
        wants to be, the kernel says something else. While an operation goes on that reads."""
        said = Path(f"/proc/{self.pid}/syscall").read_text().split()[0]
        return self._pending is not None and said in _WAITING

    def finish(self, timeout: float | None = None) -> Any:
        """The value of the operation begun. Raises PeerError, PeerHung."""
        __tracebackhide__ = True
        operation, self._pending = self._pending, None
        assert operation is not None
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while b"\n" not in self._unread:
            if not self._readable(deadline - time.monotonic()):
                self._pending = operation
                raise PeerHung(f"{operation}: no answer from process {self.pid}")
            assert self._process.stdout is not None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise PeerHung(f"{operation}: process {self.pid} ended with {self._process.wait()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if not answer["ok"]:
            raise PeerError(operation, answer)
        return answer["value"]

    def tell_to_end(self) -> None:
        """Have an operation that goes on for some time end now, in good order."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End the process at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the process and reap it; its connections close."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.poll() is None:
            if self._pending is None:
                self._process.stdin.close()
                try:
                    self._process.wait(2.0)
                except subprocess.TimeoutExpired:
                    self._process.kill()
            else:
                self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], max(seconds, 0.0))[0])


@contextmanager
def stopped(peer: Peer) -> Iterator[None]:
    """The process does not run: stopped, as by a debugger or a freezer, or throttled."""
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        stat = Path(f"/proc/{peer.pid}/stat")
        wait_until("the process has stopped", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        yield
    finally:
        os.kill(peer.pid, signal.SIGCONT)


@dataclass
class End:
    """One end of a connection. Attribute access gives the peer's operations, bound to this connection."""

    peer: Peer
    conn: str
    local: tuple[str, int]
    remote: tuple[str, int]

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def carry_out(*positional: Any, **arguments: Any) -> Any:
            __tracebackhide__ = True
            named = dict(zip(POSITIONAL.get(operation, ()), positional, strict=True))
            return self.peer.call(operation, conn=self.conn, **named, **arguments)

        return carry_out

    def attempt(self, operation: str, **arguments: Any) -> Any:
        return self.peer.attempt(operation, conn=self.conn, **arguments)

    def begin(self, operation: str, **arguments: Any) -> None:
        self.peer.begin(operation, conn=self.conn, **arguments)

    def finish(self, timeout: float | None = None) -> Any:
        __tracebackhide__ = True
        return self.peer.finish(timeout)


@dataclass
class Pair:
    """A connection: the end that connected and the end that accepted."""

    client: End
    server: End
    label: str = field(default="")

    def pingpong(self, rounds: int, size: int = 64, answer: int = 64, pause: float = 0.0) -> None:
        """`rounds` messages each way."""
        __tracebackhide__ = True
        timeout = 10.0 + rounds * pause
        self.server.begin("echo", rounds=rounds, size=size, answer=answer, timeout=timeout)
        self.client.pingpong(rounds=rounds, size=size, answer=answer, pause=pause, timeout=timeout)
        self.server.finish()

    def verify(self) -> None:
        """Every byte either end has sent has been received by the other, in order and unchanged."""
        client, server = self.client.report(), self.server.report()
        for sender, receiver, way in ((client, server, "to the server"), (server, client, "to the client")):
            told = f"{self.label} {way}"
            assert receiver["first_wrong"] is None, f"{told}: wrong byte at {receiver['first_wrong']}"
            assert receiver["received"] == sender["sent"], f"{told}: bytes lost or added"
            assert receiver["received_sum"] == sender["sent_sum"], f"{told}: checksums differ"

    def close(self) -> None:
        self.client.close()
        self.server.close()
