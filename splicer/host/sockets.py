# SPDX-License-Identifier: Apache-2.0
"""TCP sockets of the host, found by address or by process (sock_diag(7), proc(5)); whoever they belong to."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from splicer.host.namespaces import Directory, entered

# include/uapi/linux/sock_diag.h, inet_diag.h, netlink.h
_SOCK_DIAG, _BY_FAMILY, _REQUEST, _ERROR = 4, 20, 1, 2
_NO_COOKIE = b"\xff" * 8
_CGROUP_ID = 21
_HEAD = struct.Struct("=IHHII")
_STATES = {1: "ESTABLISHED", 2: "SYN_SENT", 3: "SYN_RECV", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 6: "TIME_WAIT"}
_STATES |= {7: "CLOSE", 8: "CLOSE_WAIT", 9: "LAST_ACK", 10: "LISTEN", 11: "CLOSING"}
_LISTEN = 10
_SOCKET = "socket:["


@dataclass(frozen=True)
class Endpoint:
    """An address, IPv4 ones never mapped, and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Socket:
    """A TCP socket: its two addresses, TCP's state in words, the cookie of its network namespace and a path
    of that, its inode, and the id of the cgroup that it was made in, 0 if the kernel does not tell."""

    local: Endpoint
    remote: Endpoint
    state: str
    netns: int
    path: str
    inode: int
    cgroup: int = 0


Ends = tuple[Endpoint, Endpoint]
"""Local and remote."""


def read_endpoint(text: str) -> Endpoint:
    """`10.0.0.1:80`, `[::1]:80` or `::1:80`. Raises ValueError."""
    address, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(text)
    return Endpoint(_unmap(ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))), int(port))


def _unmap(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def find(wanted: Collection[Ends], directory: Directory) -> dict[Ends, list[Socket]]:
    """The sockets with these addresses (local, remote), in any network namespace that can be found."""
    found: dict[Ends, list[Socket]] = {ends: [] for ends in wanted}
    for path in directory.walk():
        # The namespace may be gone by now.
        with contextlib.suppress(OSError), entered(path) as cookie, _open_link() as link:
            for ends, sockets in found.items():
                if (each := _ask(link, *ends, cookie, path)) is not None and each.state != _STATES[_LISTEN]:
                    sockets.append(each)
    return found


def can_find() -> bool:
    """Does the kernel tell (sock_diag with its module for TCP)? Where it does not, nothing is ever found."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            with _open_link() as link:
                own = Endpoint(*listener.getsockname())
                return _ask(link, own, Endpoint("127.0.0.1", 1), 0, "") is not None
        except OSError:
            return False


def _open_link() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)


def _ask(link: socket.socket, local: Endpoint, remote: Endpoint, cookie: int, path: str) -> Socket | None:
    """The socket with these addresses in the namespace of the link, else a listener that would accept such a
    connection, or None."""
    version = ipaddress.ip_address(local.address).version
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
    request += struct.pack(">HH", local.port, remote.port)
    request += _pack(local.address) + _pack(remote.address) + bytes(4) + _NO_COOKIE
    link.send(_HEAD.pack(_HEAD.size + len(request), _BY_FAMILY, _REQUEST, 1, 0) + request)
    reply = link.recv(65536)
    size, kind, _, _, _ = _HEAD.unpack_from(reply)
    if kind == _ERROR:
        number = -struct.unpack_from("=i", reply, _HEAD.size)[0]
        if number == errno.ENOENT:
            return None
        raise OSError(number, os.strerror(number))
    body = reply[_HEAD.size : size]
    state, inode = body[1], struct.unpack_from("=I", body, 68)[0]
    cgroup = next(
        (struct.unpack("=Q", value)[0] for kind, value in _walk(body[72:]) if kind == _CGROUP_ID), 0
    )
    return Socket(local, remote, _STATES.get(state, str(state)), cookie, path, inode, cgroup)


def _pack(address: str) -> bytes:
    return ipaddress.ip_address(address).packed.ljust(16, b"\0")


def _walk(attributes: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if length < 4:
            return
        yield kind & 0x3FFF, attributes[at + 4 : at + length]
        at += (length + 3) & ~3


def list_of_process(pid: int, proc: str = "/proc") -> list[Socket]:
    """The TCP connections that a process has a descriptor of. Raises OSError if there is no such process, or
    it may not be looked at."""
    inodes = set(_list_inodes(f"{proc}/{pid}/fd"))
    if not inodes:
        return []
    path = f"{proc}/{pid}/ns/net"
    with entered(path) as cookie:
        pass
    found = []
    for name in ("tcp", "tcp6"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"{proc}/{pid}/net/{name}", encoding="ascii") as file,
        ):
            next(file, None)
            for line in file:
                fields = line.split()
                inode, state = int(fields[9]), int(fields[3], 16)
                if inode in inodes and state != _LISTEN:
                    local, remote = _read_hex(fields[1]), _read_hex(fields[2])
                    found.append(Socket(local, remote, _STATES.get(state, fields[3]), cookie, path, inode))
    return found


def _list_inodes(directory: str) -> Iterator[int]:
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            target = os.readlink(f"{directory}/{name}")
            if target.startswith(_SOCKET):
                yield int(target[len(_SOCKET) : -1])


def _read_hex(text: str) -> Endpoint:
    """`0100007F:1F90`: words in host byte order, and the port."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return Endpoint(_unmap(ipaddress.ip_address(packed)), int(port, 16))


def find_owner(inode: int, proc: str = "/proc") -> int:
    """A process that has a descriptor of the socket with this inode; 0 if none is found."""
    if not inode:
        return 0
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if inode in _list_inodes(f"{proc}/{name}/fd"):
                    return int(name)
    return 0
