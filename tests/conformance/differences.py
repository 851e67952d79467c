# SPDX-License-Identifier: Apache-2.0
"""What differs from plain TCP and cannot be fixed. Each entry stands in KNOWN_ISSUES.md too, by its probe's
name.

A difference is exact: the suite fails when a probe listed here behaves on a spliced connection as on plain
TCP after all, and when it differs in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from conformance.scene import show

Lines = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """How a probe's transcript differs where its connection was spliced.

    `spliced` makes of plain TCP's lines those of a spliced connection; without it they are the same, and only
    a transition differs. In a transition either may be seen, and what `between` (plain TCP's lines, those
    seen) allows; `only_guard` where it does so only if the application itself ended the splicing. `chance`:
    it depends on the daemon's clock whether a spliced connection shows the difference.
    """

    spliced: Callable[[Lines], Lines] | None = None
    between: Callable[[Lines, Lines], bool] | None = None
    only_guard: bool = False
    chance: bool = False


def swap(*changes: tuple[int, str]) -> Callable[[Lines], Lines]:
    """Line `number` (negative: from the end) has this result instead of its own."""

    def apply(lines: Lines) -> Lines:
        made = list(lines)
        for number, result in changes:
            call, equals, _ = made[number].partition(" = ")
            made[number] = call + equals + result if equals else result  # a note has no call
        return tuple(made)

    return apply


_READ = re.compile(r"^(\w+ (?:recv|read|readv|recvmsg|take|rest)\b[^=]*) = (.*)$")


def same_bytes(plain: Lines, seen: Lines) -> bool:
    """Single reads may be short at the boundary of redirected bytes and TCP's; all together are the same."""

    def split(lines: Lines) -> tuple[list[str], str]:
        others, data = [], ""
        for line in lines:
            found = _READ.match(line)
            if found is None or "PEEK" in found[1]:
                others.append(line)
            else:
                data += "".join(re.findall(r"'((?:[^'\\]|\\.)*)'", found[2]))
        return others, data

    return split(plain) == split(seen)


def shorter_peeks(plain: Lines, seen: Lines) -> bool:
    """A peek may show the redirected bytes only; nothing else differs."""
    for one, other in zip(plain, seen, strict=False):
        if one == other:
            continue
        if "PEEK" not in one or one.partition(" = ")[0] != other.partition(" = ")[0]:
            return False
        if not one.startswith(other.removesuffix("'")) or other.endswith("= ''"):
            return False
    return len(plain) == len(seen)


def fewer_waiting(plain: Lines, seen: Lines) -> bool:
    """FIONREAD may count less while a connection goes back; nothing else differs."""
    for one, other in zip(plain, seen, strict=False):
        if one == other:
            continue
        call, _, count = one.partition("FIONREAD = ")
        if not count or not other.startswith(f"{call}FIONREAD = "):
            return False
        if int(other.rpartition(" ")[2]) > int(count):
            return False
    return len(plain) == len(seen)


def lines_left(plain: Lines, seen: Lines) -> bool:
    """A reader that peeks for a whole line may not see it before it reads; every byte is there."""
    text = b"".join(b"line number %d\n" % number for number in range(60))
    lines = int(seen[0].split()[0])
    left = text.split(b"\n", lines)[lines] if lines < 60 else b""
    return seen[0].endswith(" lines") and seen[1] == f"server rest() = {show(left)}, EAGAIN"


def more_edges(plain: Lines, seen: Lines) -> bool:
    """The poke may report bytes once more that were reported already."""
    pairs = list(zip(plain, seen, strict=False))
    again = [(one, other) for one, other in pairs if one != other]
    return len(plain) == len(seen) and all(
        one == "server epoll_wait = -" and other == "server epoll_wait = IN" for one, other in again
    )


def told_nothing(plain: Lines, seen: Lines) -> bool:
    """An exact reader may be told 0 a number of times; it gets everything all the same."""
    return [re.sub(r"told 0 \d+", "told 0", line) for line in plain] == [
        re.sub(r"told 0 \d+", "told 0", line) for line in seen
    ]


def where(text: str, change: Callable[[Lines], Lines]) -> Callable[[Lines], Lines]:
    """Only if plain TCP's first line has `text`: without it the kernel lacks what the probe is about."""
    return lambda lines: change(lines) if text in lines[0] else lines


def one_of(*results: Callable[[Lines], Lines]) -> Callable[[Lines, Lines], bool]:
    return lambda plain, seen: seen in [result(plain) for result in results]


FIN_FOR_RST = "''"

DIFFERENCES: dict[str, Difference] = {
    # close with unread data: FIN for RST
    "close_with_unread_data": Difference(
        swap((2, "IN|OUT|RDHUP"), (3, FIN_FOR_RST), (4, FIN_FOR_RST), (5, "1")),
    ),
    "close_with_unread_data_both_ways": Difference(
        swap((4, FIN_FOR_RST)),
    ),
    "close_with_partly_read_data": Difference(swap((3, FIN_FOR_RST))),
    "peeks_and_closes": Difference(swap((3, FIN_FOR_RST))),
    "reader_killed_with_unread_bytes": Difference(swap((3, FIN_FOR_RST))),
    # urgent data
    "urgent_data": Difference(
        swap((1, "IN|OUT"), (2, "'ab!'"), (3, "EAGAIN")),
        one_of(swap((1, "IN|OUT"), (2, "'ab!'"), (3, "EINVAL"))),
    ),
    "oob_without_urgent_data": Difference(
        swap((0, "EAGAIN"), (2, "'x'"), (3, "EAGAIN")),
        one_of(swap((0, "EAGAIN")), swap((2, "'x'"), (3, "EAGAIN"))),
    ),
    # other ways to send and to read
    "uring_zero_copy_send": Difference(
        where(
            " = 10,",
            swap(
                *((at, "ENOTSUP, notice follows: True") for at in (0, 3)),
                *((at, "'', EAGAIN") for at in (1, 4)),
            ),
        )
    ),
    **dict.fromkeys(
        ("in_queue_message", "in_queue_message_from_the_start"),
        Difference(swap((-2, "b'0123' []"), (-1, "b'456789' []"))),
    ),
    "zero_copy_receive": Difference(swap((1, "0"), (4, "0")), one_of(swap((1, "0")), swap((4, "0")))),
    # memory
    "receiver_out_of_memory": Difference(
        where("bound: True", swap((1, "refused by ['ENOMEM']"))),
        one_of(swap((1, "refused by ['EAGAIN', 'ENOMEM']"))),
    ),
    "sender_out_of_memory": Difference(where("bound: True", swap((1, "at first: EAGAIN")))),
    "large_sends_side_by_side": Difference(swap((1, "[b'\\x00', b'A', b'B'], each in one piece: False"))),
    # calls with a mistake in them
    "send_from_nowhere": Difference(swap((0, "0"))),
    "partly_bad_buffer": Difference(swap((1, "all there: True, after some"))),
    "partly_bad_buffer_for_much": Difference(swap((1, "all there: True, after some"))),
    "control_message_refused": Difference(swap((0, "1"), (2, "'xy', EAGAIN"))),
    "trunc_into_nothing": Difference(swap((1, "EFAULT"), (2, "'0123456789'"))),
    # what only TCP bounds or counts
    "small_buffers_and_large_messages": Difference(
        swap((2, "less than 500 kB on the way: False")),
    ),
    "traffic_in_tcp_info": Difference(swap((1, "received 0"))),
    # after a reset
    "reset_seen_by_sending": Difference(swap((2, "ECONNRESET"), (3, "ECONNRESET"))),
    # connect(AF_UNSPEC)
    "disconnected_and_connected_again": Difference(
        swap((2, "'of the old'"), (3, "IN|OUT|ERR|HUP"), (4, "11")),
        one_of(swap((2, "EAGAIN"), (3, "OUT|ERR|HUP"))),
    ),
    # what is asked for later does not hold for bytes that were redirected before
    "receive_low_water_with_bytes_there": Difference(swap((2, "IN|OUT"))),
    "blocking_reader_reset": Difference(between=one_of(swap((1, "got ['EAGAIN']"))), chance=True),
    "wait_all_from_now_on": Difference(
        between=one_of(swap((3, "got [300]")), swap((3, "got [600]"))), chance=True
    ),
    "sleepless_first_sleep_is_reset": Difference(swap((2, "got ['EAGAIN']")), chance=True),
    "sleepless_first_sleep_is_interrupted": Difference(
        swap((0, "-1, Resource temporarily unavailable")), chance=True
    ),
    "splice_while_bytes_wait": Difference(swap((1, "EAGAIN"), (2, "'0123456789', EAGAIN"))),
    # the boundary of redirected bytes and those that went through TCP
    "several_messages_in_one_read": Difference(between=same_bytes, only_guard=True),
    "readv_across_messages": Difference(between=same_bytes, only_guard=True),
    "peek_across_messages": Difference(between=shorter_peeks, only_guard=True),
    "peek_then_larger": Difference(between=shorter_peeks, only_guard=True),
    "lines_in_pieces": Difference(between=lines_left, only_guard=True),
    # the poke
    "epoll_edge": Difference(between=more_edges, only_guard=True),
    # FIONREAD while a connection goes back
    "fionread": Difference(between=fewer_waiting, only_guard=True),
    "fionread_several_messages": Difference(between=fewer_waiting, only_guard=True),
    "fionread_while_peeking": Difference(between=fewer_waiting, only_guard=True),
    "outq_while_data_waits": Difference(between=fewer_waiting, only_guard=True),
    "fionread_at_the_end": Difference(between=fewer_waiting, only_guard=True),
    "reset_behind_unread_bytes": Difference(between=fewer_waiting, only_guard=True),
    "close_then_read_late": Difference(between=fewer_waiting, only_guard=True),
    "exact_reader": Difference(between=told_nothing, only_guard=True),
}
