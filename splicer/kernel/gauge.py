# SPDX-License-Identifier: Apache-2.0
"""What waits unread at the ends of spliced connections, and what else is true of an end, found out when
somebody asks."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from splicer.kernel import libbpf
from splicer.kernel.layout import (
    MEASURE_ANY,
    MEASURE_FACT_SHIFT,
    MEASURE_REQUEST,
    MEASURE_SERVER,
    MEASURE_TCP,
    EndFlag,
    Fact,
    FactBit,
    Pair,
)
from splicer.model import Unread

_NOTHING = Unread(0, 0)


@dataclass(frozen=True)
class Facts:
    """What is true of a socket now that decides whether it can be spliced. `tcp_state` is TCP's number for
    it, `shutdown` of RCV_SHUTDOWN and SEND_SHUTDOWN, `file_flags` those of open(2), `peek_off` -1 for off.
    `pacing` is in bytes per second, None for none. `waiter` says who waits for it, 0: nobody, 1: in poll or
    the like, 2: in a read. `habit` is the number of a reason, 0: none."""

    bits: FactBit
    tcp_state: int
    shutdown: int
    file_flags: int
    manner: EndFlag
    polls: int
    was_asleep: bool
    rcvlowat: int
    peek_off: int
    pacing: int | None
    waiter: int
    habit: int
    segments: int


class Gauge:
    """Runs measure. May be used by several threads."""

    def __init__(self, program: int) -> None:
        self._run = libbpf.TestRun(program, MEASURE_REQUEST.size)
        self._guard = threading.Lock()

    def read(self, pair: Pair) -> tuple[Unread, Unread] | None:
        """At the client and at the server. None if the pair is plain, or cannot be looked at."""
        if not pair.is_in_map:
            return None
        try:
            # Nearly always, and there may be many.
            if not self._count(pair.name, MEASURE_ANY):
                return _NOTHING, _NOTHING
            client, server = (
                Unread(*(self._count(pair.name, end | kind) for kind in (0, MEASURE_TCP)))
                for end in (0, MEASURE_SERVER)
            )
        except libbpf.KernelError:
            return None
        return client, server

    def read_facts(self, pair: Pair) -> tuple[Facts | None, Facts | None]:
        """What the programs decide by, at the client and at the server; None of one whose socket has gone, or
        cannot be looked at."""
        return self._read_end(pair.name, 0), self._read_end(pair.name, MEASURE_SERVER)

    def _read_end(self, name: int, end: int) -> Facts | None:
        def ask(fact: Fact) -> int:
            return self._count(name, fact << MEASURE_FACT_SHIFT | end)

        try:
            bits = FactBit(ask(Fact.BITS))
            if FactBit.THERE not in bits:
                return None
            state, manner, pacing = ask(Fact.STATE), ask(Fact.MANNER), ask(Fact.PACING)
            return Facts(
                bits=bits,
                tcp_state=state & 0xFF,
                shutdown=state >> 8 & 0xFF,
                file_flags=ask(Fact.FILE_FLAGS),
                manner=EndFlag(manner & 0xFFFF),
                polls=manner >> 16 & 0xFF,
                was_asleep=bool(manner >> 24),
                rcvlowat=ask(Fact.RCVLOWAT),
                peek_off=ask(Fact.PEEK_OFF) - 1,
                pacing=None if pacing == 0xFFFFFFFF else pacing,
                waiter=ask(Fact.WAITER),
                habit=ask(Fact.HABIT),
                segments=ask(Fact.SEGMENTS),
            )
        except libbpf.KernelError:
            return None

    def _count(self, name: int, what: int) -> int:
        with self._guard:
            MEASURE_REQUEST.pack_into(self._run.context, 0, name, what)
            return self._run.run()
