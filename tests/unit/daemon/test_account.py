# SPDX-License-Identifier: Apache-2.0
"""What is said of one connection: consistent with its reason, whatever is to be seen now."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from splicer.daemon.account import _OPTIONS, Evidence, describe
from splicer.kernel.gauge import Facts
from splicer.kernel.layout import Direction, End, EndFlag, FactBit, Pair
from splicer.model import REASON_NAMES, REASONS, Unread
from splicer.policy.advice import REMEDIES
from splicer.policy.decision import Decision

SECOND = 1_000_000_000
NOW = 1000 * SECOND
END = End("10.0.0.1:40000", "10.0.0.2:80", 1, 7, 16, 4711, 0)
FINE = Facts(
    FactBit.THERE | FactBit.FILE, 1, 0, os.O_NONBLOCK | os.O_RDWR, EndFlag(0), 0, False, 1, -1, None, 0, 0, 20
)
ON = Decision("adaptive", "default", "refuse", "default", "allow", "default")


def evidence(reason: str, **changes: Any) -> Evidence:
    pair = Pair(
        (1, 2),
        changes.pop("state", 1),
        REASON_NAMES.index(reason),
        replace(END, reads=changes.pop("reads", 16)),
        END,
        NOW - 60 * SECOND,
        NOW - 5 * SECOND,
        changes.pop("announced", 0),
        Direction(100, 2, 0),
        Direction(50, 1, 0),
        policy=1,
        mode=1,
        retry_ns=changes.pop("retry_ns", 0),
        refusals=changes.pop("refusals", 0),
    )
    known = {"decision": ON, "now_ns": NOW, "hot_reads": 16, "facts": (FINE, FINE), "port": 80}
    return Evidence(pair=pair, reason=reason, **(known | changes))


@pytest.mark.parametrize("reason", [name for name in REASONS if name not in ("cold", "pending")])
def test_the_reason_is_always_a_failed_check(reason: str) -> None:
    """Also where the socket looks fine by now, and where nothing can be seen."""
    for facts in ((FINE, FINE), (None, None)):
        account = describe(evidence(reason, facts=facts))
        failed = [each.check for each in account.checks if each.passed is False]
        assert reason in failed
        assert reason in account.verdict
        assert account.next


def test_whatever_can_be_refused_has_something_that_changes_it() -> None:
    moments = {"stop", "request", "closing", "policy_off"}  # over in a moment, or said by who decides
    can_change = {reason for reason, remedy in REMEDIES.items() if remedy.changes}
    assert can_change == set(REASONS) - moments


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tcp_state": 8}, "closing"),
        ({"shutdown": 2}, "closing"),
        ({"bits": FactBit.THERE}, "unaccepted"),
        ({"bits": FINE.bits | FactBit.KERNEL}, "kernel_socket"),
        ({"bits": FINE.bits | FactBit.MPTCP}, "mptcp"),
        ({"rcvlowat": 2}, "rcvlowat"),
        ({"bits": FINE.bits | FactBit.ZEROCOPY}, "zerocopy"),
        ({"bits": FINE.bits | FactBit.ULP}, "ulp"),
        ({"bits": FINE.bits | FactBit.REPAIR}, "repair"),
        ({"peek_off": 0}, "peek_offset"),
        ({"bits": FINE.bits | FactBit.TIMESTAMPS}, "control_messages"),
        ({"bits": FINE.bits | FactBit.FILTER}, "socket_filter"),
        ({"pacing": 1000}, "pacing"),
        ({"bits": FINE.bits | FactBit.USER_DATA}, "foreign_psock"),
        ({"bits": FINE.bits | FactBit.USER_DATA | FactBit.TAKEN_OVER}, "foreign_psock"),
        ({"habit": REASON_NAMES.index("foreign_psock")}, "foreign_psock"),
        ({"habit": REASON_NAMES.index("splice_reader")}, "splice_reader"),
        ({"file_flags": 0, "manner": EndFlag.BLOCKS | EndFlag.SLEEPY}, "blocking_reader"),
        ({"file_flags": 0, "was_asleep": True}, "blocking_reader"),
        ({"file_flags": 0, "manner": EndFlag.RELIANT}, "blocking_reader"),
        ({"waiter": 2}, "blocking_reader"),
        ({"file_flags": 0, "manner": EndFlag.BLOCKS, "polls": 1}, "blocking_reader"),
        ({"manner": EndFlag.BLOCKS}, "blocking_reader"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_seen_fails_its_check(changes: dict[str, Any], reason: str, side: int) -> None:
    bad = replace(FINE, **changes)
    account = describe(evidence("cold", facts=(bad, FINE) if side == 0 else (FINE, bad)))
    assert [each.check for each in account.checks if each.passed is False] == [reason]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": FINE.bits | FactBit.INQ},
        {"bits": FINE.bits | FactBit.USER_DATA, "manner": EndFlag.LEFT},
        {"file_flags": 0, "manner": EndFlag.BLOCKS, "polls": 2},
        {"file_flags": 0},
    ],
)
def test_what_is_fine_passes(changes: dict[str, Any]) -> None:
    account = describe(evidence("cold", facts=(replace(FINE, **changes), FINE)))
    assert not [each for each in account.checks if each.passed is False]
    assert account.next == "it is tried with the next read"


def test_by_policy_what_is_not_fine_passes() -> None:
    allowed = replace(ON, blocking="allow", tcp_inq="refuse")
    sleeps = replace(FINE, file_flags=0, was_asleep=True, bits=FINE.bits | FactBit.INQ)
    account = describe(evidence("cold", decision=allowed, facts=(sleeps, FINE)))
    assert [each.check for each in account.checks if each.passed is False] == ["control_messages"]


def test_every_option_is_a_reason() -> None:
    assert {name for name, _, _ in _OPTIONS} <= set(REASONS)


@pytest.mark.parametrize(
    ("changes", "words", "seconds"),
    [
        ({"reason": "", "state": 2}, "for as long as all of this holds", None),
        ({"reason": "request", "state": 3, "unread": (Unread(5, 0), None)}, "5 bytes wait", None),
        ({"reason": "cold", "reads": 3}, "the client has read 13 times more", None),
        ({"reason": "pending"}, "next moment without bytes in flight", 0.0),
        (
            {"reason": "rcvlowat", "retry_ns": NOW + 2 * SECOND},
            "tried again once both ends have read 16",
            2.0,
        ),
        ({"reason": "rcvlowat", "retry_ns": NOW - SECOND}, "tried again once both ends have read 16", 0.0),
        ({"reason": "splice_reader", "announced": 1}, "stays plain for as long as it lives", None),
        ({"reason": "splice_reader", "retry_ns": NOW + SECOND}, "tried again", 1.0),
        ({"reason": "policy_off"}, "until the policy changes", None),
        ({"reason": "policy_off", "off_because": "splicer pause"}, "until splicer resume", None),
        ({"reason": "policy_off", "off_because": "splicer bench"}, "until splicer bench has measured", None),
    ],
)
def test_what_happens_next(changes: dict[str, Any], words: str, seconds: float | None) -> None:
    account = describe(evidence(**changes))
    assert words in account.next
    assert account.next_seconds == seconds


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("splicer pause", "splicer resume"),
        ("default", "splicer set --port 80 adaptive"),
        ("label splicer.mode, of the server", "label splicer.mode, which is about the server"),
        ("override of port 80, 81, of the server", "splicer unset --port '80, 81'"),
        ("override of process php*, of the client", "splicer unset --process 'php*'"),
        ("override, of the client", "splicer unset, of the client's container"),
    ],
)
def test_who_can_change_the_policy(source: str, said: str) -> None:
    off = replace(ON, mode="off", mode_source=source)
    assert said in "\n".join(describe(evidence("policy_off", decision=off)).change)


def test_when_it_was_tried() -> None:
    assert describe(evidence("rcvlowat", tried_ns=NOW - 3 * SECOND)).tried_seconds == 3.0
    assert describe(evidence("rcvlowat")).tried_seconds is None
    assert describe(evidence("", state=2)).tried_seconds == 5.0
