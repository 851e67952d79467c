# SPDX-License-Identifier: Apache-2.0
"""What network namespaces can be reached by: their addresses, and whether the links of these are up.

All of it is asked for, and heard, in a room of our own, where each namespace has a number. So there is no
socket of ours in any of them, which would keep it alive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from splicer.host.namespaces import ROOM_NAMESPACES, Room

# include/uapi/linux/netlink.h
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_LISTEN_ALL_NSID, _NETLINK_GET_STRICT_CHK = 1, 8, 12
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 1, 0x300, 0x10
# include/uapi/linux/rtnetlink.h
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_GETADDR = 16, 18, 20, 22
_RTNLGRP_LINK, _RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV6_IFADDR = 1, 5, 9
_RTEXT_FILTER_SKIP_STATS = 8
# include/uapi/linux/if_link.h, if_addr.h, if.h
_IFLA_EXT_MASK, _IFLA_TARGET_NETNSID = 29, 46
_IFA_ADDRESS, _IFA_LOCAL, _IFA_TARGET_NETNSID = 1, 2, 10
_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 1 << 0, 1 << 3, 1 << 16

_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, number, port
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=4BI")  # struct ifaddrmsg: family, prefix, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_NUMBER = struct.Struct("=i")
_MAPPED = b"\0" * 10 + b"\xff\xff"
_LARGEST = 1 << 16  # bytes; the kernel makes no larger part of a list
# Who makes news all the time gets no more attention than this.
_HEARD_AT_ONCE = 256
# A list that was changed while it was made is asked for again, so often at most.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Network:
    """What a network namespace looks like. `addresses` are 16 bytes each in network byte order, IPv4 ones as
    ::ffff:a.b.c.d, to whether their link is up and has a carrier; `loopback`: the loopback device is up."""

    addresses: Mapping[bytes, bool]
    loopback: bool


class _ChangedError(Exception):
    """A list is of two moments."""


def split_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and body of each message in what netlink has sent."""
    offset = 0
    while offset + _HEAD.size <= len(data):
        size, kind, flags, _, _ = _HEAD.unpack_from(data, offset)
        if size < _HEAD.size:
            return
        yield kind, flags, data[offset + _HEAD.size : offset + size]
        offset += size + 3 & ~3


def read_attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Attributes of a message from `offset` on, by their type."""
    found = {}
    while offset + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < _ATTRIBUTE.size:
            break
        found[kind] = data[offset + _ATTRIBUTE.size : offset + size]
        offset += size + 3 & ~3
    return found


def assemble(links: list[bytes], addresses: list[bytes]) -> Network:
    """A network from the bodies of RTM_NEWLINK and RTM_NEWADDR messages."""
    up: set[int] = set()
    loopback = False
    for body in links:
        _, _, index, flags, _ = _LINK.unpack_from(body)
        if flags & _IFF_UP and flags & _IFF_LOWER_UP:
            up.add(index)
            loopback |= bool(flags & _IFF_LOOPBACK)
    found: dict[bytes, bool] = {}
    for body in addresses:
        index = _ADDRESS.unpack_from(body)[4]
        attributes = read_attributes(body, _ADDRESS.size)
        # IFA_ADDRESS is the other end's on a point-to-point link.
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS) or b""
        if len(address) == 4:
            address = _MAPPED + address
        if len(address) == 16:
            # Several links may have it; one that is up will do.
            found[address] = found.get(address, False) or index in up
    return Network(found, loopback)


class Lookout:
    """Sees the networks of namespaces, which it calls by their cookies. One thread may use it."""

    def __init__(self) -> None:
        """Raises OSError: no privilege, or no namespaces any more."""
        with contextlib.ExitStack() as opened:
            self._room = Room()
            opened.callback(self._room.close)
            with self._room.entered():
                self._asking = opened.enter_context(self._open())
                self._listening = opened.enter_context(self._open())
            # Else a list is of the room's own (inet_dump_ifaddr() in net/ipv4/devinet.c).
            self._asking.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
            self._listening.setblocking(False)
            self._hears = self._listen()
            self._cookies: dict[int, int] = {}  # by number
            opened.pop_all()

    @staticmethod
    def _open() -> socket.socket:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)

    def _listen(self) -> bool:
        try:
            self._listening.setsockopt(_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID, 1)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            return False  # it takes CAP_NET_BROADCAST, which nothing else of ours does
        # A socket without a port is passed over.
        self._listening.bind((0, 0))
        for group in (_RTNLGRP_LINK, _RTNLGRP_IPV4_IFADDR, _RTNLGRP_IPV6_IFADDR):
            self._listening.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        return True

    def close(self) -> None:
        self._asking.close()
        self._listening.close()
        self._room.close()

    def fileno(self) -> int:
        """Readable when there is something to hear."""
        return self._listening.fileno()

    @property
    def hears(self) -> bool:
        """Can it hear of changes?"""
        return self._hears

    @property
    def is_full(self) -> bool:
        """It has seen so many namespaces, most of them gone by now, that a new one is better."""
        return self._room.is_full

    def admit(self, cookie: int, path: str) -> bool:
        """From now on the namespace with this cookie can be looked at, if it is at `path`. Raises OSError."""
        number = self._room.number(cookie)
        if number is None:
            number = self._room.admit(cookie, path)
        if number is None:
            return False
        self._cookies[number] = cookie
        return True

    def hear(self) -> set[int]:
        """In which of the admitted namespaces links or addresses have changed. Never waits. There may be more
        to hear."""
        found: set[int] = set()
        for _ in range(_HEARD_AT_ONCE):
            try:
                _, extra, _, _ = self._listening.recvmsg(_LARGEST, 64)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # There was more than there was room for.
                found.update(self._cookies.values())
                continue
            for level, kind, value in extra:
                if (level, kind) == (_SOL_NETLINK, _NETLINK_LISTEN_ALL_NSID):
                    cookie = self._cookies.get(_NUMBER.unpack(value[: _NUMBER.size])[0])
                    if cookie is not None:
                        found.add(cookie)
        return found

    def look(self, cookie: int) -> Network | None:
        """What a namespace that was admitted looks like now; None if it has gone. Raises OSError."""
        number = self._room.number(cookie)
        if number is None:
            return None
        try:
            for _ in range(_ATTEMPTS):
                try:
                    return self._look(number)
                except _ChangedError:
                    continue
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV):
                return None  # nobody has this number
            raise

    def _look(self, number: int) -> Network:
        head = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        mask = _pack_attribute(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        request = head + _pack_attribute(_IFLA_TARGET_NETNSID, number) + mask
        links = self._list(_RTM_GETLINK, _RTM_NEWLINK, request)
        addresses: list[bytes] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            head = _ADDRESS.pack(family, 0, 0, 0, 0)
            request = head + _pack_attribute(_IFA_TARGET_NETNSID, number)
            addresses += self._list(_RTM_GETADDR, _RTM_NEWADDR, request)
        return assemble(links, addresses)

    def _list(self, kind: int, wanted: int, body: bytes) -> list[bytes]:
        """Bodies of the messages that a request for a list is answered with."""
        head = _HEAD.pack(_HEAD.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0)
        self._asking.send(head + body)
        found: list[bytes] = []
        changed = False
        while True:
            for answer, flags, content in split_messages(self._asking.recv(_LARGEST)):
                changed |= bool(flags & _NLM_F_DUMP_INTR)
                if answer in (_NLMSG_ERROR, _NLMSG_DONE):
                    number = _NUMBER.unpack_from(content)[0] if len(content) >= _NUMBER.size else 0
                    if number < 0:
                        raise OSError(-number, os.strerror(-number))
                    if changed:
                        raise _ChangedError
                    return found
                if answer == wanted:
                    found.append(content)


def _pack_attribute(kind: int, number: int) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + _NUMBER.size, kind) + _NUMBER.pack(number)


MOST_NAMESPACES = ROOM_NAMESPACES // 2
"""So many can be looked at, and others come and go, before a lookout is full."""
