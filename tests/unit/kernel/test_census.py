# SPDX-License-Identifier: Apache-2.0
"""Which sockets belong together."""

from __future__ import annotations

import random
from typing import Any

import pytest

from splicer.kernel.census import Census, match, read_sockets
from splicer.kernel.layout import (
    OLDER_JOINED,
    OLDER_SOCKET,
    CensusState,
    OlderFlag,
    OlderOutcome,
    OlderSocket,
)

LAST = 2**32 - 1


def _socket(sk: int, sent: int, received: int, flags: int = 0) -> OlderSocket:
    return OlderSocket(sk, sk + 1, 7, sent, received, OlderFlag(flags))


def _ends(number: int, sent: int = 1000, received: int = 2000, flags: int = 0) -> list[OlderSocket]:
    """The client and the server of a connection, whose first bytes have these sequence numbers."""
    client = _socket(number * 16, (sent - 1) % 2**32, received, flags)
    return [client, _socket(number * 16 + 8, received, sent)]


def test_two_ends_find_each_other() -> None:
    found = match(_ends(1))
    [connection] = found.connections
    assert (connection.client.sk, connection.server.sk) == (16, 24)
    assert (dict(found.left), found.single) == ({}, 0)


def test_sequence_numbers_wrap() -> None:
    for sent, received in ((0, LAST), (LAST, 0), (0, 0), (1, 1)):
        [connection] = match(_ends(1, sent, received)).connections
        assert (connection.client.sk, connection.server.sk) == (16, 24)


def test_many_in_any_order() -> None:
    chance = random.Random(1)
    sockets = []
    for number in range(1, 2001):
        sockets += _ends(number, chance.randrange(2**32), chance.randrange(2**32))
    sockets += [_socket(10**6 + n, chance.randrange(2**32), chance.randrange(2**32)) for n in range(500)]
    chance.shuffle(sockets)
    found = match(sockets)
    assert len(found.connections) == 2000
    assert all(each.server.sk == each.client.sk + 8 for each in found.connections)
    assert (dict(found.left), found.single) == ({}, 500)


def test_a_socket_listed_twice_is_one() -> None:
    client, server = _ends(1)
    assert len(match([client, server, client, server]).connections) == 1


def test_a_third_socket_makes_it_ambiguous() -> None:
    client, server = _ends(1)
    for third in (_socket(160, client.sent, client.received), _socket(160, server.sent, server.received)):
        found = match([client, server, third])
        assert not found.connections
        assert (dict(found.left), found.single) == ({"ambiguous": 1}, 0)


def test_flags_of_either_end_count() -> None:
    for end in (0, 1):
        for flag, reason in ((OlderFlag.OUTSIDE, "outside"), (OlderFlag.REPAIRED, "repaired")):
            sockets = _ends(1)
            sockets[end] = _socket(sockets[end].sk, sockets[end].sent, sockets[end].received, flag)
            assert dict(match(sockets).left) == {reason: 1}


def test_what_has_no_end_below_the_cgroup_is_passed_over() -> None:
    outside = [end.__class__(end.sk, 0, 7, end.sent, end.received, OlderFlag.OUTSIDE) for end in _ends(1)]
    found = match([*outside, _socket(160, outside[0].sent, outside[0].received, OlderFlag.OUTSIDE)])
    assert (list(found.connections), dict(found.left), found.single) == ([], {}, 0)


def test_what_is_known_is_passed_over() -> None:
    client, server = _ends(1)
    found = match([client, _socket(server.sk, server.sent, server.received, OlderFlag.KNOWN)])
    assert (list(found.connections), dict(found.left), found.single) == ([], {}, 0)


def test_outsiders_without_counterpart_are_not_counted() -> None:
    found = match([_socket(1, 2, 3, OlderFlag.OUTSIDE), _socket(9, 4, 5)])
    assert found.single == 1


def test_a_socket_connected_to_itself_is_no_connection() -> None:
    """Its own peer (a simultaneous open with itself): both names are its own."""
    assert not match([_socket(1, 1000, 1001)]).connections


def test_sockets_are_read() -> None:
    written = OLDER_SOCKET.pack(1, 2, 3, 4, 5, 2) + OLDER_SOCKET.pack(6, 7, 8, 9, 10, 0)
    assert read_sockets(written) == [
        OlderSocket(1, 2, 3, 4, 5, OlderFlag.REPAIRED),
        OlderSocket(6, 7, 8, 9, 10, OlderFlag(0)),
    ]


class Room:
    """The map of those that are to be joined, with room for a few."""

    max_entries = 4

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.most = 0

    def set(self, name: bytes, _value: bytes) -> None:
        assert len(self.names) < self.max_entries
        self.names.append(name)
        self.most = max(self.most, len(self.names))

    def delete(self, name: bytes) -> None:
        self.names.remove(name)

    def walk_keys(self) -> list[bytes]:
        return list(self.names)


class Settings:
    def __init__(self) -> None:
        self.states: list[CensusState] = []

    def write(self, census: CensusState) -> None:
        self.states.append(census)


class Places:
    def find(self, cookie: int) -> str:
        return f"/netns/{cookie}"


@pytest.mark.parametrize("number", [0, 1, 4, 5, 11])
def test_more_than_there_is_room_for_are_joined_one_lot_after_the_other(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(number)
    sockets = [end for each in range(1, number + 1) for end in _ends(each, each * 1000, each * 2000)]
    chance.shuffle(sockets)
    connections = match(sockets).connections
    room, settings, joined = Room(), Settings(), []

    def visit(_self: Any, _link: int, path: str) -> bytes:
        assert path == "/netns/7"
        joined.extend(room.names)
        return b"".join(OLDER_JOINED.pack(1, OlderOutcome.JOINED) for _ in room.names)

    monkeypatch.setattr(Census, "_visit", visit)
    census: Any = Census(0, room, settings, cgroup=0, directory=Places())  # type: ignore[arg-type]
    steps = census._join(0, connections)
    outcomes = None
    while outcomes is None:
        try:
            next(steps)
        except StopIteration as end:
            outcomes = end.value
    assert outcomes[OlderOutcome.JOINED] == number
    assert len(set(joined)) == len(joined) == number
    assert room.most <= room.max_entries
    assert room.names == []
    assert settings.states == [CensusState.JOINS, CensusState.DONE]
