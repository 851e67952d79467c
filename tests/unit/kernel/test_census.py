# SPDX-License-Identifier: Apache-2.0
"""Which sockets belong together."""

from __future__ import annotations

import random

from splicer.kernel.census import match, read_sockets
from splicer.kernel.layout import OLDER_SOCKET, OlderFlag, OlderSocket

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
