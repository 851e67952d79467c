# SPDX-License-Identifier: Apache-2.0
"""A TCP relay whose ways of reading are those of real ones. Run as a script: MODE PORT BACKEND_ADDRESS
BACKEND_PORT.

go       non-blocking, edge-triggered, splice(2) through a pipe for each direction: Go's io.Copy, docker-proxy
threads  a thread for each direction, blocking sockets, blocking splice(2)
headers  recv(2) for the first bytes of each direction, then as `go`: HAProxy and Go's HTTP proxies, which
         parse a head themselves and leave the rest to the kernel
copy     recv(2) and send(2) all along, non-blocking: what a relay without splice(2) does
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading

SPLICE_F_MOVE, SPLICE_F_NONBLOCK = 1, 2
PIPE_SIZE = 65_536
HEAD = 4000  # bytes each way that `headers` reads itself


class Way:
    """One direction: what was taken from `source` and not yet given to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket, by_hand: float) -> None:
        self.source, self.sink = source, sink
        self.out, self.into = os.pipe()
        self.by_hand = by_hand
        self.held = b""
        self.in_pipe = 0
        self.ended = False

    def move(self) -> bool:
        """All that can be moved now; False when the direction is over."""
        while True:
            if not self._give():
                return True
            if self.ended:
                with contextlib.suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)
                return False
            try:
                self._take()
            except BlockingIOError:
                return True

    def _take(self) -> None:
        if self.by_hand > 0:
            self.held = self.source.recv(4096)
            self.by_hand -= len(self.held)
            self.ended = not self.held
        else:
            flags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK
            self.in_pipe = os.splice(self.source.fileno(), self.into, PIPE_SIZE, flags=flags)
            self.ended = not self.in_pipe

    def _give(self) -> bool:
        try:
            while self.held:
                self.held = self.held[self.sink.send(self.held) :]
            while self.in_pipe:
                flags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK
                self.in_pipe -= os.splice(self.out, self.sink.fileno(), self.in_pipe, flags=flags)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


def relay_by_events(door: socket.socket, backend: tuple[str, int], by_hand: float) -> None:
    poller = select.epoll()
    poller.register(door, select.EPOLLIN)
    guests: dict[int, tuple[socket.socket, list[Way]]] = {}
    while True:
        for fd, _ in poller.poll():
            if fd == door.fileno():
                ends = door.accept()[0], socket.create_connection(backend)
                ways = [Way(*ends, by_hand), Way(*reversed(ends), by_hand)]
                for end in ends:
                    end.setblocking(False)
                    guests[end.fileno()] = (end, ways)
                    # Registered once for all, as Go's runtime does.
                    poller.register(
                        end, select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
                    )
            elif fd in guests:
                _, ways = guests[fd]
                try:
                    going = [way for way in ways if not way.ended]
                    over = not [way for way in going if way.move()]
                except OSError:
                    over = True
                if over and all(way.ended or over for way in ways):
                    for end in {ways[0].source, ways[0].sink}:
                        guests.pop(end.fileno(), None)
                        end.close()
                    for way in ways:
                        way.close()


def relay_by_threads(door: socket.socket, backend: tuple[str, int]) -> None:
    def pump(source: socket.socket, sink: socket.socket) -> None:
        out, into = os.pipe()
        try:
            while count := os.splice(source.fileno(), into, PIPE_SIZE, flags=SPLICE_F_MOVE):
                while count:
                    count -= os.splice(out, sink.fileno(), count, flags=SPLICE_F_MOVE)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        finally:
            os.close(out)
            os.close(into)

    while True:
        ends = door.accept()[0], socket.create_connection(backend)
        for pair in (ends, ends[::-1]):
            threading.Thread(target=pump, args=pair, daemon=True).start()


def main() -> None:
    mode, port, address, backend_port = sys.argv[1:]
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind(("0.0.0.0", int(port)))
    door.listen(64)
    backend = (address, int(backend_port))
    print("ready", flush=True)
    if mode == "threads":
        relay_by_threads(door, backend)
    else:
        relay_by_events(door, backend, {"go": 0.0, "headers": HEAD, "copy": float("inf")}[mode])


if __name__ == "__main__":
    main()
