# SPDX-License-Identifier: Apache-2.0
"""What `splicer tap` makes of the records of its ring: packets in a file, or text."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from splicer.errors import SplicerError
from splicer.kernel.layout import CLIENT, SERVER, TAP_RECORD, TapChoice, format_endpoint
from splicer.pcapng import Route, Writer
from splicer.text import human_bytes, plural

_SEQUENCES = 1 << 32
_HEX_WIDTH = 16

Row = Mapping[str, object]
# Of many connections, by name: the rows that `splicer flows` has of them; without those that nobody knows.
Describe = Callable[[Sequence[int]], Mapping[int, Row]]


@dataclass
class Way:
    """One direction of a connection: where it goes on, and what was missed of it."""

    source: str
    target: str
    route: Route
    expected: int | None = None
    missed_bytes: int = 0
    missed: int = 0


@dataclass
class Flow:
    """A connection that is tapped; `ways` by who sends. `about` names its ends, where that is known."""

    ways: tuple[Way, Way]
    netns: int
    about: str
    interface: int = -1


@dataclass(frozen=True)
class Piece:
    """A message, or a part of one of more than 16 KiB. `kept` is there of `size` bytes. `missed` pieces with
    `missed_bytes` found no room before it, and `through_tcp` bytes were not redirected."""

    time_ns: int
    seq: int
    ack: int
    size: int
    kept: memoryview
    missed: int
    missed_bytes: int
    through_tcp: int


class Sink(Protocol):
    """Where pieces go."""

    def write(self, flow: Flow, way: Way, piece: Piece, about: str) -> None: ...
    def flush(self) -> None: ...
    def finish(self, totals: Totals, time_ns: int) -> None: ...


@dataclass
class Totals:
    """Of everything. `lost` says of which connection how many pieces, and bytes, found no room."""

    pieces: int = 0
    bytes: int = 0
    connections: int = 0
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)
    undecided: int = 0

    def lose(self, name: str, pieces: int, size: int) -> None:
        before = self.lost.get(name, (0, 0))
        self.lost[name] = before[0] + pieces, before[1] + size

    @property
    def missed(self) -> tuple[int, int]:
        """Pieces and bytes."""
        return sum(each[0] for each in self.lost.values()), sum(each[1] for each in self.lost.values())


class Capture:
    """Takes records, and knows the connections that they are of."""

    def __init__(
        self,
        sink: Sink,
        describe: Describe,
        is_wanted: Callable[[Row], bool] | None,
        choose: Callable[[int, TapChoice], None],
    ) -> None:
        """`is_wanted` decides by the row of a connection, None: all are. `choose` is told what it says."""
        self.totals = Totals()
        self._sink = sink
        self._describe = describe
        self._is_wanted = is_wanted
        self._choose = choose
        self._flows: dict[int, Flow] = {}
        self._unwanted: set[int] = set()
        self._unknown: set[int] = set()
        # Of the kernel's clock, which stands in the records.
        self._since_1970 = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    @property
    def names(self) -> list[int]:
        """Names of all connections that it has met, wanted or not."""
        return [*self._flows, *self._unwanted, *self._unknown]

    def take(self, records: Iterable[memoryview]) -> int:
        """Write some. Returns how many pieces that made."""
        opened = [TAP_RECORD.unpack_from(record) for record in records]
        self._meet(opened)
        made = 0
        for fields, record in zip(opened, records, strict=True):
            flow = self._flows.get(fields[0])
            if flow is None:
                self.totals.undecided += fields[0] not in self._unwanted
                continue
            self._write(flow, fields, record)
            made += 1
        self._sink.flush()
        return made

    def _meet(self, opened: Iterable[tuple[int, ...]]) -> None:
        """Decide about those that were not met before."""
        fresh = {
            fields[0]: fields
            for fields in opened
            if fields[0] not in self._flows and fields[0] not in self._unwanted
        }
        if not fresh:
            return
        rows = self._describe(list(fresh))
        for name, fields in fresh.items():
            row = rows.get(name)
            if self._is_wanted is not None:
                # One that has ended meanwhile is known by its addresses only.
                if self._is_wanted(row or _list_addresses(fields)):
                    self._choose(name, TapChoice.WANTED)
                elif row is None:
                    self._unknown.add(name)  # asked about again with its next message
                    continue
                else:
                    self._unknown.discard(name)
                    self._unwanted.add(name)
                    self._choose(name, TapChoice.UNWANTED)
                    continue
            self._unknown.discard(name)
            self._flows[name] = _make_flow(fields, _name_ends(row))
            self.totals.connections += 1

    def _write(self, flow: Flow, fields: tuple[int, ...], record: memoryview) -> None:
        time_ns, seq, ack, size, kept, sender = fields[1], *fields[13:18]
        way = flow.ways[sender]
        missed, missed_bytes = fields[21] - way.missed, fields[20] - way.missed_bytes
        # What was missed before the first one that is here is no gap in anything.
        gap = 0 if way.expected is None else (seq - way.expected) % _SEQUENCES
        way.missed, way.missed_bytes = fields[21], fields[20]
        way.expected = (seq + size) % _SEQUENCES
        if missed:
            self.totals.lose(f"{way.source} > {way.target}", missed, missed_bytes)
        self.totals.pieces += 1
        self.totals.bytes += size
        self._sink.write(
            flow,
            way,
            Piece(
                self._since_1970 + time_ns,
                seq,
                ack,
                size,
                record[TAP_RECORD.size : TAP_RECORD.size + kept],
                missed,
                missed_bytes,
                gap - missed_bytes if gap > missed_bytes else 0,
            ),
            flow.about,
        )
        flow.about = ""

    def close_flow(self, name: int, missed: tuple[tuple[int, int], tuple[int, int]]) -> None:
        """It has ended; of each way so many bytes and pieces found no room."""
        self._unwanted.discard(name)
        self._unknown.discard(name)
        if (flow := self._flows.pop(name, None)) is not None:
            self._settle(flow, missed)

    def _settle(self, flow: Flow, missed: tuple[tuple[int, int], tuple[int, int]]) -> None:
        for way, (size, pieces) in zip(flow.ways, missed, strict=True):
            if pieces > way.missed:
                self.totals.lose(f"{way.source} > {way.target}", pieces - way.missed, size - way.missed_bytes)

    def finish(
        self, read_missed: Callable[[int], tuple[tuple[int, int], tuple[int, int]]], unknown: tuple[int, int]
    ) -> None:
        """Count what was missed last, and end what is written. `unknown`: bytes and pieces of connections
        that there was no room to tell apart."""
        for name, flow in self._flows.items():
            self._settle(flow, read_missed(name))
        if unknown[1]:
            self.totals.lose("other connections", unknown[1], unknown[0])
        self._sink.finish(self.totals, time.time_ns())


def _name_ends(row: Row | None) -> str:
    """The two owners, as `splicer flows --wide` has them."""
    from .owners import describe_owner
    from .query import section

    if row is None:
        return ""
    client, server = (describe_owner(section(row, end)) for end in ("client", "server"))
    return f"client {client or '?'}, server {server or '?'}" if client or server else ""


def _find_ends(fields: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """Address and port of the client, and of the server."""
    ends = [(fields[2:6], fields[11]), (fields[6:10], fields[12])]
    return ends[::-1] if fields[18] == SERVER else ends


def _list_addresses(fields: tuple[int, ...]) -> Row:
    """What a row would say of them."""
    client, server = (format_endpoint(*end) for end in _find_ends(fields))
    return {"local": client, "remote": server}


def _make_flow(fields: tuple[int, ...], about: str) -> Flow:
    ends, netns = _find_ends(fields), fields[10]
    ways = []
    for sender in (CLIENT, SERVER):
        source, target = ends[sender], ends[1 - sender]
        route = Route(struct.pack(">4I", *source[0]), source[1], struct.pack(">4I", *target[0]), target[1])
        ways.append(Way(format_endpoint(*source), format_endpoint(*target), route))
    return Flow((ways[CLIENT], ways[SERVER]), netns, about)


def _count(number: int, noun: str) -> str:
    """To the byte: somebody may add it up."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def explain_gap(piece: Piece) -> str:
    """What is missing before it, and why; empty if nothing is."""
    said = []
    if piece.missed:
        said.append(
            f"{_count(piece.missed_bytes, 'byte')} before this missed by splicer tap "
            f"({_count(piece.missed, 'message')}: no room in the buffer)"
        )
    if piece.through_tcp:
        said.append(
            f"{_count(piece.through_tcp, 'byte')} before this went through TCP, where tcpdump sees them"
        )
    return "; ".join(said)


class Packets:
    """A pcapng file. The ends of each network namespace are an interface of their own, since addresses in
    one are no addresses in another."""

    def __init__(self, fd: int, *, snaplen: int, version: str, system: str) -> None:
        self._writer = Writer(fd, snaplen=snaplen, application=f"splicer tap {version}", system=system)
        self._interfaces: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._dropped: dict[int, int] = {}

    def write(self, flow: Flow, way: Way, piece: Piece, about: str) -> None:
        if flow.interface < 0:
            flow.interface = self._find_interface(flow.netns)
        interface = flow.interface
        self._received[interface] += 1
        self._dropped[interface] += piece.missed
        gap = explain_gap(piece) if piece.missed or piece.through_tcp else ""
        self._writer.add_packet(
            interface,
            piece.time_ns,
            way.route.make_headers(piece.seq, piece.ack, piece.size),
            piece.kept,
            piece.size,
            comment="; ".join(filter(None, (about, gap))) if about or gap else "",
            dropped=piece.missed,
        )

    def _find_interface(self, netns: int) -> int:
        found = self._interfaces.get(netns)
        if found is None:
            description = f"redirected by splicer, addresses of network namespace {netns} (cookie)"
            found = self._writer.add_interface(f"splicer{len(self._interfaces)}", description)
            self._interfaces[netns] = found
            self._received[found] = self._dropped[found] = 0
        return found

    def flush(self) -> None:
        try:
            self._writer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SplicerError(f"cannot write packets: {error.strerror}") from error

    def finish(self, totals: Totals, time_ns: int) -> None:
        missed, size = totals.missed
        # What was missed last of a connection stands before no packet of it.
        late = missed - sum(self._dropped.values())
        for number, received in self._received.items():
            dropped = self._dropped[number] + (late if number == 0 else 0)
            comment = f"missed by splicer tap on all interfaces: {missed} messages, {size} bytes"
            self._writer.add_statistics(
                number, time_ns, received=received, dropped=dropped, comment=comment if number == 0 else ""
            )
        self.flush()


class Text:
    """Lines for people: a head for each piece, and what is in it as text, or as hex and text."""

    def __init__(self, stream: TextIO, *, hexadecimal: bool) -> None:
        self._stream = stream
        self._hexadecimal = hexadecimal

    def write(self, flow: Flow, way: Way, piece: Piece, about: str) -> None:
        clock = time.strftime("%H:%M:%S", time.localtime(piece.time_ns // 1_000_000_000))
        micros = piece.time_ns // 1000 % 1_000_000
        lines = [f"({said})" for said in (about, explain_gap(piece)) if said]
        cut = f", {piece.size - len(piece.kept)} not kept" if len(piece.kept) < piece.size else ""
        lines.append(
            f"{clock}.{micros:06} {way.source} > {way.target}: "
            f"seq {piece.seq}:{(piece.seq + piece.size) % _SEQUENCES}, length {piece.size}{cut}"
        )
        lines += dump_hex(piece.kept) if self._hexadecimal else [to_text(piece.kept)]
        self._stream.write("\n".join(filter(None, lines)) + "\n")

    def flush(self) -> None:
        self._stream.flush()

    def finish(self, totals: Totals, time_ns: int) -> None:
        self._stream.flush()


def to_text(data: bytes | memoryview) -> str:
    """ASCII as it is, with its lines; a dot for whatever else, which could steer a terminal."""
    return bytes(data).translate(_TO_TEXT).decode().rstrip("\n")


_TO_TEXT = bytes(number if 32 <= number < 127 or number in b"\n\t" else ord(".") for number in range(256))
_TO_LINE = bytes(number if 32 <= number < 127 else ord(".") for number in range(256))


def dump_hex(data: bytes | memoryview) -> list[str]:
    """16 bytes in a line: offset, hex, ASCII."""
    found = []
    for start in range(0, len(data), _HEX_WIDTH):
        part = bytes(data[start : start + _HEX_WIDTH])
        found.append(f"  {start:06x}  {part.hex(' '):<47}  {part.translate(_TO_LINE).decode()}")
    return found


def summarise(totals: Totals, *, most: int = 10) -> list[str]:
    """What was written, and what was missed of whom, the most first."""
    said = (
        f"{plural(totals.pieces, 'message')} ({human_bytes(totals.bytes)}) of "
        f"{plural(totals.connections, 'connection')}"
    )
    missed, size = totals.missed
    if not missed and not totals.undecided:
        return [f"{said}; none missed"]
    lines = [said]
    if missed:
        lines.append(
            f"missed: {_count(missed, 'message')} ({_count(size, 'byte')}), there was no room in the buffer"
        )
        ordered = sorted(totals.lost.items(), key=lambda item: -item[1][1])
        lines += [
            f"  {name}: {_count(pieces, 'message')}, {_count(lost, 'byte')}"
            for name, (pieces, lost) in ordered[:most]
        ]
        if len(ordered) > most:
            lines.append(f"  and {len(ordered) - most} more")
        lines.append("hint: a larger --buffer, a filter, or a smaller --snaplen")
    if totals.undecided:
        lines.append(
            f"left out: {_count(totals.undecided, 'message')} of connections that the daemon did not describe"
        )
    return lines
