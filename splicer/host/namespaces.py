# SPDX-License-Identifier: Apache-2.0
"""Network namespaces by cookie: the number that BPF programs see, unique until the host is booted again."""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from splicer.errors import KERNELS, UNSUPPORTED, SplicerError

SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, Linux 5.14
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # include/uapi/linux/sockios.h, if.h
_RTM_NEWNSID = 88  # include/uapi/linux/rtnetlink.h
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4  # include/uapi/linux/netlink.h
# So many namespaces have numbers in a room at most.
ROOM_NAMESPACES = 1024
_OWN = "/proc/thread-self/ns/net"
_NAMED = ("/run/netns", "/var/run/docker/netns")
_libc = ct.CDLL(None, use_errno=True)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) < 0:
        number = ct.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def read_own_cookie() -> int:
    """Cookie of the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            value: bytes = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            raise SplicerError(
                "this kernel has no network namespace cookies (SO_NETNS_COOKIE)",
                hint=f"splicer needs {KERNELS}",
                exit_code=UNSUPPORTED,
            ) from error
    return int(struct.unpack("=Q", value)[0])


def leave_for_empty() -> None:
    """Move the calling thread into a network namespace of its own, with nothing but a loopback device that is
    up. It goes away with the last that is in it. Raises OSError: no privilege, or no namespaces any more."""
    if _libc.unshare(_CLONE_NEWNET) < 0:
        number = ct.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # struct ifreq; _IFF_UP is all that there is to set.
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


@contextlib.contextmanager
def entered(path: str) -> Iterator[int]:
    """Move the calling thread into the namespace at `path`, for the block only; gives its cookie.

    Raises OSError if the namespace is gone or may not be entered.
    """
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(target)
        finally:
            os.close(target)
        try:
            yield read_own_cookie()
        finally:
            _enter(own)
    finally:
        os.close(own)


def read_cookie(path: str) -> int:
    """Cookie of the namespace at `path`. Raises OSError if it is gone or may not be entered."""
    with entered(path) as cookie:
        return cookie


def read_addresses(path: str) -> tuple[str, ...]:
    """Addresses in the namespace at `path`, IPv4 first, without loopback and link-local ones.

    Raises OSError if it is gone or may not be entered.
    """
    import psutil

    # getifaddrs(3) asks by a netlink socket of its own, which belongs to the calling thread's namespace. On a
    # point-to-point link it is this end's address.
    with entered(path):
        interfaces = psutil.net_if_addrs()
    found = {
        ipaddress.ip_address(each.address)
        for addresses in interfaces.values()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    }
    usable = [address for address in found if not (address.is_loopback or address.is_link_local)]
    return tuple(str(address) for address in sorted(usable, key=lambda each: (each.version, int(each))))


class Room:
    """An empty network namespace of our own, in which others have numbers (RTM_NEWNSID).

    A number goes away with the namespace that it is of, which it keeps nobody from. No number is given twice.
    The room goes away when it is closed, or with the process.
    """

    def __init__(self) -> None:
        """Raises OSError: no privilege, or no namespaces any more."""
        self._own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        self._numbers: dict[int, int] = {}
        self._last = 0
        try:
            if _libc.unshare(_CLONE_NEWNET) < 0:
                number = ct.get_errno()
                raise OSError(number, f"unshare: {os.strerror(number)}")
            try:
                self._fd = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
                self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            finally:
                _enter(self._own)
        except OSError:
            os.close(self._own)
            raise

    def close(self) -> None:
        self._netlink.close()
        os.close(self._fd)
        os.close(self._own)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the thread that made the room into it, for the block only."""
        _enter(self._fd)
        try:
            yield
        finally:
            _enter(self._own)

    @property
    def is_full(self) -> bool:
        """So many namespaces have a number, most of them gone by now, that a new room is better."""
        return len(self._numbers) >= ROOM_NAMESPACES

    def number(self, cookie: int) -> int | None:
        """The number that the namespace has here, or has had when it was still there; None: it has none."""
        return self._numbers.get(cookie)

    def admit(self, cookie: int, path: str) -> int | None:
        """Give a number to the namespace with this cookie, if it is at `path`; else None.

        Raises OSError if the kernel refuses the number.
        """
        try:
            target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if self._read_cookie(target) != cookie:
                return None
            self._last += 1
            self._give(self._last, target)
        finally:
            os.close(target)
        self._numbers[cookie] = self._last
        return self._last

    def _read_cookie(self, fd: int) -> int | None:
        try:
            _enter(fd)
        except OSError:
            return None
        try:
            return read_own_cookie()
        finally:
            _enter(self._own)

    def _give(self, number: int, fd: int) -> None:
        # struct rtgenmsg, then NETNSA_NSID and NETNSA_FD (include/uapi/linux/net_namespace.h). pyroute2 has
        # no word for it, and would take half a second to load.
        body = struct.pack("=B3x HHi HHI", socket.AF_UNSPEC, 8, 1, number, 8, 3, fd)
        head = struct.pack("=IHHII", 16 + len(body), _RTM_NEWNSID, _NLM_F_REQUEST | _NLM_F_ACK, number, 0)
        self._netlink.send(head + body)
        [error] = struct.unpack_from("=i", self._netlink.recv(4096), 16)  # struct nlmsgerr
        if error:
            raise OSError(-error, f"RTM_NEWNSID: {os.strerror(-error)}")


class Directory:
    """Finds the path of a namespace by its cookie. Holds no descriptors, so it keeps no namespace alive."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}

    def _learn(self, path: str) -> int | None:
        try:
            with entered(path) as cookie:
                self._paths[cookie] = path
                return cookie
        except OSError:
            return None

    def _candidates(self) -> Iterator[str]:
        """One path for each namespace: own, named ones, then any process in it."""
        seen: set[int] = set()
        paths = [_OWN.replace("thread-self", "self")]
        for directory in _NAMED:
            with contextlib.suppress(OSError):
                paths += [os.path.join(directory, name) for name in os.listdir(directory)]
        paths += [f"/proc/{name}/ns/net" for name in os.listdir("/proc") if name.isdigit()]
        for path in paths:
            with contextlib.suppress(OSError):
                inode = os.stat(path).st_ino
                if inode not in seen:
                    seen.add(inode)
                    yield path

    def walk(self) -> Iterator[str]:
        """A path of each namespace that a process is in or that has a name."""
        for path in self._candidates():
            if self._learn(path) is not None:
                yield path

    def find(self, cookie: int, pids: Iterable[int] = ()) -> str | None:
        """A path whose namespace has this cookie now, or None. `pids` are processes likely to be in it."""
        known = self._paths.get(cookie)
        if known and self._learn(known) == cookie:
            return known
        self._paths.pop(cookie, None)
        for pid in pids:
            path = f"/proc/{pid}/ns/net"
            if pid and self._learn(path) == cookie:
                return path
        for path in self._candidates():
            if self._learn(path) == cookie:
                return path
        return None
