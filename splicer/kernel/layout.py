# SPDX-License-Identifier: Apache-2.0
"""The structures of bpf/types.h as bytes. Everything is in host byte order; tests compare the two."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from splicer.model import REASON_NAMES

STATE_PAIRED, STATE_SPLICED, STATE_DRAINING, STATE_LEAVING = 1, 2, 3, 4
REASON_COLD = 1
CLIENT, SERVER = 0, 1
MODES = {"off": 0, "adaptive": 1, "eager": 2}

COUNTERS = (
    "paired",
    "closed",
    "spliced",
    "drained",
    "redirected_bytes",
    "redirected_messages",
    "passed_messages",
    "rescued",
    "events_lost",
    "orphans",
    "looks",
)
COUNT_REFUSED = len(COUNTERS)
"""Index of the first of one counter per reason."""
COUNT_PLAIN = COUNT_REFUSED + len(REASON_NAMES)
"""Index of the first of as many more: bytes of closed connections that TCP has carried."""
COUNT_WENT_BACK = COUNT_PLAIN + len(REASON_NAMES)
"""Index of the first of as many more: connections that went back to plain TCP, by why."""
NR_COUNTERS = COUNT_WENT_BACK + len(REASON_NAMES)


class EventType(enum.IntEnum):
    ADOPT = 1
    DRAIN = 2
    WATCH = 3


class Look(enum.IntFlag):
    """What has to be done about a pair that watch has looked at."""

    AGAIN = 1
    RESCUED = 2
    OUTDATED = 4
    TALKS = 8


class Question(enum.IntEnum):
    """What watch is asked."""

    NOTHING = 0
    POLICY = 1
    WHO_TALKED = 2
    SENT = 3
    RECEIVED = 4
    DEVICE = 5
    MARK = 6


class Fact(enum.IntEnum):
    """What measure is asked about an end, besides what waits unread."""

    BITS = 1
    STATE = 2
    FILE_FLAGS = 3
    MANNER = 4
    RCVLOWAT = 5
    PEEK_OFF = 6
    PACING = 7
    WAITER = 8
    HABIT = 9
    SEGMENTS = 10


class FactBit(enum.IntFlag):
    """What a socket is, or has."""

    THERE = 1
    FILE = 2
    KERNEL = 4
    MPTCP = 8
    ZEROCOPY = 16
    TIMESTAMPS = 32
    ULP = 64
    REPAIR = 128
    INQ = 256
    FILTER = 512
    USER_DATA = 1024
    TAKEN_OVER = 2048


class EndFlag(enum.IntFlag):
    """What is remembered of an end."""

    IN_MAP = 1
    FIT = 2
    PARTIAL = 4
    RESTED = 8
    LEFT = 16
    MOVED = 32
    SLEEPY = 64
    BLOCKS = 128
    RELIANT = 256
    SLEEPLESS = 512


class TapChoice(enum.IntEnum):
    """Does `splicer tap` want a connection?"""

    UNDECIDED = 0
    WANTED = 1
    UNWANTED = 2


LOOK_BITS = 4
WATCH_PAIRS = 8
"""So many pairs does one run of watch look at."""


ANNOUNCED_BY_NAME, ANNOUNCED_BY_WALK = 1, 2
"""Who has to put a pair in: enlist, or adopt since enlist finds no way to it."""


class EnlistTask(enum.IntEnum):
    """What enlist shall do about a pair."""

    NOTHING = 0
    TRY = 1
    TRY_EASED = 2
    LOOK = 3
    GIVE_UP = 4
    HAND_OVER = 5


class EnlistOutcome(enum.IntEnum):
    """What came of it."""

    LATER = 0
    IN = 1
    OVER = 2
    WALK = 3


ENLIST_PAIRS = 128
"""So many requests are in one packet for enlist."""
ENLIST_HEAD = struct.Struct("=16x 2I")
"""Of struct enlist_batch: whose turn it is, and how many requests there are."""
ENLIST_REQUEST = struct.Struct("=Q 2I 2I")
"""Name, the numbers of the ends' network namespaces, task and outcome."""
ENLIST_SIZE = ENLIST_HEAD.size + ENLIST_PAIRS * ENLIST_REQUEST.size


class CensusState(enum.IntEnum):
    """How far the search for connections that are older than the programs has come."""

    NONE = 0
    LISTS = 1
    JOINS = 2
    DONE = 3


class OlderFlag(enum.IntFlag):
    """What is known of a socket that census has listed."""

    OUTSIDE = 1
    REPAIRED = 2
    KNOWN = 4


class OlderOutcome(enum.IntEnum):
    """What came of joining two sockets."""

    JOINED = 0
    GONE = 1
    FULL = 2
    UNMARKED = 3


OLDER_SOCKET = struct.Struct("=3Q 2I Q")
OLDER = struct.Struct("=4Q")
OLDER_JOINED = struct.Struct("=2Q")

_ADDRESS = "4I 4I Q I I"
_END = _ADDRESS + " Q Q Q I I H 2x I I I"
_END_SIZE = struct.calcsize("=" + _END)
_DIRECTION = "4Q 6I 2H I"
PAIR = struct.Struct("=2I I I " + _END + " " + _END + " 3Q 2I 8B I 4x " + _DIRECTION + " " + _DIRECTION)
MEASURE_SERVER, MEASURE_TCP, MEASURE_ANY, MEASURE_FACT_SHIFT = 1, 2, 4, 8
MEASURE_REQUEST = struct.Struct("=2Q")
"""struct measure_request: a name, and which bytes at which end."""
WATCH_REQUEST_SIZE = 8 * (WATCH_PAIRS + 1)
"""struct watch_request in bytes: names, and at last a Question."""
# Of a key of the SOCKHASH: network namespace and name.
END_KEY_OWNER = struct.Struct("=8x Q Q")
SEED = struct.Struct("=" + _ADDRESS + " 4Q 2I H B x I")
SETTINGS = struct.Struct("=18I Q")
RULE_KEY = struct.Struct("=Q 2I")
RULE = struct.Struct("=3Q")
NOTHING_SAID = (1 << 63) - 1
NETWORK_KEY = struct.Struct("=I 16s")
NETWORK = struct.Struct("=I")
TRAFFIC_KEY = struct.Struct("=2Q")
TRAFFIC = struct.Struct("=3Q")
VOLUME_KEY = struct.Struct("=3Q")
VOLUME = struct.Struct("=2Q")
RECENT_VOLUME = struct.Struct("=3Q 2Q")
TALLY_PAIRS = 12
"""So many connections does one run of tally look at."""
TALLY_REQUEST_SIZE = 8 * TALLY_PAIRS
"""struct tally_request in bytes: names."""
EVENT = struct.Struct("=2I Q 2Q 2I")
TAP_PORTS = 8
TAP_SETTINGS = struct.Struct(f"=3I {TAP_PORTS}I 4x")
TAP_FLOW = struct.Struct("=2I 2Q 2Q")
TAP_RECORD = struct.Struct("=2Q " + _ADDRESS + " 4I 3B 5x 2Q")
SWEEP = ("adopted", "drained", "to_adopt", "half", "to_drain")

_ADDRESS_FIELDS = 8 + 1 + 2
_CLIENT_PORT = 9
_END_FIELDS = _ADDRESS_FIELDS + 3 + 6
_DIRECTION_FIELDS = 13


def format_endpoint(words: tuple[int, ...], port: int) -> str:
    """`a.b.c.d:port` or `[v6]:port`; an IPv4 address comes as ::ffff:a.b.c.d in four words."""
    if words[:3] == (0, 0, 0xFFFF):
        # By hand: there may be hundreds of thousands.
        number = words[3]
        return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:{port}"
    return f"[{ipaddress.IPv6Address(struct.pack('>4I', *words))}]:{port}"


@dataclass(frozen=True)
class End:
    """One end of a pair: its address and its peer's as it sees them, netns cookie, the id of the cgroup its
    socket was made in, its reader's process id."""

    local: str
    remote: str
    netns: int
    cgroup: int
    reads: int
    tgid: int
    flags: int


@dataclass(frozen=True)
class Direction:
    """What one end sent."""

    redirected_bytes: int
    redirected_messages: int
    passed_messages: int


@dataclass(frozen=True)
class Pair:
    """One entry of the pairs map. Times are CLOCK_MONOTONIC nanoseconds; `announced` is of enum announced, 0
    if it is not. `policy` is the number of the policy that it was decided by, 0 if it was not. Of one that is
    plain, there is no attempt before `retry_ns` (0: none to wait for), `attempts` visits found no quiet
    moment, and `refusals` and `drains` (of late) make pauses longer. `mode` is of MODES."""

    id: tuple[int, int]
    state: int
    reason: int
    client: End
    server: End
    born_ns: int
    changed_ns: int
    announced: int
    client_sends: Direction
    server_sends: Direction
    policy: int = 0
    mode: int = 0
    retry_ns: int = 0
    attempts: int = 0
    drains: int = 0
    refusals: int = 0

    @property
    def name(self) -> int:
        """Both numbers of `id` in one, as they are in memory."""
        return name_connection(*self.id)

    @property
    def is_in_map(self) -> bool:
        return bool((self.client.flags | self.server.flags) & EndFlag.IN_MAP)


def _read_end(fields: tuple[int, ...]) -> End:
    return End(
        local=format_endpoint(fields[0:4], fields[9]),
        remote=format_endpoint(fields[4:8], fields[10]),
        netns=fields[8],
        cgroup=fields[13],
        reads=fields[16],
        tgid=fields[17],
        flags=fields[18],
    )


def _mirror(end: End, server: End) -> End:
    """A client that was not observed yet, as its server sees it: right but for NAT. Its netns is unknown."""
    return dataclasses.replace(end, local=server.remote, remote=server.local)


def read_pair(value: bytes) -> Pair:
    fields = PAIR.unpack(value)
    ends = fields[4:]
    rest = ends[2 * _END_FIELDS :]
    client, server = _read_end(ends[:_END_FIELDS]), _read_end(ends[_END_FIELDS:])
    if not ends[_CLIENT_PORT]:
        client = _mirror(client, server)
    directions = rest[14:]
    return Pair(
        id=(fields[0], fields[1]),
        state=fields[2],
        reason=fields[3],
        client=client,
        server=server,
        born_ns=rest[0],
        changed_ns=rest[1],
        announced=rest[7],
        client_sends=Direction(*directions[0:3]),
        server_sends=Direction(*directions[_DIRECTION_FIELDS : _DIRECTION_FIELDS + 3]),
        policy=rest[4],
        mode=rest[5],
        retry_ns=rest[2] if fields[2] == STATE_PAIRED else 0,
        attempts=rest[9],
        drains=rest[10],
        refusals=rest[11],
    )


@dataclass(frozen=True, slots=True)
class OlderSocket:
    """A socket as census lists it: kernel address, socket cookie, network namespace (cookie), the first
    sequence numbers that it sent and received."""

    sk: int
    cookie: int
    netns: int
    sent: int
    received: int
    flags: OlderFlag


# Of the fields of a seed.
_SEED_SOCKET, _SEED_BORN, _SEED_NAME, _SEED_REASON = 11, 14, slice(15, 17), 17


def name_connection(client_seq: int, server_seq: int) -> int:
    """Both numbers of a name in one, as they are in memory."""
    return int(struct.unpack("=Q", struct.pack("=2I", client_seq, server_seq))[0])


def read_place(seed: bytes) -> bytes | None:
    """The name of the young connection that has this place; None if it is free."""
    fields = SEED.unpack(seed)
    return struct.pack("=2I", *fields[_SEED_NAME]) if fields[_SEED_SOCKET] else None


def find_young(places: Iterable[bytes]) -> dict[bytes, bytes]:
    """Seeds of young connections by name, of those places that are not free."""
    return {name: seed for seed in places if (name := read_place(seed))}


def pack_endpoint(address: str, port: int) -> bytes:
    """An address and a port, as read_addresses() has them. Raises ValueError."""
    parsed = ipaddress.ip_address(address)
    packed = parsed.packed if parsed.version == 6 else b"\0" * 10 + b"\xff\xff" + parsed.packed
    return struct.pack("=4I", *struct.unpack(">4I", packed)) + struct.pack("=I", port)


def read_addresses(value: bytes) -> tuple[bytes, bytes]:
    """Of a pair its client and its server, each as pack_endpoint() of its own side and then of its peer's.
    That of a client that was not observed yet has no ports."""
    client, server = (_pick_end(value, offset) for offset in (16, 16 + _END_SIZE))
    return client, server


def read_seed_end(value: bytes) -> bytes:
    """The same of a seed's server."""
    return _pick_end(value, 0)


def _pick_end(value: bytes, offset: int) -> bytes:
    local, remote = value[offset : offset + 16], value[offset + 16 : offset + 32]
    return local + value[offset + 40 : offset + 44] + remote + value[offset + 44 : offset + 48]


def read_seed(value: bytes) -> Pair:
    """A connection that is too young for an entry in the pairs map, or known never to get one."""
    fields = SEED.unpack(value)
    none = Direction(0, 0, 0)
    server = _read_end((*fields[:_ADDRESS_FIELDS], *[0] * (_END_FIELDS - _ADDRESS_FIELDS)))
    client_seq, server_seq = fields[_SEED_NAME]
    return Pair(
        id=(client_seq, server_seq),
        state=STATE_PAIRED,
        reason=fields[_SEED_REASON] or REASON_COLD,
        client=End(server.remote, server.local, 0, 0, 0, 0, 0),
        server=server,
        born_ns=fields[_SEED_BORN],
        changed_ns=fields[_SEED_BORN],
        announced=0,
        client_sends=none,
        server_sends=none,
    )


# Fields of many pairs, one after the other, read column by column: quicker than pair by pair by far.
_STATE = 8
_STANDING = struct.Struct("=2I")
_END_TGID = (16 + 84, 16 + _END_SIZE + 84)
_END_FLAGS = (16 + 88, 16 + _END_SIZE + 88)
_END_CGROUP = (16 + 64, 16 + _END_SIZE + 64)
_DIRECTIONS = 16 + 2 * _END_SIZE + 48
_REDIRECTED = tuple(_DIRECTIONS + place for place in (0, 8, 64, 72))
_END_LOCAL_IP = (16, 16 + _END_SIZE)
_END_NETNS = (16 + 32, 16 + _END_SIZE + 32)

Place = tuple[int, int, int]
"""Where an end is: its network namespace (cookie), and its address as two numbers of no other meaning."""


def pack_place(netns: int, address: bytes) -> Place:
    """The place with this address: 16 bytes in network byte order, an IPv4 one as ::ffff:a.b.c.d."""
    upper, lower = struct.unpack("=2Q", struct.pack("=4I", *struct.unpack(">4I", address)))
    return netns, upper, lower


def _read_column(values: memoryview, kind: str, offset: int) -> list[int]:
    size = struct.calcsize(kind)
    words = values.cast(kind)  # type: ignore[call-overload]  # it wants a literal
    column: list[int] = words[offset // size :: PAIR.size // size].tolist()
    return column


def read_standing(value: bytes) -> tuple[int, int]:
    """State and reason of a pair."""
    return _STANDING.unpack_from(value, _STATE)


def read_standings(values: memoryview) -> Iterator[tuple[int, int]]:
    """The same of pairs, given one after the other."""
    return zip(_read_column(values, "I", _STATE), _read_column(values, "I", _STATE + 4), strict=True)


def read_names(values: memoryview) -> list[int]:
    """The names (both numbers in one) of pairs, given one after the other."""
    return _read_column(values, "Q", 0)


def read_watched(values: memoryview) -> list[int]:
    """The names of those that are spliced or on their way back."""
    states = _read_column(values, "I", _STATE)
    return list(itertools.compress(read_names(values), map(STATE_PAIRED.__lt__, states)))


def read_whereabouts(values: memoryview) -> set[tuple[int, int]]:
    """The network namespaces (cookies) of the ends of those pairs, and the process that read last there."""
    return read_ends(values, map(STATE_PAIRED.__lt__, _read_column(values, "I", _STATE)))


def read_amounts(values: memoryview) -> tuple[list[int], Iterator[tuple[int, ...]]]:
    """The states of those pairs, and of each the cgroups (ids) of client and server, and the bytes and
    messages that were redirected from the client and from the server."""
    columns = (_read_column(values, "Q", offset) for offset in (*_END_CGROUP, *_REDIRECTED))
    return _read_column(values, "I", _STATE), zip(*columns, strict=True)


def read_in_map(values: memoryview) -> list[bool]:
    """Is an end of each of those pairs in the SOCKHASH?"""
    client, server = (_read_column(values, "I", offset) for offset in _END_FLAGS)
    return [bool((mine | other) & EndFlag.IN_MAP) for mine, other in zip(client, server, strict=True)]


def read_ends(values: memoryview, chosen: Iterable[object]) -> set[tuple[int, int]]:
    """The network namespaces (cookies) of the ends of the chosen ones of those pairs, and the process that
    read last there."""
    chosen = list(chosen)
    return {
        place
        for netns, tgid in zip(_END_NETNS, _END_TGID, strict=True)
        for place in itertools.compress(
            zip(_read_column(values, "Q", netns), _read_column(values, "I", tgid), strict=True), chosen
        )
    }


def read_readers(values: memoryview) -> list[tuple[int, int]]:
    """The processes that read last at each pair's client and server, 0 if none has."""
    client, server = (_read_column(values, "I", offset) for offset in _END_TGID)
    return list(zip(client, server, strict=True))


def read_tenants(values: memoryview) -> set[tuple[int, int]]:
    """The cgroups (ids) that the ends of these pairs were made in, each with a process that read last."""
    return {
        found
        for cgroup, tgid in zip(_END_CGROUP, _END_TGID, strict=True)
        for found in zip(_read_column(values, "Q", cgroup), _read_column(values, "I", tgid), strict=True)
        if all(found)
    }


def read_places(values: memoryview) -> list[tuple[int, Place, Place]]:
    """State of each pair, and the places of its client and server."""
    states = _read_column(values, "I", _STATE)
    client, server = (
        zip(
            _read_column(values, "Q", netns),
            _read_column(values, "Q", address),
            _read_column(values, "Q", address + 8),
            strict=True,
        )
        for netns, address in zip(_END_NETNS, _END_LOCAL_IP, strict=True)
    )
    return list(zip(states, client, server, strict=True))


@dataclass(frozen=True)
class Event:
    """A record of the ring buffer; netns cookies and reader process ids are (client, server). `name` is the
    pair's, 0 if the event is about a process."""

    type: int
    reason: int
    name: int
    netns: tuple[int, int]
    tgid: tuple[int, int]


def read_event(record: bytes) -> Event:
    kind, reason, name, *rest = EVENT.unpack_from(record)
    return Event(kind, reason, name, (rest[0], rest[1]), (rest[2], rest[3]))


@dataclass(frozen=True)
class KernelSettings:
    """struct settings. Sizes in bytes; `stopping` is 0 or the number of the reason to drain everything;
    `policy` is another number after every change of policy; `has_rules` holds a bit for each kind of rule;
    `walking` if there is no enlist; `census` is of CensusState, and `cgroup` the id of the cgroup that it is
    about, 0 for all; `switched` as probes.find_switch_marks() found it."""

    mode: int
    allow_blocking: bool
    splicing: bool
    stopping: int
    hot_reads: int
    policy: int
    has_rules: int
    has_eager: bool
    queue_messages: int
    queue_bytes: int
    stream_messages: int
    stream_size: int
    registering: bool
    finishing: bool = False
    walking: bool = False
    allow_inq: bool = False
    census: int = 0
    switched: int = 0
    cgroup: int = 0

    def pack(self) -> bytes:
        return SETTINGS.pack(
            self.mode,
            self.allow_blocking,
            self.splicing,
            self.stopping,
            self.hot_reads,
            self.policy,
            self.has_rules,
            self.has_eager,
            self.queue_messages,
            self.queue_bytes,
            self.stream_messages,
            self.stream_size,
            self.registering,
            self.finishing,
            self.walking,
            self.allow_inq,
            self.census,
            self.switched,
            self.cgroup,
        )

    @classmethod
    def unpack(cls, value: bytes) -> KernelSettings:
        # Of an earlier build: fields are added at the end.
        v = SETTINGS.unpack(value.ljust(SETTINGS.size, b"\0"))
        return cls(
            v[0],
            bool(v[1]),
            bool(v[2]),
            v[3],
            v[4],
            v[5],
            v[6],
            bool(v[7]),
            v[8],
            v[9],
            v[10],
            v[11],
            bool(v[12]),
            bool(v[13]),
            bool(v[14]),
            bool(v[15]),
            v[16],
            v[17],
            v[18],
        )
