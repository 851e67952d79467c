# SPDX-License-Identifier: Apache-2.0
"""asyncio: an echo server, and a client that checks what comes back.

echo.py serve ADDRESS PORT
echo.py ask ADDRESS PORT CONNECTIONS MESSAGES BULK_BYTES
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys

SIZES = (1, 17, 300, 4096, 70000)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    writer.close()


async def serve(address: str, port: int) -> None:
    server = await asyncio.start_server(echo, address, port)
    await server.serve_forever()


async def ask(address: str, port: int, number: int, messages: int, bulk: int) -> dict[str, object]:
    reader, writer = await asyncio.open_connection(address, port)
    chance = random.Random(number)
    for message in range(messages):
        data = chance.randbytes(SIZES[message % len(SIZES)])
        # In two pieces now and then, so that the answer may come in pieces too.
        if message % 3 == 0:
            writer.write(data[: len(data) // 2])
            await writer.drain()
            writer.write(data[len(data) // 2 :])
        else:
            writer.write(data)
        back = await reader.readexactly(len(data))
        if back != data:
            raise SystemExit(f"message {message} came back changed")
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def send() -> None:
        for _ in range(bulk // 100_000):
            data = chance.randbytes(100_000)
            sent.update(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    while data := await reader.read(1 << 16):
        received.update(data)
    await sending
    writer.close()
    return {"same": sent.digest() == received.digest(), "sum": received.hexdigest()}


async def ask_all(address: str, port: int, connections: int, messages: int, bulk: int) -> None:
    answers = await asyncio.gather(
        *(ask(address, port, number, messages, bulk) for number in range(connections))
    )
    print(json.dumps({"answers": answers}))


if sys.argv[1] == "serve":
    asyncio.run(serve(sys.argv[2], int(sys.argv[3])))
else:
    asyncio.run(ask_all(sys.argv[2], *map(int, sys.argv[3:7])))
