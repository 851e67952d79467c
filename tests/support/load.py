# SPDX-License-Identifier: Apache-2.0
"""Traffic that checks itself, for tests in which something else happens meanwhile."""

from __future__ import annotations

import time

from support.host import Host
from support.lab import Lab

CONNECTIONS = 3
LONGEST = 120.0  # seconds after which it ends whatever happens
AFTERWARDS = 0.3  # seconds for which it goes on after what happened


class Load:
    """Connections that are hot and on which both sides keep bursting, until finish()."""

    def __init__(self, host: Host, lab: Lab) -> None:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        self.pairs = [host.connect(client, server, lab.address("b")) for _ in range(CONNECTIONS)]
        self._peers = (client, server)
        for pair in self.pairs:
            host.make_hot(pair)
        for ends in ([pair.client for pair in self.pairs], [pair.server for pair in self.pairs]):
            conns = [end.conn for end in ends]
            ends[0].peer.begin("exchange", conns=conns, seconds=LONGEST, seed=1, largest=8000)

    def finish(self) -> None:
        """End it; every byte must have arrived."""
        time.sleep(AFTERWARDS)
        for peer in self._peers:
            assert peer.is_waiting(), "the load ended too early to show anything"
        for peer in self._peers:
            peer.tell_to_end()
        for peer in self._peers:
            assert peer.finish()["messages"] > 100
        for pair in self.pairs:
            pair.verify()
