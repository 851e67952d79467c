# SPDX-License-Identifier: Apache-2.0
"""What goes wrong during the soak: which events, when, and to whom, all from one seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

# Of both kinds of phases, so that plain TCP is measured under the same.
TO_WORKERS = Counter(
    kill_client=1, kill_server=1, pause=3, quota=2, delete_namespace=1, memory=1, socket_memory=1
)
# Only where splicer runs.
TO_RULES = Counter(policy=4, mistake=1, drain=2)
TO_DAEMON = Counter(daemon_kill=2, daemon_restart=1, daemon_unload=1, restart_while_paused=1)
KINDS = (*TO_WORKERS, *TO_RULES, *TO_DAEMON)
# Only if asked for by name. Without memory for sockets plain TCP itself stalls for seconds, and nothing
# shorter would be noticed any more; readers that do not run while splicer stops are a run of their own.
WITHHELD = ("restart_while_paused", "socket_memory")
USUAL = tuple(kind for kind in KINDS if kind not in WITHHELD)
# Seconds between events on average, with and without splicer: in short phases, and at most in long ones.
MEAN_PAUSE = {True: (0.9, 2.0), False: (1.4, 3.0)}


@dataclass(frozen=True)
class Event:
    """`at`: seconds from the beginning of the phase. `seed`: for everything else about it."""

    at: float
    kind: str
    seed: int


@dataclass(frozen=True)
class Phase:
    """A part of the run. `quiet`: the daemon is left alone, so that its memory can be judged."""

    number: int
    spliced: bool
    quiet: bool
    seconds: float
    events: tuple[Event, ...]


def plan_phases(seed: int, seconds: float, kinds: frozenset[str] = frozenset(USUAL)) -> list[Phase]:
    """Phases without and with splicer in turn, the last one with, of `seconds` altogether."""
    rng = random.Random(f"{seed}/chaos")
    cycles = max(2, round(seconds / 120))
    phases = []
    bag: list[str] = []
    fresh = set(kinds)  # what has not happened yet comes first
    for number in range(2 * cycles):
        spliced = bool(number % 2)
        quiet = spliced and number % 4 == 3
        length = seconds / cycles * (0.65 if spliced else 0.35)
        wanted = Counter(TO_WORKERS)
        if spliced:
            wanted += TO_RULES if quiet else TO_RULES + TO_DAEMON
        choice = sorted(kind for kind in wanted.elements() if kind in kinds)
        low, high = MEAN_PAUSE[spliced]
        mean = min(high, max(low, length / 25))
        events = []
        at = min(3.0, length / 4)  # connections have to be there first
        while choice and at < length - 2.0:
            possible = sorted(fresh & set(choice))
            # Those that only few phases can have come before the others.
            possible = [kind for kind in possible if kind in TO_DAEMON] or possible
            if possible:
                kind = rng.choice(possible)
                fresh.discard(kind)
            else:
                bag = [each for each in bag if each in choice] or rng.sample(choice, len(choice))
                kind = bag.pop()
            events.append(Event(round(at, 2), kind, rng.getrandbits(32)))
            at += mean * rng.uniform(0.4, 1.6)
        phases.append(Phase(number, spliced, quiet, length, tuple(events)))
    return phases
