# SPDX-License-Identifier: Apache-2.0
"""Running enlist and the others by hand: no daemon is there to do it, so a test says when, and on which
pair."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splicer.kernel import layout, libbpf
from splicer.kernel.enlist import Enlister, EnlistRequest
from splicer.kernel.generation import open_pinned
from splicer.kernel.layout import EnlistOutcome, EnlistTask
from splicer.kernel.sweep import Sweeper
from splicer.model import REASON_NAMES, STATES
from support.daemon import wait_until
from support.host import Host
from support.players import Pair

STATE, REASON = 2, 3  # among the fields of layout.PAIR
LOOK_PAUSE = 0.002  # seconds


@contextmanager
def sweeping(host: Host) -> Iterator[Sweeper]:
    """The programs that are loaded, with nobody but the test to run them through this."""
    generation = open_pinned(str(host.pin_dir))
    sweeper = generation.sweeper()
    try:
        yield sweeper
    finally:
        sweeper.close()
        generation.close()


class ByHand:
    """enlist, of the programs that a daemon has left."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pairs = libbpf.Map.open(str(host.pin_dir / "maps" / "pairs"))
        self._program = libbpf.open_pin(str(host.pin_dir / "programs" / "enlist"))
        self.enlister = Enlister(self._program)

    def close(self) -> None:
        self.enlister.close()
        self._pairs.close()
        os.close(self._program)

    def find(self, pair: Pair) -> layout.Pair | None:
        """The record of a connection, by the ports and the network namespace of its client."""
        cookie = pair.client.peer.call("netns_cookie")
        ports = (pair.client.local[1], pair.client.remote[1])
        for _, value in self._pairs.items():
            found = layout.read_pair(value)
            seen = tuple(int(text.rpartition(":")[2]) for text in (found.client.local, found.client.remote))
            if seen == ports and found.client.netns == cookie:
                return found
        return None

    def record(self, pair: Pair) -> layout.Pair:
        """The same of a connection that must be there."""
        found = self.find(pair)
        assert found is not None, f"{pair.label} is not known"
        return found

    def describe(self, pair: Pair) -> tuple[str, str, list[bool]]:
        """State, reason, and which of client and server are in the SOCKHASH."""
        found = self.record(pair)
        inside = [bool(end.flags & layout.EndFlag.IN_MAP) for end in (found.client, found.server)]
        return STATES[found.state], REASON_NAMES[found.reason], inside

    def announce(self, pair: Pair) -> None:
        """Make a connection hot, so that it waits for enlist."""
        pair.pingpong(40)
        assert self.describe(pair) == ("paired", "pending", [False, False])

    def ask(self, pair: Pair, task: EnlistTask, **changes: Any) -> EnlistOutcome:
        """Have enlist do something about a connection; `changes` are to its request."""
        found = self.record(pair)
        ends = found.client, found.server
        request = EnlistRequest(
            found.name, (ends[0].netns, ends[1].netns), (ends[0].tgid, ends[1].tgid), task
        )
        [outcome] = self.enlister.work([request._replace(**changes)])
        return outcome

    def put_in(self, pair: Pair) -> None:
        """Both ends, at a moment that must come soon."""
        wait_until("there is a moment", lambda: self.ask(pair, EnlistTask.TRY) == EnlistOutcome.IN)
        assert self.describe(pair) == ("spliced", "", [True, True])

    def look(self, pair: Pair, times: int = 1) -> EnlistOutcome:
        """Look at a connection that is in, as often as is needed or so many `times`."""
        for _ in range(times):
            outcome = self.ask(pair, EnlistTask.LOOK)
            if outcome == EnlistOutcome.OVER:
                break
            time.sleep(LOOK_PAUSE)
        return outcome

    @contextmanager
    def passing(self, pair: Pair) -> Iterator[None]:
        """What a spliced connection sends goes through TCP meanwhile, as of a sender that was on its way into
        TCP before. Nobody else is to use connections."""
        name = self.record(pair).id

        def write(state: int) -> None:
            def edit(fields: list[Any]) -> None:
                if tuple(fields[:2]) == name:
                    fields[STATE] = state

            self._host.edit_pairs(edit)

        write(layout.STATE_PAIRED)
        yield
        write(layout.STATE_SPLICED)


@contextmanager
def by_hand(host: Host) -> Iterator[ByHand]:
    """Kill the daemon, and do its work."""
    host.daemon.kill()
    hand = ByHand(host)
    try:
        yield hand
    finally:
        hand.close()
