# SPDX-License-Identifier: Apache-2.0
"""A memcached client on asyncio that checks every value it gets back.

cache.py ADDRESS PORT CONNECTIONS ROUNDS
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

SIZES = (1, 40, 1000, 9000, 300_000)
KEYS = 50


async def work(address: str, port: int, number: int, rounds: int) -> dict[str, int]:
    """Set, get and count; a connection has keys of its own."""
    reader, writer = await asyncio.open_connection(address, port)
    chance = random.Random(number)
    held: dict[str, bytes] = {}
    counted = {"set": 0, "get": 0, "wrong": 0}

    async def ask(request: bytes) -> bytes:
        writer.write(request)
        await writer.drain()
        return (await reader.readline()).rstrip()

    await ask(b"set count%d 0 0 1\r\n0\r\n" % number)
    for round_ in range(rounds):
        key = f"{number}-{chance.randrange(KEYS)}"
        value = chance.randbytes(chance.choice(SIZES))
        answer = await ask(b"set %s 0 0 %d\r\n%s\r\n" % (key.encode(), len(value), value))
        counted["set"] += answer == b"STORED"
        held[key] = value
        wanted = chance.choice(sorted(held))
        head = (await ask(b"get %s\r\n" % wanted.encode())).split()
        if head[:1] != [b"VALUE"]:
            counted["wrong"] += 1
            continue
        value = await reader.readexactly(int(head[3]))
        tail = await reader.readexactly(len(b"\r\nEND\r\n"))
        right = value == held[wanted] and tail == b"\r\nEND\r\n"
        counted["get" if right else "wrong"] += 1
        if await ask(b"incr count%d 1\r\n" % number) != b"%d" % (round_ + 1):
            counted["wrong"] += 1
    writer.close()
    return counted


async def main(address: str, port: int, connections: int, rounds: int) -> None:
    results = await asyncio.gather(*(work(address, port, number, rounds) for number in range(connections)))
    print(json.dumps({name: sum(each[name] for each in results) for name in results[0]}))


asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
