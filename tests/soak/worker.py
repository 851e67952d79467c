# SPDX-License-Identifier: Apache-2.0
"""A process with one epoll loop and many connections: all clients, or all servers.

    python -m soak.worker NAME NONCE SEED

Commands come as lines of JSON on stdin, answers and counts go as such to stdout. It ends with its stdin.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from soak.channel import Channel, ClientChannel, ServerChannel, name_address
from soak.plans import PATTERNS, READS, draw_plan
from soak.protocol import Pool
from soak.scarcity import NO_MEMORY, insist
from soak.tally import Tally

TURN_SECONDS = 0.05  # the loop asks at least so often, so that a lost wake-up is found
MAX_EVENTS = 4096  # more than there are connections: what is not listed is not ready
REPORT_SECONDS = 0.5
CHECK_SECONDS = 0.5
OPEN_AT_ONCE = 8
BACKLOG = 512
# Longer without asking: the process was stopped or throttled, or waited for memory.
ABSENT_NS = 250_000_000
ABSENCES = 64  # remembered
LAG_NS = 20_000_000  # busy for longer: worth remembering
LAGS = 64
LOOK_BACK_NS = 4_000_000_000


class Worker:
    """The loop."""

    def __init__(self, name: str, nonce: int, seed: int) -> None:
        self.name = name
        self.nonce = nonce
        self.pool = Pool(seed)
        self.rng = random.Random(f"{seed}/{name}")
        self.epoll = select.epoll()
        self.channels: dict[int, Channel] = {}
        self.pending: set[Channel] = set()  # edge-triggered ends that have not read all there is
        self.sending: set[Channel] = set()
        self.tally = Tally()
        self.refused = 0
        self.turn = 0
        self.turned_ns = time.monotonic_ns()  # when the loop asked the time before the last
        self.pace = 1.0
        self.patience = 12.0
        self._entered_ns = self.turned_ns
        self._absences: deque[tuple[int, int]] = deque(maxlen=ABSENCES)
        self._returned_ns = self.turned_ns
        self._lags: deque[tuple[int, int]] = deque(maxlen=LAGS)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._serials = itertools.count()
        self._listeners: dict[int, socket.socket] = {}
        self._targets: list[dict[str, Any]] = []
        self._goal = 0
        self._phase: dict[str, Any] = {"number": 0, "spliced": False}
        self._patterns = list(PATTERNS)
        self._reads = list(READS)
        self._commands = b""
        self._running = True

    # what channels use

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def forget(self, channel: Channel) -> None:
        self.channels.pop(channel.fd, None)
        self.pending.discard(channel)
        self.sending.discard(channel)

    def say(self, kind: str, what: Any) -> None:
        line = json.dumps({kind: what, "worker": self.name}).encode() + b"\n"
        while line:
            line = line[insist(os.write, 1, line) :]

    def count_absent(self, since: int, until: int) -> int:
        """Nanoseconds between two times in which this process did not ask for anything."""
        return sum(max(0, min(until, back) - max(since, left)) for left, back in self._absences)

    def find_lag(self, since: int) -> int:
        """The longest time, in nanoseconds, for which the loop was busy and did not ask."""
        return max((lag for when, lag in self._lags if when > since), default=0)

    # the loop

    def run(self) -> None:
        os.set_blocking(0, False)
        self.epoll.register(0, select.EPOLLIN)
        self.later(0.0, self._report)
        self.later(CHECK_SECONDS, self._check)
        self.say("ready", os.getpid())
        while self._running:
            self._turn()

    def _turn(self) -> None:
        timeout = TURN_SECONDS
        if self.pending or self.sending:
            timeout = 0.0
        elif self._timers:
            timeout = min(timeout, max(0.0, self._timers[0][0] - time.monotonic()))
        self.turned_ns = self._entered_ns
        self._entered_ns = time.monotonic_ns()
        if self._entered_ns - self.turned_ns > ABSENT_NS:
            self._absences.append((self.turned_ns + int(TURN_SECONDS * 1e9), self._entered_ns))
        if self._entered_ns - self._returned_ns > LAG_NS:
            self._lags.append((self._entered_ns, self._entered_ns - self._returned_ns))
        events = self.epoll.poll(timeout, MAX_EVENTS)
        self._returned_ns = time.monotonic_ns()
        if (late := self._returned_ns - self._entered_ns - int(timeout * 1e9)) > LAG_NS:
            self._lags.append((self._returned_ns, late))  # not let run, for all it knows
        self.turn += 1
        left = list(self.pending)
        for fd, mask in events:
            if (channel := self.channels.get(fd)) is not None:
                channel.on_event(mask)
            elif fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd == 0:
                self._obey()
        for channel in left:
            if channel in self.pending and not channel.closed:
                channel.receive()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        for channel in list(self.sending):
            self.sending.discard(channel)
            if not channel.closed:
                channel.send()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(32):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_MEMORY:
                    raise
                return  # it is still there the next time
            sock.setblocking(False)
            ServerChannel(self, sock, name_address(address))

    # commands

    def _obey(self) -> None:
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(0, 1 << 16)
        if not data:
            self._running = False
            return
        self._commands += data
        *lines, self._commands = self._commands.split(b"\n")
        for line in lines:
            command = json.loads(line)
            getattr(self, f"do_{command.pop('do')}")(**command)

    def do_listen(self, listeners: list[dict[str, Any]]) -> None:
        """Listen; answers with the ports."""
        ports = []
        for each in listeners:
            family = socket.AF_INET6 if ":" in each["host"] else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not each.get("dual")))
            sock.bind((each["host"], each["port"]))
            sock.listen(BACKLOG)
            sock.setblocking(False)
            self._listeners[sock.fileno()] = sock
            self.epoll.register(sock.fileno(), select.EPOLLIN)
            ports.append(sock.getsockname()[1])
        self.say("listening", ports)

    def do_dial(self, connections: int, targets: list[dict[str, Any]]) -> None:
        """Keep so many connections open to targets: {"family": 4 | 6, "host", "port", "weight"}."""
        started = self._goal > 0
        self._goal, self._targets = connections, targets
        if not started:
            self._open()

    def do_settings(self, pace: float, patience: float, patterns: list[str], reads: list[str]) -> None:
        self.pace, self.patience = pace, patience
        self._patterns, self._reads = patterns or list(PATTERNS), reads or list(READS)

    def do_phase(self, number: int, spliced: bool, renew: bool) -> None:
        """Connections made from now on are of this phase; with `renew` those that are there end soon."""
        self._phase = {"number": number, "spliced": spliced}
        if renew:
            self._renew()

    def do_finish(self) -> None:
        """End all connections, and make no more."""
        self._goal = 0
        self._renew()

    def do_gone(self, hosts: list[str]) -> None:
        """The peers at these addresses are no more, and may not have been able to say so."""
        for channel in list(self.channels.values()):
            if channel.remote.rpartition(":")[0].strip("[]").removeprefix("::ffff:") in hosts:
                channel.close("peer gone", linger=True)
        self.say("forgotten", hosts)

    def do_describe(self, port: int) -> None:
        """What ends there are of connections whose client has this port."""
        lag = self.find_lag(time.monotonic_ns() - LOOK_BACK_NS) / 1e9
        found = [channel.describe() | {"lag": lag} for channel in self.channels.values()]
        ends = [each for each in found if f":{port}" in (each["local"] + "|" + each["remote"])]
        self.say("described", ends)

    def _renew(self) -> None:
        for channel in list(self.channels.values()):
            if isinstance(channel, ClientChannel):
                channel.renew()

    # clients

    def _open(self) -> None:
        if self._goal:
            missing = self._goal - len(self.channels)
            for _ in range(min(missing, OPEN_AT_ONCE)):
                self._connect()
        self.later(0.04, self._open)

    def _connect(self) -> None:
        target = self.rng.choices(self._targets, [each["weight"] for each in self._targets])[0]
        plan = draw_plan(self.rng, self._patterns, self._reads, self._phase["spliced"])
        kind, number, generation = self.name.split("-")[-3:]
        slot = int(number) * 2 + (kind == "server")
        conn = (self.nonce << 48) | (self._phase["number"] & 0xFF) << 40 | slot << 32
        conn |= (int(generation) & 0xFF) << 24 | next(self._serials) & 0xFFFFFF
        family = socket.AF_INET6 if target["family"] == 6 else socket.AF_INET
        sock = insist(socket.socket, family, socket.SOCK_STREAM)
        sock.setblocking(False)
        name = name_address((target["host"], target["port"]))
        try:
            sock.connect((target["host"], target["port"]))
        except BlockingIOError:
            pass
        except OSError:
            self.refused += 1
            sock.close()
            return
        ClientChannel(self, sock, conn, plan, name)

    # reports

    def _report(self) -> None:
        ends = len(self.channels)
        self.say("tally", {**self.tally.to_json(), "open": ends, "refused": self.refused})
        self.later(REPORT_SECONDS, self._report)

    def _check(self) -> None:
        """Connections on which nothing has moved for long: a warning first, then they are given up."""
        now = time.monotonic_ns()
        for channel in list(self.channels.values()):
            quiet = (now - channel.moved) / 1e9
            if quiet > self.patience:
                self.say("stuck", {**channel.describe(), "time": now / 1e9})
                channel.close("stuck", linger=True)
            elif quiet > self.patience * 0.6 and not channel.warned:
                channel.warned = True
                self.say("quiet", {**channel.describe(), "time": now / 1e9})
        self.later(CHECK_SECONDS, self._check)


def main() -> None:
    name, nonce, seed = sys.argv[1:4]
    Worker(name, int(nonce), int(seed)).run()


if __name__ == "__main__":
    main()
