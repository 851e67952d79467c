# SPDX-License-Identifier: Apache-2.0
"""A hostile peer: an unprivileged user in a user and network namespace of its own, where it may do anything.

Run as a script like peer.py and with its operations; those added here make sockets that claim to be an end of
somebody else's connection. A forged end is made with TCP_REPAIR, or by a real handshake with a server that
this process plays itself, packet by packet, so that both sequence numbers are of its choice.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import peer
from connection import Connection, Overdue

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_DUMPABLE = 4
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
RECV_QUEUE, SEND_QUEUE = 1, 2
REPAIR_OFF_WITHOUT_PROBE = -1
ETH_P_IP = 0x0800
FIN, SYN, RST, PUSH, ACK = 1, 2, 4, 8, 16
NEAR, BEYOND = "02:00:00:00:00:01", "02:00:00:00:00:02"
DOOR = "10.66.0.1"
PATIENCE = 0.2  # seconds
LARGEST_WRITE = 1024  # bytes that go into a queue under repair at once


def become_hostile() -> None:
    """Give up root, then become root of a user namespace with a network namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # without it /proc/self belongs to root
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
    Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")


def _run_ip(lines: list[str]) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=False, capture_output=True
    )
    if done.returncode:
        raise OSError(errno.EINVAL, done.stderr)


def _sum_up(data: bytes) -> int:
    """The checksum of RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Puppet:
    """A TCP server that is no socket: it acknowledges everything and says what it is told."""

    def __init__(self, interface: str) -> None:
        self._wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
        self._wire.bind((interface, ETH_P_IP))

    def hear(self, patient: bool = True) -> tuple[bytes, int, int, int, int, int, int] | None:
        """The next TCP segment: Ethernet and IP addresses, ports, sequence numbers, flags, bytes of data.
        None if there is none, within a while if `patient`."""
        while True:
            if not select.select([self._wire], [], [], PATIENCE if patient else 0.0)[0]:
                return None
            frame = self._wire.recv(65536)
            if frame[12:14] == b"\x08\0" and frame[23] == socket.IPPROTO_TCP:
                break
        start = 14 + 4 * (frame[14] & 15)
        source, target, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", frame, start)
        size = struct.unpack_from("!H", frame, 16)[0] - (start - 14) - 4 * (offset >> 4)
        return frame[:14] + frame[26:34], source, target, seq, ack, flags, size

    def say(self, heard: bytes, ports: tuple[int, int], seq: int, ack: int, flags: int, data: bytes) -> None:
        """Answer a segment whose addresses are `heard`."""
        source, target = heard[18:22], heard[14:18]
        tcp = struct.pack(
            "!HHIIBBHHH", *ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, flags, 64000, 0, 0
        )
        pseudo = source + target + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp) + len(data))
        tcp = tcp[:16] + struct.pack("!H", _sum_up(pseudo + tcp + data)) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(data), 0, 0, 64, socket.IPPROTO_TCP, 0)
        ip += source + target
        ip = ip[:10] + struct.pack("!H", _sum_up(ip)) + ip[12:]
        self._wire.send(heard[6:12] + heard[0:6] + heard[12:14] + ip + tcp + data)


class Forger(peer.Peer):
    """The operations of a peer, and those of somebody who means harm."""

    def __init__(self) -> None:
        super().__init__()
        self._pretended: dict[str, tuple[Puppet, bytes, tuple[int, int], int, int]] = {}

    def lay_cable(self, beyond: list[str]) -> None:
        """A cable with both ends here, and these addresses beyond it."""
        lines = [
            "link set lo up",
            f"link add near address {NEAR} type veth peer name beyond address {BEYOND}",
            "link set near up",
            "link set beyond up",
            f"addr add {DOOR}/32 dev near",
        ]
        for address in beyond:
            lines.append(f"route add {address} dev near")
            lines.append(f"neigh add {address} lladdr {BEYOND} dev near nud permanent")
        _run_ip(lines)

    def claim(self, address: str) -> None:
        """Have an address that is somebody else's."""
        _run_ip([f"addr add {address}/32 dev near"])

    def forge(
        self,
        conn: str,
        local: list[Any],
        remote: list[Any],
        seqs: list[int],
        amounts: list[int] | None = None,
        keep_repair: bool = False,
    ) -> None:
        """An ESTABLISHED socket out of nothing. `seqs` are the first sequence numbers sent and received as
        bpf/socket.h counts them, `amounts` how many bytes it is to have sent and received since."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((local[0], local[1]))
        for queue, seq in ((SEND_QUEUE, seqs[0]), (RECV_QUEUE, seqs[1])):
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("I", seq & 0xFFFFFFFF))
        sock.connect((remote[0], remote[1]))
        self._connections[conn] = Connection(sock, 0, 1)
        sent, received = amounts or [0, 0]
        self.pretend_sent(conn, sent)
        self.feed(conn, received)
        if not keep_repair:
            self.unrepair(conn)
        sock.setblocking(False)

    def unrepair(self, conn: str) -> None:
        self._connections[conn].sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)

    def pretend_sent(self, conn: str, count: int) -> None:
        """Under repair: have sent `count` bytes."""
        self._fill(conn, SEND_QUEUE, count)

    def feed(self, conn: str, count: int) -> None:
        """Under repair: have `count` bytes waiting to be read."""
        self._fill(conn, RECV_QUEUE, count)

    def _fill(self, conn: str, queue: int, count: int) -> None:
        sock = self._connections[conn].sock
        if count:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        while count > 0:
            count -= sock.send(b"x" * min(count, LARGEST_WRITE))

    def read_many(self, conn: str, times: int) -> int:
        """Feed and read one byte, so many times; how often it worked. Leaves the socket out of repair."""
        sock = self._connections[conn].sock
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        self.feed(conn, times)
        self.unrepair(conn)
        return sum(len(sock.recv(1)) for _ in range(times))

    def answer_syns(self, clients: list[str], ports: list[int], service: int, seconds: float = 10.0) -> int:
        """A listener of this namespace at the service's port answers SYNs from these addresses, from all
        ports of the range each; how many were sent. Fails if it takes longer than `seconds`."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind((DOOR, service))
            door.listen(4096)
            hardware = bytes.fromhex(f"{BEYOND}{NEAR}".replace(":", ""))
            puppet, count, deadline = Puppet("beyond"), 0, time.monotonic() + seconds
            for client in clients:
                # As if this had been heard from the listener.
                heard = hardware + b"\x08\0" + socket.inet_aton(DOOR) + socket.inet_aton(client)
                for port in range(ports[0], ports[1]):
                    if time.monotonic() > deadline:
                        raise Overdue(count)
                    puppet.say(heard, (port, service), 1000, 0, SYN, b"")
                    count += 1
            time.sleep(0.05)
            return count

    def shake_hands(self, conn: str, local: list[Any], remote: list[Any], seqs: list[int]) -> None:
        """Connect to a puppet: a real handshake, after which the socket was never under repair; `seqs` as in
        `forge`."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((local[0], local[1]))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack("I", seqs[0] & 0xFFFFFFFF))
        self._connections[conn] = Connection(sock, 0, 1)
        self.unrepair(conn)
        puppet = Puppet("beyond")
        sock.setblocking(False)
        sock.connect_ex((remote[0], remote[1]))
        deadline = time.monotonic() + 5
        while True:
            heard = puppet.hear()
            if heard is not None and heard[5] & (SYN | ACK) == SYN and heard[2] == remote[1]:
                break
            if time.monotonic() > deadline:
                raise Overdue("no SYN")
        ports = (remote[1], local[1])
        puppet.say(heard[0], ports, seqs[1] - 1, heard[3] + 1, SYN | ACK, b"")
        if not select.select([], [sock], [], 3.0)[1] or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise Overdue("no handshake")
        self._pretended[conn] = (puppet, heard[0], ports, seqs[1], heard[3] + 1)

    def confirm(self, conn: str) -> int:
        """The puppet acknowledges all that the forged connection has sent to it; how many bytes came."""
        puppet, heard, ports, seq, ack = self._pretended[conn]
        before = ack
        while (segment := puppet.hear(patient=False)) is not None:
            if (segment[1], segment[2]) == (ports[1], ports[0]) and segment[3] == ack & 0xFFFFFFFF:
                ack += segment[6]
        puppet.say(heard, ports, seq, ack, ACK, b"")
        self._pretended[conn] = (puppet, heard, ports, seq, ack)
        return ack - before

    def be_told(self, conn: str, count: int, times: int = 1, timeout: float = 3.0) -> int:
        """The puppet says `count` bytes, so many times, and the forged connection reads each."""
        sock, total = self._connections[conn].sock, 0
        for _ in range(times):
            puppet, heard, ports, seq, ack = self._pretended[conn]
            puppet.say(heard, ports, seq, ack, PUSH | ACK, b"p" * count)
            self._pretended[conn] = (puppet, heard, ports, seq + count, ack)
            if not select.select([sock], [], [], timeout)[0]:
                raise Overdue(total)
            total += len(sock.recv(count))
        return total


if __name__ == "__main__":
    become_hostile()
    peer.Peer = Forger  # type: ignore[misc]
    peer.serve()
