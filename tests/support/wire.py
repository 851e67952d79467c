# SPDX-License-Identifier: Apache-2.0
"""Connections that are plain TCP or spliced, for scripts that must not see which."""

from __future__ import annotations

from typing import Any

from support.host import Host
from support.lab import Lab
from support.players import Pair, Peer


class Wire:
    """Connections that are plain TCP or spliced, for scripts that must not see which."""

    def __init__(self, host: Host, lab: Lab, spliced: bool) -> None:
        self.host = host
        self.lab = lab
        self.spliced = spliced

    def pair(self, client: str = "a", server: str = "b", **arguments: Any) -> Pair:
        """A connection between new processes on two hosts; "lo" as server is the client's own loopback."""
        address = arguments.pop("address", self.lab.address(server))
        return self.host.connect(*self.peers(client, server), address, **arguments)

    def peers(self, client: str, server: str) -> tuple[Peer, Peer]:
        """New processes on two hosts."""
        one, other = (self.host.peer(self.lab, name, inside=self.spliced) for name in _places(client, server))
        return one, other

    def heat(self, pair: Pair) -> None:
        """Make a connection hot; where splicing is wanted, come back when it is spliced."""
        if self.spliced:
            self.host.make_hot(pair)
        else:
            pair.pingpong(44)

    def hot_pair(self, client: str = "a", server: str = "b", **arguments: Any) -> Pair:
        made = self.pair(client, server, **arguments)
        self.heat(made)
        return made

    def redirected_bytes(self, pair: Pair) -> int:
        """How much of the connection has been redirected."""
        return self._count(pair, "redirected_bytes")

    def redirected_messages(self, pair: Pair) -> int:
        """In how many messages."""
        return self._count(pair, "redirected_messages")

    def _count(self, pair: Pair, what: str) -> int:
        flow = self.host.find_flow(pair) if self.spliced else None
        return 0 if flow is None else int(flow[what])


def _places(client: str, server: str) -> tuple[str, str]:
    return client, client if server == "lo" else server
