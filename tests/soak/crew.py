# SPDX-License-Identifier: Apache-2.0
"""The worker processes, and what they say."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.cgroup import Cgroup

from soak.tally import Tally, add_up

TESTS = Path(__file__).resolve().parents[1]
MOST_STALLS = 10_000  # kept
READY_SECONDS = 20.0
MODULES = {"client": "soak.worker", "server": "soak.worker", "control": "soak.control"}


@dataclass(eq=False)
class Hand:
    """One process. `name` is role, number of its host, generation."""

    name: str
    role: str
    host: int
    process: subprocess.Popen[bytes]
    ended: float = 0.0  # CLOCK_MONOTONIC seconds, when its last word had been read
    unread: bytes = b""
    answers: dict[str, list[Any]] = field(default_factory=dict)
    tally: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Crew:
    """Starts workers and reads what they say, in a thread of its own."""

    def __init__(self, nonce: int, seed: int) -> None:
        self._nonce = nonce
        self._seed = seed
        self.hands: list[Hand] = []
        self.buried: list[Hand] = []
        self.complaints: list[dict[str, Any]] = []  # {"kind": "fault" | "cut" | "stuck" | "quiet", ...}
        self.stalls: list[dict[str, Any]] = []  # the long ones
        self.on_complaint: Callable[[str, dict[str, Any]], None] = lambda kind, what: None
        self._generations: dict[tuple[str, int], int] = {}
        self._selector = selectors.DefaultSelector()
        self._changed = threading.Condition()
        self._stopping = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def spawn(self, role: str, host: int, namespace: str | None = None, cgroup: Cgroup | None = None) -> Hand:
        """Start a worker; it is in its cgroup before it makes a socket."""
        generation = self._generations.get((role, host), 0)
        self._generations[role, host] = generation + 1
        name = f"{role}-{host}-{generation}"
        module = MODULES[role.partition("_")[0]]
        command = [sys.executable, "-S", "-m", module, name, str(self._nonce), str(self._seed)]
        if namespace is not None:
            command = ["nsenter", f"--net=/run/netns/{namespace}", *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(TESTS),
                "PYTHONDONTWRITEBYTECODE": "1",
                # Large buffers are given back and asked for anew, so that a limit on memory is felt.
                "MALLOC_MMAP_THRESHOLD_": "32768",
            },
        )
        hand = Hand(name, role, host, process)
        self.hands.append(hand)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ, hand)
        self.wait(hand, "ready", READY_SECONDS)
        if cgroup is not None:
            cgroup.add(hand.pid)
        return hand

    def tell(self, hand: Hand, do: str, **arguments: Any) -> None:
        """Give a command."""
        assert hand.process.stdin is not None
        try:
            hand.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            if hand in self.hands and hand.alive:
                raise

    def tell_all(self, do: str, **arguments: Any) -> None:
        for hand in list(self.hands):
            self.tell(hand, do, **arguments)

    def wait(self, hand: Hand, kind: str, timeout: float) -> Any:
        """What a worker says under this name, taken out."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not hand.answers.get(kind):
                left = deadline - time.monotonic()
                if left <= 0 or not hand.alive:
                    raise RuntimeError(f"{hand.name} did not say {kind!r} within {timeout} s")
                self._changed.wait(min(left, 0.2))
            return hand.answers[kind].pop(0)

    def kill(self, hand: Hand) -> None:
        """SIGKILL."""
        hand.process.send_signal(signal.SIGCONT)
        hand.process.kill()
        self._bury(hand)

    def stop(self) -> None:
        """End all workers; their last words are read."""
        for hand in self.hands:
            if hand.alive:
                hand.process.send_signal(signal.SIGCONT)
            assert hand.process.stdin is not None
            hand.process.stdin.close()
        for hand in list(self.hands):
            try:
                hand.process.wait(3.0)
            except subprocess.TimeoutExpired:
                hand.process.kill()
            self._bury(hand)
        self._stopping = True
        self._reader.join()

    def collect(self, kind: str) -> list[Any]:
        """All that workers have said under a name and nobody waited for; lists are joined."""
        said = [each for hand in (*self.hands, *self.buried) for each in hand.answers.get(kind, [])]
        return [one for each in said for one in each]

    def count_open(self) -> int:
        """Ends of connections that were open at the last report."""
        return sum(int(hand.tally.get("open", 0)) for hand in self.hands)

    def sum_refused(self) -> int:
        return sum(int(hand.tally.get("refused", 0)) for hand in (*self.hands, *self.buried))

    def sum_tallies(self) -> Tally:
        """Of the living and the dead, the latter up to their last report."""
        return add_up(hand.tally for hand in (*self.hands, *self.buried) if hand.tally)

    def find_dead(self) -> list[Hand]:
        """Workers that ended although nobody wanted them to."""
        return [hand for hand in self.hands if not hand.alive]

    def _bury(self, hand: Hand) -> None:
        hand.process.wait()
        assert hand.process.stdin is not None and hand.process.stdout is not None
        with self._changed:
            if hand in self.hands:
                self.hands.remove(hand)
                self.buried.append(hand)
        hand.process.stdin.close()

    def _read(self) -> None:
        while not self._stopping:
            if not self._selector.get_map():
                time.sleep(0.02)
                continue
            for key, _ in self._selector.select(0.2):
                hand: Hand = key.data
                try:
                    data = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    continue
                if not data:
                    hand.ended = time.monotonic()
                    self._selector.unregister(key.fileobj)
                    assert hand.process.stdout is not None
                    hand.process.stdout.close()
                    continue
                *lines, hand.unread = (hand.unread + data).split(b"\n")
                for line in lines:
                    self._take(hand, json.loads(line))

    def _take(self, hand: Hand, message: dict[str, Any]) -> None:
        worker = message.pop("worker")
        ((kind, what),) = message.items()
        if kind == "tally":
            hand.tally = what
            return
        if kind == "stall":
            if len(self.stalls) < MOST_STALLS:
                self.stalls.append(what)
                self.on_complaint(kind, what)
            return
        if kind in ("fault", "cut", "stuck", "quiet"):
            self.complaints.append({"kind": kind, "worker": worker, **what})
            self.on_complaint(kind, self.complaints[-1])
            return
        with self._changed:
            hand.answers.setdefault(kind, []).append(what)
            self._changed.notify_all()
