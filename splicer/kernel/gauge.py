# SPDX-License-Identifier: Apache-2.0
"""What waits unread at the ends of spliced connections, counted when somebody asks."""

from __future__ import annotations

import threading

from splicer.kernel import libbpf
from splicer.kernel.layout import MEASURE_ANY, MEASURE_REQUEST, MEASURE_SERVER, MEASURE_TCP, Pair
from splicer.model import Unread

_NOTHING = Unread(0, 0)


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

    def _count(self, name: int, what: int) -> int:
        with self._guard:
            MEASURE_REQUEST.pack_into(self._run.context, 0, name, what)
            return self._run.run()
