# SPDX-License-Identifier: Apache-2.0
"""Sockets of peers as others get hold of them, and a proxy between two connections."""

from __future__ import annotations

from support.host import Host
from support.lab import Lab
from support.players import QUIRKS, End, Pair, Peer


def where(end: End) -> tuple[int, int]:
    """The process and the descriptor of an end whose program is QUIRKS."""
    return end.peer.pid, end.peer.call("fileno", conn=end.conn)


def make_chain(host: Host, lab: Lab, port: int, *, is_hot: bool = True) -> tuple[Peer, Pair, Pair]:
    """A proxy, and its connections with a client and with a backend, both spliced unless told."""
    client, backend = host.peer(lab, "a"), host.peer(lab, "a")
    proxy = host.peer(lab, "b", program=QUIRKS)
    front = host.connect(client, proxy, lab.address("b"), port=port)
    back = host.connect(proxy, backend, lab.address("a"), port=port)
    for pair in (front, back) if is_hot else ():
        host.make_hot(pair)
    return proxy, front, back


def ask_through(front: Pair, back: Pair, rounds: int) -> None:
    """Every question arrives at the backend, and every answer at the client, in order."""
    for number in range(rounds):
        question, answer = f"question {number:04}", f"answer {number:04}"
        front.client.say(question)
        assert back.server.hear(len(question)) == question
        back.server.say(answer)
        assert front.client.hear(len(answer)) == answer
