# SPDX-License-Identifier: Apache-2.0
"""What there is to say of one connection: which checks it passed and failed, what happens next, and what
would change it. Pure functions of what was found out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from splicer.kernel.gauge import Facts
from splicer.kernel.layout import STATE_LEAVING, STATE_PAIRED, STATE_SPLICED, EndFlag, FactBit, Pair
from splicer.model import REASON_NAMES, REASONS, Unread
from splicer.policy.advice import REMEDIES, Remedy
from splicer.policy.decision import MEASUREMENT, PAUSE, Decision
from splicer.text import plural

_ESTABLISHED = 1  # TCP_ESTABLISHED (Linux, include/net/tcp_states.h)
_ASLEEP = 2  # WAITER_READ of bpf/fitness.h
_POLLS_ENOUGH = 2  # POLLS_ENOUGH there
# Decided by a read that the programs saw, for as long as the connection lives.
_FOR_GOOD = ("splice_reader", "unknown_reader", "waitall_reader", "kernel_socket", "forged", "foreign_psock")


@dataclass(frozen=True)
class Finding:
    """A check: the name of what fails it (a reason, or a word of its own), whether it is passed (None: not
    known), and what was seen."""

    check: str
    passed: bool | None
    saw: str


@dataclass(frozen=True)
class Account:
    """Everything about one connection. `verdict` is its state and reason in words. `tried_seconds` is how
    long ago it was last tried to splice it, None if that is not known; `next_seconds` how long it takes at
    least until `next`. `change` says what would change it."""

    verdict: str
    checks: tuple[Finding, ...]
    next: str
    change: tuple[str, ...]
    next_seconds: float | None = None
    tried_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What was found out about a connection that is known. `reason` is the one that `flows` gives. `tried_ns`
    is of CLOCK_MONOTONIC, as are the times of the pair. `off_because` is as in class Book. Facts and unread
    bytes are the client's and the server's."""

    pair: Pair
    reason: str
    decision: Decision
    now_ns: int
    hot_reads: int
    off_because: str = ""
    splicing: bool = True
    facts: tuple[Facts | None, Facts | None] = (None, None)
    unread: tuple[Unread | None, Unread | None] = (None, None)
    readers: tuple[str, str] = ("", "")
    tried_ns: int | None = None
    port: int = 0


def describe(evidence: Evidence) -> Account:
    """All of it."""
    pair, reason = evidence.pair, evidence.reason
    checks = _settle(list(_list_checks(evidence)), evidence)
    words, seconds = _find_next(evidence)
    tried = evidence.tried_ns
    if tried is None and pair.state != STATE_PAIRED:
        tried = pair.changed_ns
    return Account(
        verdict=_word_verdict(evidence),
        checks=tuple(checks),
        next=words,
        next_seconds=seconds,
        change=tuple(_list_changes(reason, evidence.decision, evidence.port)),
        tried_seconds=None if tried is None else _since(tried, evidence.now_ns),
    )


def _since(then_ns: int, now_ns: int) -> float:
    return round(max(0, now_ns - then_ns) / 1e9, 3)


def _word_verdict(evidence: Evidence) -> str:
    pair, reason = evidence.pair, evidence.reason
    told = f": {reason}. {REASONS[reason]}" if reason in REASONS else "."
    if pair.state == STATE_SPLICED:
        sent = (pair.client_sends, pair.server_sends)
        return (
            f"It is spliced: {sum(each.redirected_messages for each in sent)} messages of "
            f"{sum(each.redirected_bytes for each in sent)} bytes were redirected so far."
        )
    if pair.state != STATE_PAIRED:
        how = "redirects until it is at rest" if pair.state == STATE_LEAVING else "passes through TCP"
        return f"It goes back to plain TCP, and {how}{told}"
    return f"It is plain TCP{told}"


# -- the checks, in the order in which they are made -------------------------------------------------------


def _list_checks(evidence: Evidence) -> Iterator[Finding]:
    pair, decision = evidence.pair, evidence.decision
    off = evidence.off_because
    if off:
        switched = "paused: splicer resume" if off == PAUSE else f"{off} keeps everything plain for now"
    elif evidence.splicing:
        switched = "splicing is on"
    else:
        switched = "splicing is off: splicer is starting or stopping"
    yield Finding("splicing", evidence.splicing and not off, switched)
    yield Finding(
        "local", True, "both ends are on this host, and in the cgroup; their sequence numbers agree"
    )
    yield Finding("followed", True, f"since {_since(pair.born_ns, evidence.now_ns):.1f} s")
    yield Finding("policy_off", decision.mode != "off", f"mode {decision.mode}, by {decision.mode_source}")
    yield from _list_readings(evidence)
    yield from _list_options(evidence)
    yield from _list_moments(evidence)


def _list_readings(evidence: Evidence) -> Iterator[Finding]:
    """Who reads, how often, and how."""
    pair, hot = evidence.pair, evidence.hot_reads
    readers = ", ".join(
        f"{side} read by {reader}" if reader else f"{side} by nobody so far, as is known"
        for side, reader in zip(("client", "server"), evidence.readers, strict=True)
    )
    habits = [
        name
        for each in evidence.facts
        if each is not None and (name := REASON_NAMES[each.habit]) == "splice_reader"
    ]
    if evidence.reason == "splice_reader" and not habits:
        yield Finding("splice_reader", False, "a read by splice(2) was seen on it")
    else:
        yield Finding("splice_reader", None if not any(evidence.facts) else not habits, readers)
    for name in ("unknown_reader", "waitall_reader", "spinning_reader"):
        yield Finding(name, True, "not seen")
    if evidence.decision.mode == "off" or habits or evidence.reason in _FOR_GOOD:
        yield Finding("cold", None, "reads are not counted, since another check has failed")
    elif pair.state != STATE_PAIRED or evidence.decision.mode == "eager":
        saw = "spliced from the first byte (eager)" if evidence.decision.mode == "eager" else "both were hot"
        yield Finding("cold", True, saw)
    else:
        reads = (pair.client.reads, pair.server.reads)
        saw = f"client {reads[0]} of {hot} reads, server {reads[1]} of {hot}"
        yield Finding("cold", all(each >= hot for each in reads), saw)
    allowed = evidence.decision.blocking == "allow"
    words = [_word_blocking(each) for each in evidence.facts]
    counts = (pair.client.reads, pair.server.reads)
    passed = [
        allowed or each is None or not _is_blocking(each, reads)
        for each, reads in zip(evidence.facts, counts, strict=True)
    ]
    told = _both([each or "not known" for each in words])
    yield Finding("blocking_reader", all(passed), f"blocking is allowed; {told}" if allowed else told)


def _word_blocking(facts: Facts | None) -> str:
    if facts is None:
        return ""
    if FactBit.FILE not in facts.bits:
        return "not accepted yet"
    if facts.file_flags & os.O_NONBLOCK:
        words = "O_NONBLOCK"
        if facts.manner & (EndFlag.SLEEPY | EndFlag.BLOCKS):
            words += ", and has read without it"
        return words
    if facts.manner & EndFlag.SLEEPY or facts.was_asleep or facts.waiter == _ASLEEP:
        return "no O_NONBLOCK, sleeps in reads"
    if facts.manner & EndFlag.RELIANT:
        return "no O_NONBLOCK now, had it before"
    if facts.manner & EndFlag.BLOCKS:
        return f"no O_NONBLOCK, reads where it may sleep; seen to wait in poll {plural(facts.polls, 'time')}"
    return "no O_NONBLOCK, reads with MSG_DONTWAIT"


def _is_blocking(facts: Facts, reads: int) -> bool:
    """As find_misfit_reads() in bpf/fitness.h has it."""
    manner = facts.manner
    if FactBit.FILE not in facts.bits:
        return False  # that is another reason
    if facts.waiter == _ASLEEP:
        return True
    if facts.file_flags & os.O_NONBLOCK:
        return bool(manner & (EndFlag.SLEEPY | EndFlag.BLOCKS)) and EndFlag.IN_MAP not in manner
    if not reads or {EndFlag.SLEEPLESS, EndFlag.IN_MAP} <= set(manner):
        return False
    if facts.was_asleep or manner & (EndFlag.SLEEPY | EndFlag.RELIANT):
        return True
    return EndFlag.BLOCKS in manner and facts.polls < min(_POLLS_ENOUGH, reads)


def _both(words: list[str]) -> str:
    if words[0] == words[1]:
        return f"both ends: {words[0]}"
    return f"client: {words[0]}; server: {words[1]}"


def _has(bit: FactBit) -> Callable[[Facts], bool]:
    return lambda facts: bit in facts.bits


def _word(bit: FactBit, there: str, absent: str) -> Callable[[Facts], str]:
    return lambda facts: there if bit in facts.bits else absent


def _word_messages(facts: Facts) -> str:
    asked = [
        name
        for bit, name in ((FactBit.TIMESTAMPS, "timestamps"), (FactBit.INQ, "TCP_INQ"))
        if bit in facts.bits
    ]
    return f"asked for {' and '.join(asked)}" if asked else "none asked for"


def _name_shutdown(facts: Facts) -> str:
    if facts.tcp_state != _ESTABLISHED:
        return f"TCP is in state {facts.tcp_state}"
    return "shut down" if facts.shutdown else "open"


# Reason, whether an end fails it, and what is seen there, whether it does or not.
_OPTIONS: tuple[tuple[str, Callable[[Facts], bool], Callable[[Facts], str]], ...] = (
    (
        "closing",
        lambda facts: facts.tcp_state != _ESTABLISHED or facts.shutdown != 0,
        _name_shutdown,
    ),
    (
        "unaccepted",
        lambda facts: FactBit.FILE not in facts.bits,
        _word(FactBit.FILE, "accepted", "not accepted"),
    ),
    ("kernel_socket", _has(FactBit.KERNEL), _word(FactBit.KERNEL, "the kernel's own", "a process's")),
    ("mptcp", _has(FactBit.MPTCP), _word(FactBit.MPTCP, "Multipath TCP", "plain TCP")),
    ("rcvlowat", lambda facts: facts.rcvlowat > 1, lambda facts: f"SO_RCVLOWAT {facts.rcvlowat}"),
    ("zerocopy", _has(FactBit.ZEROCOPY), _word(FactBit.ZEROCOPY, "SO_ZEROCOPY", "no SO_ZEROCOPY")),
    ("ulp", _has(FactBit.ULP), _word(FactBit.ULP, "kernel TLS or another one", "no upper layer protocol")),
    ("repair", _has(FactBit.REPAIR), _word(FactBit.REPAIR, "TCP_REPAIR", "no TCP_REPAIR")),
    (
        "peek_offset",
        lambda facts: facts.peek_off >= 0,
        lambda facts: f"SO_PEEK_OFF {facts.peek_off}" if facts.peek_off >= 0 else "no SO_PEEK_OFF",
    ),
    ("control_messages", _has(FactBit.TIMESTAMPS), _word_messages),
    ("socket_filter", _has(FactBit.FILTER), _word(FactBit.FILTER, "a socket filter", "no socket filter")),
    (
        "pacing",
        lambda facts: facts.pacing is not None,
        lambda facts: "no pacing" if facts.pacing is None else f"SO_MAX_PACING_RATE {facts.pacing} bytes/s",
    ),
)


def _list_options(evidence: Evidence) -> Iterator[Finding]:
    """What the sockets are, and what applications asked them for."""
    ends = evidence.facts
    for name, fails, word in _OPTIONS:
        if not any(ends):
            yield Finding(name, None, "not known: the sockets cannot be looked at")
            continue
        failed = [each is not None and fails(each) for each in ends]
        if name == "control_messages" and evidence.decision.tcp_inq == "refuse":
            asks = [each is not None and FactBit.INQ in each.bits for each in ends]
            failed = [one or other for one, other in zip(failed, asks, strict=True)]
        words = ["not known" if each is None else word(each) for each in ends]
        yield Finding(name, not any(failed), _both(words))
    yield _check_psock(evidence)


def _check_psock(evidence: Evidence) -> Finding:
    if not any(evidence.facts):
        return Finding("foreign_psock", None, "not known: the sockets cannot be looked at")
    words, passed = [], True
    for each in evidence.facts:
        if each is None:
            words.append("not known")
        elif FactBit.TAKEN_OVER in each.bits:
            words.append("in a sockmap whose program reads it")
            passed = False
        elif each.habit and REASON_NAMES[each.habit] == "foreign_psock":
            words.append("its process has put another socket into a sockmap")
            passed = False
        elif FactBit.USER_DATA in each.bits and not each.manner & (EndFlag.IN_MAP | EndFlag.LEFT):
            words.append("in somebody else's sockmap, or used by the kernel")
            passed = False
        else:
            words.append("in no other sockmap")
    return Finding("foreign_psock", passed, _both(words))


def _list_moments(evidence: Evidence) -> Iterator[Finding]:
    """Is it the time?"""
    pair = evidence.pair
    left = (pair.retry_ns - evidence.now_ns) / 1e9 if pair.state == STATE_PAIRED else 0.0
    if left > 0:
        so_far = f"{plural(pair.refusals, 'refusal')} and {plural(pair.drains, 'way')} back so far"
        yield Finding("pause", False, f"no further attempt for {left:.1f} s; longer each time: {so_far}")
    else:
        yield Finding("pause", True, "no pause between attempts to wait for")
    if pair.state != STATE_PAIRED:
        yield Finding("busy", True, "a moment without bytes in flight was found")
    elif evidence.reason == "busy":
        yield Finding("busy", False, "no moment without bytes in flight was found")
    elif evidence.reason == "pending":
        yield Finding("pending", None, "waits for a moment without bytes in flight")


def _settle(checks: list[Finding], evidence: Evidence) -> list[Finding]:
    """What the programs have found out is what holds, whatever is to be seen now: its check is a failed
    one."""
    reason = evidence.reason
    if not reason or reason in ("cold", "pending") or evidence.pair.state == STATE_SPLICED:
        return checks
    for place, each in enumerate(checks):
        if each.check != reason:
            continue
        if each.passed is not False:
            seen = "was seen, and stays remembered" if each.saw == "not seen" else f"now: {each.saw}"
            checks[place] = replace(each, passed=False, saw=f"failed when last looked at; {seen}")
        return checks
    return [*checks, Finding(reason, False, "it went back to plain TCP for this")]


# -- what comes of it ---------------------------------------------------------------------------------------


def _find_next(evidence: Evidence) -> tuple[str, float | None]:
    pair, reason, hot = evidence.pair, evidence.reason, evidence.hot_reads
    if pair.state == STATE_SPLICED:
        return "messages are redirected for as long as all of this holds", None
    if pair.state != STATE_PAIRED:
        waiting = [each for each in evidence.unread if each is not None]
        count = sum(each.redirected_bytes for each in waiting)
        return f"it is plain again once what was redirected is read ({count} bytes wait)", None
    if evidence.off_because == PAUSE:
        return "nothing, until splicer resume", None
    if evidence.off_because:
        return f"nothing, until {evidence.off_because} has measured", None
    if reason == "policy_off":
        return "nothing, until the policy changes; then it is looked at with its next read", None
    if reason == "pending":
        return (
            "it is spliced at the next moment without bytes in flight, within a second if there is one",
            0.0,
        )
    if pair.announced and reason in _FOR_GOOD:
        return "nothing: it stays plain for as long as it lives", None
    needs = [max(0, hot - each.reads) for each in (pair.client, pair.server)]
    left = max(0.0, (pair.retry_ns - evidence.now_ns) / 1e9)
    if pair.retry_ns:
        return f"it is tried again once both ends have read {hot} times after that", round(left, 3)
    words = " and ".join(
        f"the {side} has read {count} times more"
        for side, count in zip(("client", "server"), needs, strict=True)
        if count
    )
    return f"it is tried once {words}" if words else "it is tried with the next read", None


def _list_changes(reason: str, decision: Decision, port: int) -> Iterator[str]:
    if reason != "policy_off":
        remedy = REMEDIES.get(reason, Remedy(""))
        yield from (each.replace("{port}", str(port)) for each in remedy.changes)
        return
    source = decision.mode_source
    if source == PAUSE:
        yield "splicer resume"
    elif source == MEASUREMENT:
        yield "nothing: it is for a moment"
    elif source == "default":
        yield f"it is off where nobody says anything (--default off): splicer set --port {port} adaptive"
        yield "or the label splicer.enable=true on a container, or a [[policy]] table"
    else:
        said, _, end = source.rpartition(", of the ")
        kind, _, value = said.removeprefix("override of ").partition(" ")
        if said.startswith("override of "):
            yield f"splicer unset --{kind} {shlex.quote(value)}"
        elif said == "override":
            yield f"splicer unset, of the {end}'s container"
        else:
            yield f"{said}, which is about the {end}; until then splicer set, which comes before it"
