# SPDX-License-Identifier: Apache-2.0
"""A process with blocking sockets, a thread for each connection: the control group, which is never spliced
unless a policy allows it. Commands as soak.worker has them; requests and answers only.

    python -m soak.control NAME NONCE SEED
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import struct
import sys
import threading
import time
from typing import Any

from soak.channel import name_address
from soak.plans import Plan, draw_size
from soak.protocol import CLIENT, SERVER, Decoder, Encoder, Fault, Frame, Kind, Outgoing, Pool, Sent
from soak.tally import Tally

PATTERN = "blocking"
REPORT_SECONDS = 0.5
BROKEN = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class Broken(Exception):
    """The connection ended before its time."""


class Line:
    """A connection with blocking calls."""

    def __init__(self, owner: Control, sock: socket.socket, side: int, conn: int | None) -> None:
        self.owner = owner
        self.sock = sock
        self.side = side
        self.born = time.monotonic()
        self.spliced = False
        self.peer = ""
        self.remote = name_address(sock.getpeername())
        self.encoder = None if conn is None else Encoder(owner.pool, conn, side)
        self.decoder = Decoder(owner.pool, 1 - side, conn, owner.nonce)
        self.gone = False
        self._frames: list[Frame] = []
        # Not settimeout(), which makes the socket non-blocking.
        patience = struct.pack("ll", int(owner.patience), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    def send(self, *frames: Outgoing) -> None:
        assert self.encoder is not None
        for frame in frames:
            data = b"".join(self.encoder.encode(frame, Sent()))
            try:
                self.sock.sendall(data)
            except BROKEN as error:
                raise Broken(type(error).__name__) from None
            except BlockingIOError:
                raise TimeoutError from None

    def receive(self) -> Frame | None:
        """The next frame; None at the end. Raises Broken, Fault, TimeoutError."""
        while not self._frames:
            began = time.monotonic()
            try:
                data = self.sock.recv(65536)
            except BROKEN as error:
                raise Broken(type(error).__name__) from None
            except BlockingIOError:
                # Where blocking = "allow" this may also mean: try again.
                if time.monotonic() - began > self.owner.patience - 1:
                    raise TimeoutError from None
                continue
            if not data:
                if self.decoder.ended and self.decoder.is_between_frames:
                    return None
                raise Broken("EOF")
            self._frames = list(self.decoder.feed(data))
            self.owner.count(self.spliced, len(data), len(self._frames))
        return self._frames.pop(0)

    def describe(self) -> dict[str, Any]:
        return {
            "conn": f"{self.decoder.conn or 0:x}",
            "side": "server" if self.side else "client",
            "pattern": PATTERN,
            "spliced": self.spliced,
            "remote": self.remote,
            "peer": self.peer,
            "read_frames": self.decoder.seq,
            "born": self.born,
            "time": time.monotonic(),
        }


class Control:
    """The process."""

    def __init__(self, name: str, nonce: int, seed: int) -> None:
        self.name = name
        self.nonce = nonce
        self.pool = Pool(seed)
        self.tally = Tally()
        self.patience = 12.0
        self.pace = 1.0
        self._seed = seed
        self._lock = threading.Lock()
        self._serials = itertools.count()
        self._phase: dict[str, Any] = {"number": 0, "spliced": False}
        self._generation = 0  # of phases
        self._finished = False
        self._lines: set[Line] = set()

    def count(self, spliced: bool, size: int, frames: int) -> None:
        with self._lock:
            self.tally.count("bytes", spliced, PATTERN, size)
            self.tally.count("messages", spliced, PATTERN, frames)

    def say(self, kind: str, what: Any) -> None:
        line = json.dumps({kind: what, "worker": self.name}).encode() + b"\n"
        with self._lock:
            os.write(1, line)

    def run(self) -> None:
        self.say("ready", os.getpid())
        threading.Thread(target=self._report, daemon=True).start()
        for line in sys.stdin:
            command = json.loads(line)
            getattr(self, f"do_{command.pop('do')}")(**command)
        os._exit(0)  # threads wait in the kernel

    def do_listen(self, listeners: list[dict[str, Any]]) -> None:
        ports = []
        for each in listeners:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((each["host"], each["port"]))
            sock.listen(64)
            ports.append(sock.getsockname()[1])
            threading.Thread(target=self._accept, args=(sock,), daemon=True).start()
        self.say("listening", ports)

    def do_dial(self, connections: int, targets: list[dict[str, Any]]) -> None:
        for number in range(connections):
            target = targets[number % len(targets)]
            threading.Thread(target=self._dial, args=(target, number), daemon=True).start()

    def do_settings(self, pace: float, patience: float, patterns: list[str], reads: list[str]) -> None:
        self.pace, self.patience = pace, patience

    def do_phase(self, number: int, spliced: bool, renew: bool) -> None:
        self._phase = {"number": number, "spliced": spliced}
        self._generation += renew

    def do_finish(self) -> None:
        self._finished = True
        self._generation += 1

    def do_gone(self, hosts: list[str]) -> None:
        for line in list(self._lines):
            if line.remote.rpartition(":")[0].strip("[]") in hosts:
                line.gone = True
                with contextlib.suppress(OSError):
                    line.sock.shutdown(socket.SHUT_RDWR)
        self.say("forgotten", hosts)

    def do_describe(self, port: int) -> None:
        self.say("described", [])

    def _report(self) -> None:
        while True:
            with self._lock:
                report = json.loads(json.dumps(self.tally.to_json()))
            self.say("tally", {**report, "open": len(self._lines), "refused": 0})
            time.sleep(REPORT_SECONDS)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._guard, args=(sock, SERVER, None, None), daemon=True).start()

    def _dial(self, target: dict[str, Any], number: int) -> None:
        rng = random.Random(f"{self._seed}/{self.name}/{number}")
        while not self._finished:
            try:
                sock = socket.create_connection((target["host"], target["port"]))
            except OSError:
                time.sleep(0.2)
                continue
            serial = next(self._serials)
            conn = (self.nonce << 48) | (self._phase["number"] & 0xFF) << 40 | 0xFF << 32
            conn |= (serial << 8 | number) & 0xFFFFFFFF
            self._guard(sock, CLIENT, conn, rng)
            time.sleep(0.05)

    def _guard(self, sock: socket.socket, side: int, conn: int | None, rng: random.Random | None) -> None:
        """Carry out one connection, and tell how it ended."""
        try:
            line = Line(self, sock, side, conn)
        except OSError:
            sock.close()  # gone before it had begun
            return
        self._lines.add(line)
        how = "bye"
        try:
            if rng is None:
                self._serve(line)
            else:
                self._ask(line, rng)
        except Broken as error:
            how = "peer gone" if line.gone else "cut"
            if not line.gone:
                self.say("cut", {**line.describe(), "how": str(error)})
        except TimeoutError:
            self.say("stuck", {**line.describe(), "quiet": self.patience})
            how = "stuck"
        except Fault as fault:
            self.say("fault", {**line.describe(), "fault": fault.kind, "detail": fault.detail})
            how = "fault"
        finally:
            sock.close()
            with self._lock:
                self._lines.discard(line)
                self.tally.count("ended", line.spliced, how)

    def _ask(self, line: Line, rng: random.Random) -> None:
        plan = Plan(PATTERN, spliced=self._phase["spliced"])
        generation = self._generation
        line.spliced = plan.spliced
        with self._lock:
            self.tally.count("connections", line.spliced, PATTERN)
        hello = json.dumps({"plan": plan.to_json(), "worker": self.name}).encode()
        line.send(Outgoing(Kind.HELLO, len(hello), payload=hello))
        answer = line.receive()
        line.peer = answer.payload.decode() if answer else ""
        for _ in range(rng.randint(50, 300)):
            if self._generation != generation:
                break
            wanted = draw_size(rng, (1, 200_000))
            line.send(Outgoing(Kind.REQUEST, draw_size(rng, (1, 20_000)), wanted, 1))
            got = line.receive()
            if got is None or got.length != wanted:
                raise Fault("misordered", f"wanted {wanted} bytes, got {got}")
            time.sleep(rng.expovariate(1 / (0.08 * self.pace)))
        line.send(Outgoing(Kind.BYE, 1))
        while line.receive() is not None:
            pass

    def _serve(self, line: Line) -> None:
        while (frame := line.receive()) is not None:
            if frame.kind == Kind.HELLO:
                hello = json.loads(frame.payload)
                line.spliced = hello["plan"]["spliced"]
                line.peer = hello["worker"]
                line.encoder = Encoder(self.pool, frame.conn, SERVER)
                name = self.name.encode()
                line.send(Outgoing(Kind.HELLO, len(name), payload=name))
            elif frame.kind == Kind.REQUEST:
                line.send(*[Outgoing(Kind.ANSWER, frame.want)] * frame.count)
            elif frame.kind == Kind.BYE:
                line.send(Outgoing(Kind.BYE, 1))
                line.sock.shutdown(socket.SHUT_WR)


def main() -> None:
    name, nonce, seed = sys.argv[1:4]
    Control(name, int(nonce), int(seed)).run()


if __name__ == "__main__":
    main()
