# SPDX-License-Identifier: Apache-2.0
"""A relay for TCP that holds bytes back when it is told to, so that a program sleeps waiting for them.

gate.py ADDRESS PORT TO_ADDRESS TO_PORT SIDE CONTROL

SIDE says where the program is that shall wait: `client` connects to the gate, `server` is what the gate
connects to. CONTROL is the path of a Unix socket that takes one command a line and answers each with JSON:

hold N   of all that comes for the program on the connections there are, pass N bytes more and keep the rest
release  pass what was kept
reset    end the program's connections with a RST
state    names: the client's "address:port" of each open connection to the program; accepted: how many
         connections there were; held: how many bytes are kept
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from collections.abc import Callable

READ_SIZE = 1 << 16
NO_LINGER = struct.pack("ii", 1, 0)


class Link:
    """One connection through the gate."""

    def __init__(
        self, to_program: asyncio.StreamWriter, from_program: asyncio.StreamReader, name: str
    ) -> None:
        self.to_program = to_program
        self.from_program = from_program
        self.name = name
        # How many bytes may pass yet; None: all.
        self.left: int | None = None
        self.held = b""

    def give(self, data: bytes) -> None:
        """Take what comes for the program."""
        if self.left is not None:
            data, kept = data[: self.left], data[self.left :]
            self.left -= len(data)
            self.held += kept
        if data:
            self.to_program.write(data)

    def release(self) -> None:
        self.left, kept, self.held = None, self.held, b""
        self.give(kept)

    def reset(self) -> None:
        sock = self.to_program.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.to_program.transport.abort()


class Gate:
    def __init__(self, to: tuple[str, int], side: str) -> None:
        self._to = to
        self._side = side
        self._links: set[Link] = set()
        self._accepted = 0

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.close()
            return
        if self._side == "client":
            name = writer.get_extra_info("peername")
            link = Link(writer, reader, f"{name[0]}:{name[1]}")
            other_reader, other_writer = far_reader, far_writer
        else:
            name = far_writer.get_extra_info("sockname")
            link = Link(far_writer, far_reader, f"{name[0]}:{name[1]}")
            other_reader, other_writer = reader, writer
        self._links.add(link)
        ways = (
            asyncio.ensure_future(_pump(other_reader, link.give)),
            asyncio.ensure_future(_pump(link.from_program, other_writer.write)),
        )
        # Nobody here uses a half-closed connection.
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        self._links.discard(link)
        for each in (writer, far_writer):
            each.close()

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(json.dumps(self._obey(*line.decode().split())).encode() + b"\n")
            await writer.drain()
        writer.close()

    def _obey(self, command: str, *arguments: str) -> dict[str, object]:
        for link in list(self._links):
            if command == "hold":
                link.left = int(arguments[0])
            elif command == "release":
                link.release()
            elif command == "reset":
                link.reset()
        return {
            "names": [link.name for link in self._links],
            "accepted": self._accepted,
            "held": sum(len(link.held) for link in self._links),
        }


async def _pump(reader: asyncio.StreamReader, sink: Callable[[bytes], object]) -> None:
    try:
        while data := await reader.read(READ_SIZE):
            sink(data)
    except OSError:
        pass


async def main() -> None:
    address, port, to_address, to_port, side, path = sys.argv[1:]
    gate = Gate((to_address, int(to_port)), side)
    servers = (
        await asyncio.start_unix_server(gate.control, path),
        await asyncio.start_server(gate.accept, address, int(port)),
    )
    await asyncio.gather(*(server.serve_forever() for server in servers))


asyncio.run(main())
