# SPDX-License-Identifier: Apache-2.0
"""Traffic that checks itself, for tests in which something else happens meanwhile."""

from __future__ import annotations

from support.host import Host
from support.lab import Lab

CONNECTIONS = 3


class Load:
    """Connections that are hot and on which both sides keep bursting."""

    def __init__(self, host: Host, lab: Lab, seconds: float) -> None:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        self.pairs = [host.connect(client, server, lab.address("b")) for _ in range(CONNECTIONS)]
        self._peers = (client, server)
        for pair in self.pairs:
            host.make_hot(pair)
        for ends in ([pair.client for pair in self.pairs], [pair.server for pair in self.pairs]):
            conns = [end.conn for end in ends]
            ends[0].peer.begin("exchange", conns=conns, seconds=seconds, seed=1, largest=8000)

    @property
    def is_running(self) -> bool:
        return all(peer.is_waiting() for peer in self._peers)

    def finish(self) -> None:
        """Wait for its end; every byte must have arrived."""
        for peer in self._peers:
            assert peer.finish()["messages"] > 100
        for pair in self.pairs:
            pair.verify()
