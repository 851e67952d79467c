# SPDX-License-Identifier: Apache-2.0
"""An HTTP client as services have them: keep-alive connections, non-blocking sockets, another try when the
connection breaks. Runs inside a container, with the standard library alone.

    keepalive.py SECONDS CONNECTIONS URL_HOST...

SIGINT ends it earlier. The end is one line of JSON: for each host {"requests", "retries", "failed",
"longest_s"}. Failed means that the answer was wrong, or did not come within 15 seconds of trying.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass

PATIENCE_S = 15.0
ATTEMPT_S = 5.0
BODY = b"A response of sixty-four bytes, from nginx to whoever asks it.\n\n"
REQUEST = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"


@dataclass
class Tally:
    requests: int = 0
    retries: int = 0
    failed: int = 0
    longest_s: float = 0.0


class Connection:
    """One keep-alive connection, made again when needed."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def fetch(self) -> bytes:
        """The body of one answer. Raises OSError, EOFError, TimeoutError."""
        async with asyncio.timeout(ATTEMPT_S):
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._host, self._port)
            reader, writer = self._streams
            writer.write(REQUEST % self._host.encode())
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            return await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def request(host: str, port: int, end: float, told: asyncio.Event, tally: Tally) -> None:
    connection = Connection(host, port)
    while time.monotonic() < end and not told.is_set():
        began = time.monotonic()
        while True:
            try:
                right = await connection.fetch() == BODY
                break
            except (OSError, EOFError, TimeoutError):
                connection.close()
                if time.monotonic() - began > PATIENCE_S:
                    right = False
                    break
                tally.retries += 1
                await asyncio.sleep(0.05)
        tally.requests += 1
        tally.failed += not right
        tally.longest_s = max(tally.longest_s, time.monotonic() - began)
        await asyncio.sleep(0.002)
    connection.close()


async def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    tallies = {host: Tally() for host in sys.argv[3:]}
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, told.set)
    async with asyncio.TaskGroup() as group:
        for host, tally in tallies.items():
            name, _, port = host.partition(":")
            for _ in range(int(sys.argv[2])):
                group.create_task(request(name, int(port or 8080), end, told, tally))
    print(json.dumps({host: asdict(tally) for host, tally in tallies.items()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
