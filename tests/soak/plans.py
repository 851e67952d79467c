# SPDX-License-Identifier: Apache-2.0
"""What a connection does in its life. The client draws a plan, and tells the server in its first frame."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# What slow readers take at a time, in bytes. One who is flooded needs seconds, not minutes.
SLOW = (16384, 32768, 65536)
FLOODED = (131072, 262144)
# "exact" asks with FIONREAD first, and believes it: as nginx and Java's available() do.
EXACT = "exact"
READS = ("recv", "recv_into", "recvmsg", "readv", "read", EXACT)
# How it ends: by BYE both ways; or one end closes with bytes unread, or with SO_LINGER of 0 seconds.
BYE = "bye"
CLIENT_ENDS = ("abrupt_client", "reset_client")
SERVER_ENDS = ("abrupt_server", "reset_server")


@dataclass(frozen=True)
class Habits:
    """How one end reads. Sizes in bytes, times in seconds."""

    edge: bool = False
    read: str = "recv"
    size: int = 65536
    pause: float = 0.0  # on average, after each read; 0: never
    nodelay: bool = True


@dataclass(frozen=True)
class Plan:
    """A connection. Sizes in bytes, times in seconds.

    A round is `depth` requests, each answered by `answers` messages. With `waits` the next round begins when
    all are there; without, as long as fewer than `window` are missing. Then the client thinks for `think`
    seconds on average. Before all that come `warm` rounds of one request and one answer, so that the
    connection is spliced first. `pieces`: the largest send, 0 for as large as can be. `late`: the server
    answers only when the client has shut down its direction.
    """

    pattern: str
    rounds: int = 1
    warm: int = 0
    depth: int = 1
    up: tuple[int, int] = (1, 2000)
    down: tuple[int, int] = (1, 2000)
    answers: int = 1
    waits: bool = True
    window: int = 64
    think: float = 0.05
    pieces: int = 0
    late: bool = False
    end: str = BYE
    client: Habits = Habits()
    server: Habits = Habits()
    spliced: bool = False  # whether splicer was to run when it was made

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_plan(document: dict[str, Any]) -> Plan:
    known = {each.name for each in fields(Plan)}
    values = {key: value for key, value in document.items() if key in known}
    for side in ("client", "server"):
        values[side] = Habits(**values[side])
    for name in ("up", "down"):
        values[name] = tuple(values[name])
    return Plan(**values)


def draw_size(rng: random.Random, bounds: tuple[int, int]) -> int:
    """Between the bounds, each order of magnitude as likely as the others."""
    low, high = bounds
    return low if low >= high else int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))


_BULK = Plan("bulk", warm=40, answers=0, waits=False)
PATTERNS: dict[str, tuple[int, Plan]] = {
    # weight, plan
    "rpc": (34, Plan("rpc", rounds=300, up=(1, 4000), down=(1, 8000), think=0.06)),
    "pipeline": (14, Plan("pipeline", rounds=120, depth=6, up=(1, 1500), down=(1, 4000), think=0.12)),
    "burst": (12, Plan("burst", rounds=120, depth=4, answers=3, waits=False, window=60, think=0.15)),
    "large": (5, Plan("large", rounds=12, up=(1000, 1 << 20), down=(1000, 1 << 20), think=0.4)),
    "upload": (
        4,
        replace(_BULK, pattern="upload", rounds=40, depth=8, up=(200, 60000), think=0.1),
    ),
    "download": (
        4,
        Plan("download", warm=40, rounds=6, answers=60, down=(200, 60000), think=0.3),
    ),
    "trickle": (
        3,
        replace(_BULK, pattern="trickle", rounds=6, depth=120, up=(1, 200), think=0.4),
    ),
    "slow_client": (4, Plan("slow_client", rounds=8, depth=4, answers=12, down=(100, 30000), think=0.2)),
    "slow_server": (4, Plan("slow_server", rounds=10, depth=30, up=(100, 20000), answers=1, think=0.2)),
    "flood": (3, Plan("flood", rounds=5, depth=45, up=(20000, 120000), answers=0, waits=False, think=1.5)),
    "drip": (5, Plan("drip", rounds=60, up=(1, 60), down=(1, 60), think=0.15, pieces=7)),
    "half_close": (4, Plan("half_close", rounds=12, depth=2, down=(1, 20000), waits=False, late=True)),
    "short": (7, Plan("short", rounds=2, think=0.01)),
}


def draw_plan(rng: random.Random, patterns: Sequence[str], reads: Sequence[str], spliced: bool) -> Plan:
    """A plan at random, out of the patterns and ways to read that are named."""
    weights = [PATTERNS[name][0] for name in patterns]
    plan = PATTERNS[rng.choices(patterns, weights)[0]][1]
    ends = [BYE] * 6 + [*CLIENT_ENDS, *SERVER_ENDS]
    return replace(
        plan,
        rounds=max(1, int(plan.rounds * rng.uniform(0.4, 1.3))),
        end=BYE if plan.late else rng.choice(ends),
        client=_draw_habits(rng, reads, SLOW if plan.pattern == "slow_client" else ()),
        server=_draw_habits(rng, reads, {"slow_server": SLOW, "flood": FLOODED}.get(plan.pattern, ())),
        spliced=spliced,
    )


def _draw_habits(rng: random.Random, reads: Sequence[str], slow: tuple[int, ...]) -> Habits:
    return Habits(
        edge=rng.random() < 0.4,
        read=rng.choice(reads),
        size=rng.choice(slow or (700, 4096, 16384, 65536, 262144)),
        pause=rng.uniform(0.01, 0.05) if slow else 0.0,
        nodelay=rng.random() < 0.7,
    )
