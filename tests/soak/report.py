# SPDX-License-Identifier: Apache-2.0
"""Judgement and report of a run: which promises held, in text and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from soak.findings import Findings
from soak.plans import EXACT
from soak.services import EAGER
from soak.tally import percentile, pick
from soak.watch import Life

SCHEMA = 1
KINDS = ("plain", "spliced")  # of connections
DENIED_AT_MOST = 5.0  # seconds
WENT_BACK = ("backpressure", "busy", "policy_off", "request", "rescue", "stream", "unaccepted")
STALL_BEYOND_PLAIN = 0.25  # seconds
AROUND = 6.0  # seconds
LATE = 5.0  # seconds after the beginning of what makes readers late
RESCUED_AFTER = 0.04  # seconds in which a reader has not moved
WAITED = 0.06  # seconds; more than a delayed acknowledgement: it was asked, and said that there is nothing
MAKE_LATE = ("pause", "quota", "memory", "restart_while_paused")
ENDS = ("local", "remote")
HOT_READS = 16  # of each end, before a pair is spliced: splicer's default
LONGEST_POLICY = 6.0  # seconds that a policy of the chaos may be in force
SHOWN = 6  # of each kind of what is told in full; JSON has all
GRACE = 1.0  # seconds between a death and what its peers notice
MIN_REDIRECTED_SHARE = 0.08  # of the messages of connections made while splicer ran
# Transitions, times the number of connections kept open. Those of a daemon that stops are not seen.
MIN_SPLICED_PER_CONNECTION = 0.5
MIN_DRAINED_PER_CONNECTION = 0.1
# Memory grows in steps to a plateau within a minute or so; a leak goes on.
RESIDENT_GROWTH_KIB = 8 * 1024
RESIDENT_GROWTH = 1.2
MOST_RESIDENT_KIB = 64 * 1024
FILES_GROWTH = 6
JUDGED_SECONDS = 30.0  # a daemon that lived shorter says nothing about its memory


@dataclass(frozen=True)
class Promise:
    name: str
    kept: bool
    detail: str


def is_excused(complaint: dict[str, Any], killed: dict[str, float]) -> bool:
    """True if the connection broke off because its peer was killed.

    The peer is known by name, unless the connection ended before it had introduced itself; then it may have
    been any worker of the other role.
    """
    when = float(complaint.get("time", 0.0))
    if complaint.get("peer"):
        died = killed.get(complaint["peer"])
        return died is not None and died <= when + GRACE
    role = "client" if complaint["side"] == "server" else "server"
    born = float(complaint.get("born", when))
    return any(role in name and born - GRACE <= died <= when + GRACE for name, died in killed.items())


def count_halted(complaint: dict[str, Any], halts: list[tuple[str, float, float]]) -> float:
    """Seconds of a connection's silence in which its two workers were stopped, by plan."""
    end = float(complaint["time"])
    begin = end - float(complaint["quiet"])
    names = (complaint.get("worker"), complaint.get("peer"))
    return sum(max(0.0, min(end, until) - max(begin, since)) for name, since, until in halts if name in names)


def is_stuck(complaint: dict[str, Any], findings: Findings) -> bool:
    """True if nothing moved for too long, the time left out in which a worker was stopped."""
    if is_excused(complaint, findings.killed):
        return False
    return float(complaint["quiet"]) - count_halted(complaint, findings.halts) >= findings.patience


def judge(findings: Findings) -> list[Promise]:
    """The promises, and whether they were kept."""
    options, watch = findings.options, findings.watch
    assert watch is not None
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for complaint in findings.complaints:
        by_kind.setdefault(complaint["kind"], []).append(complaint)
    faults = by_kind.get("fault", [])
    given_up = {each["conn"] for each in by_kind.get("stuck", [])}  # the other end breaks off for that
    cuts = [each for each in by_kind.get("cut", []) if not is_excused(each, findings.killed)]
    cuts = [each for each in cuts if each["conn"] not in given_up]
    stuck = [each for each in by_kind.get("stuck", []) if is_stuck(each, findings)]
    over, denied_long = find_stalls_over(findings), find_denied_stalls(findings)
    totals = watch.totals
    messages = sum(pick(findings.tally.counters["messages"], "spliced").values())
    everything = not (options.patterns or options.kinds)
    wanted = int(options.connections * MIN_SPLICED_PER_CONNECTION) if everything else 1
    wanted_drained = int(options.connections * MIN_DRAINED_PER_CONNECTION) if everything else 0
    wanted_redirected = int(messages * MIN_REDIRECTED_SHARE)
    # Of readers that believed FIONREAD, which on a kernel of class B says 0, and of those that were late.
    late = count_late(findings)
    denied = sum(pick(findings.tally.counters["denied"], "spliced").values())
    grown = [text for life in watch.lives if (text := find_growth(life))]
    ends = findings.still_open
    redirected = totals["redirected_messages"]
    enough = totals["spliced"] >= wanted and totals["drained"] >= wanted_drained
    worked = (
        f"{redirected} messages redirected (at least {wanted_redirected}), "
        f"{totals['spliced']} times spliced (at least {wanted}), {totals['drained']} drained "
        f"(at least {wanted_drained})"
    )
    entries = ", ".join(f"{name} {n}" for name, n in findings.entries.items())
    limit = plain_bound(findings) * 1000
    longest_denied = max((each["seconds"] for each in denied_long), default=0.0)
    trouble = [*findings.daemon_deaths, *grown]
    no_memory = {kind: sum(pick(findings.tally.counters["no_memory"], kind).values()) for kind in KINDS}
    verdicts = {
        "no byte lost, repeated, foreign or misordered": (not faults, f"{len(faults)} faults"),
        "no connection broken": (not cuts, f"{len(cuts)} broke off without a reason"),
        "no connection stuck": (not stuck and not ends, f"{len(stuck)} stuck, {ends} ends open at the end"),
        "no stall beyond plain TCP's": (not over, f"{len(over)} over {limit:.0f} ms"),
        "class B: who trusts FIONREAD waits for seconds at most": (
            longest_denied <= DENIED_AT_MOST,
            f"{len(denied_long)} over {limit:.0f} ms, eager or gone back; longest {longest_denied:.2f} s",
        ),
        "no send fails for want of memory": (
            not no_memory["plain"] and (not no_memory["spliced"] or bool(findings.chaos["socket_memory"])),
            f"{no_memory['plain']} plain, {no_memory['spliced']} spliced",
        ),
        "rescued is 0, or explained": (
            totals["rescued"] <= denied + max(late, findings.rescued_in_pauses),
            f"{totals['rescued']} rescued; {denied} times FIONREAD said 0 for 30 ms or longer, "
            f"{late} readers were slow, stopped, throttled or busy; {findings.rescued_in_pauses} right after "
            "the machine had stood still",
        ),
        "the daemon stays up and flat": (not trouble, "; ".join(trouble) or "no deaths, no growth"),
        "maps are empty afterwards": (
            bool(findings.entries) and not any(findings.entries.values()),
            entries or "not looked at",
        ),
        "workers stay up": (not findings.dead_workers, "; ".join(findings.dead_workers) or "all did"),
        "nothing is left behind": (not findings.left_behind, findings.left_behind or "nothing"),
        "splicing was at work": (redirected >= wanted_redirected > 0 and enough, worked),
        "the run was complete": (not findings.interrupted, "interrupted" if findings.interrupted else "yes"),
    }
    return [Promise(name, kept, detail) for name, (kept, detail) in verdicts.items()]


def count_late(findings: Findings) -> int:
    """Rescued flows with a reader that pauses by plan, that was stopped or throttled, or that was not asked,
    because its process was busy with others."""
    assert findings.watch is not None
    slow = {
        end[name].rpartition(":")[2]
        for end in findings.described
        if end["pause"] or (end["lag"] > RESCUED_AFTER and end["stalled"] < WAITED)
        for name in ENDS
    }
    late = [when for when, what in findings.events if what in MAKE_LATE]
    return sum(
        each.flow["local"].rpartition(":")[2] in slow or any(0 < each.time - when < LATE for when in late)
        for each in findings.watch.rescues
    )


def plain_bound(findings: Findings) -> float:
    """The longest stall that is allowed, in seconds."""
    return find_longest(findings, "plain") + STALL_BEYOND_PLAIN


def find_longest(findings: Findings, kind: str) -> float:
    """The longest stall of a class, in seconds, whatever excuses it."""
    measured = [each["seconds"] for each in findings.tally.worst[kind]]
    if kind == "plain":
        measured += [each["seconds"] for each in findings.stalls if was_never_spliced(each, findings.events)]
    return max(measured, default=0.0)


def find_stalls_over(findings: Findings) -> list[dict[str, Any]]:
    """The stalls of spliced connections that are too long, those that are known left out."""
    return [each for each in _find_long(findings) if not was_denied(each, findings)]


def find_denied_stalls(findings: Findings) -> list[dict[str, Any]]:
    """Those of them that a kernel of class B is known for (KNOWN_ISSUES.md: FIONREAD, while it goes back)."""
    return [each for each in _find_long(findings) if was_denied(each, findings)]


def _find_long(findings: Findings) -> list[dict[str, Any]]:
    bound = plain_bound(findings)
    return [
        each
        for each in findings.stalls
        if each["spliced"] and each["seconds"] > bound and not is_known(each, findings.no_daemon)
    ]


def was_denied(stall: dict[str, Any], findings: Findings) -> bool:
    """True on class B for readers that trust FIONREAD, on connections whose TCP bytes it may not count for
    longer than a moment: eager ones, and those that went back."""
    if findings.watch is None or findings.watch.kernel_class != "B" or stall["read"] != EXACT:
        return False
    flow = stall.get("flow")
    back = flow and flow["state"] != "spliced" and flow["reason"] in WENT_BACK
    return bool(back or _is_at_eager_port(stall))


def _is_at_eager_port(stall: dict[str, Any]) -> bool:
    return any(stall[name].endswith(f":{EAGER}") for name in ENDS)


def was_never_spliced(stall: dict[str, Any], events: list[tuple[float, str]]) -> bool:
    """True if the connection was plain TCP so far, although splicer ran.

    Its flow says so; or, where it was closed before anybody could look, this end has sent too few times for
    the other to be hot, and nothing made it eager.
    """
    if not stall["spliced"]:
        return False
    flow = stall.get("flow")
    if flow:
        untouched = not flow["redirected_messages"] + flow["passed_messages"]
        plain = flow["reason"] in ("cold", "policy_off", "blocking_reader")
        return bool(untouched and plain and flow["state"] == "paired")
    since = stall["time"] - stall["age"] - LONGEST_POLICY
    eager = any("eager" in what and since < when < stall["time"] for when, what in events)
    return bool(stall["sends"] < HOT_READS and not eager and not _is_at_eager_port(stall))


def is_known(stall: dict[str, Any], no_daemon: list[tuple[float, float]]) -> bool:
    """True for readers that trust FIONREAD while no daemon runs (ARCHITECTURE.md: Crash, stop, upgrade)."""
    began, ended = stall["time"] - stall["seconds"], stall["time"]
    without = any(began < until + GRACE and since < ended for since, until in no_daemon)
    return bool(stall["read"] == EXACT and without)


def _find_around(findings: Findings, stall: dict[str, Any]) -> list[str]:
    """What happened around a stall: seconds from its beginning, and the event."""
    began = stall["time"] - stall["seconds"]
    return [
        f"{when - began:+.2f} {what}"
        for when, what in findings.events
        if began - AROUND < when < stall["time"] + 0.1
    ]


def find_growth(life: Life) -> str:
    """In words; empty if the daemon stayed flat."""
    settled = life.settled
    most = max((each[1] for each in life.samples), default=0)
    if most > MOST_RESIDENT_KIB:
        return f"pid {life.pid} had {most} KiB resident"
    if not settled or settled[-1][0] - settled[0][0] < JUDGED_SECONDS:
        return ""
    third = max(1, len(settled) // 3)
    early, late = settled[:third], settled[-third:]
    before, after = (median(each[1] for each in part) for part in (early, late))
    if after > max(before + RESIDENT_GROWTH_KIB, before * RESIDENT_GROWTH):
        return f"pid {life.pid} grew from {before:.0f} to {after:.0f} KiB"
    # The least of each part: a request that is being served has files of its own.
    before, after = (min(each[2] for each in part) for part in (early, late))
    if after > before + FILES_GROWTH:
        return f"pid {life.pid} had {before} files open, then {after}"
    return ""


def to_json(findings: Findings, promises: list[Promise]) -> dict[str, Any]:
    """Everything the text says, and more."""
    options, watch, tally = findings.options, findings.watch, findings.tally
    assert watch is not None
    totals = watch.totals
    stalls = {}
    for kind in KINDS:
        measured = pick(tally.counters["stalls"], kind)
        stalls[kind] = {
            "measured": sum(measured.values()),
            "p99_seconds": percentile(measured, 0.99),
            "p999_seconds": percentile(measured, 0.999),
            "max_seconds": find_longest(findings, kind),
        }
    lives = [life for life in watch.lives if life.samples]
    samples = [sample for life in lives for sample in (life.settled or life.samples)]
    places = [samples[0], samples[len(samples) // 2], samples[-1]] if samples else []
    return {
        "schema": SCHEMA,
        "ok": all(promise.kept for promise in promises),
        "seed": options.seed,
        "seconds": round(findings.seconds, 1),
        "connections_kept_open": options.connections,
        "promises": [{"name": each.name, "kept": each.kept, "detail": each.detail} for each in promises],
        "moved": {
            kind: {
                "bytes": sum(pick(tally.counters["bytes"], kind).values()),
                "messages": sum(pick(tally.counters["messages"], kind).values()),
                "connections": sum(pick(tally.counters["connections"], kind).values()),
            }
            for kind in KINDS
        },
        "patterns": {kind: pick(tally.counters["connections"], kind) for kind in KINDS},
        "ends": {kind: pick(tally.counters["ended"], kind) for kind in KINDS},
        "refused": findings.refused,
        "splicer": {
            **{name: totals[name] for name in sorted(totals) if not name.startswith("refused ")},
            "refused": {
                name.partition(" ")[2]: n for name, n in sorted(totals.items()) if name.startswith("refused ")
            },
            "went_back": dict(watch.reasons.most_common()),
            "most_spliced_at_once": watch.most_spliced,
            "median_share_spliced": round(median(watch.shares), 3) if watch.shares else 0.0,
        },
        "chaos": dict(sorted(findings.chaos.items())),
        "not_done": findings.not_done,
        "cpu_quota": findings.cpu or "stop and continue",
        "memory_limit": {
            "by": findings.memory or "none",
            "refused_allocations": findings.memory_refused,
            "workers_killed": findings.out_of_memory,
            "sends_failed": {kind: sum(pick(tally.counters["no_memory"], kind).values()) for kind in KINDS},
        },
        "stops": {
            "orderly": findings.stops,
            "while_workers_were_stopped": findings.stops_while_stopped,
            "connections_left_unread": findings.unread,
        },
        "stalls": stalls,
        "denied": {kind: pick(tally.counters["denied"], kind) for kind in KINDS},
        "stalls_over": [
            each | {"around": _find_around(findings, each)} for each in find_stalls_over(findings)
        ],
        "worst_stalls": tally.worst,
        "long_stalls": [
            each | {"excused": is_known(each, findings.no_daemon), "around": _find_around(findings, each)}
            for each in findings.stalls
        ],
        "complaints": [
            {**each, "excused": each["kind"] in ("cut", "stuck") and is_excused(each, findings.killed)}
            for each in findings.complaints
        ],
        "described": findings.described,
        "rescues": [
            {
                "flow": each.flow,
                "before": each.before,
                "around": _find_around(findings, {"time": each.time, "seconds": 0.0}),
            }
            for each in watch.rescues
        ],
        "daemon": {
            "lives": len(lives),
            "resident_series_kib": [[each[1] for each in life.samples] for life in lives],
            "resident_kib": [each[1] for each in places],
            "most_resident_kib": max((each[1] for each in samples), default=0),
            "open_files": [each[2] for each in places],
            "silent": watch.silent,
        },
        "entries_left": findings.entries,
    }


def to_text(document: dict[str, Any]) -> str:
    """For people."""
    moved, splicer, stalls = document["moved"], document["splicer"], document["stalls"]
    lines = [
        f"seed {document['seed']}, {document['seconds']:.0f} s, "
        f"{document['connections_kept_open']} connections at once",
        "",
        *(
            f"{kind:8} {moved[kind]['connections']:>8} connections {moved[kind]['messages']:>10} messages "
            f"{moved[kind]['bytes'] / 1e6:>10.1f} MB"
            for kind in KINDS
        ),
        f"redirected {splicer.get('redirected_messages', 0)} messages, "
        f"{splicer.get('redirected_bytes', 0) / 1e6:.1f} MB; passed {splicer.get('passed_messages', 0)}",
        f"spliced {splicer.get('spliced', 0)} times, drained {splicer.get('drained', 0)}, rescued "
        f"{splicer.get('rescued', 0)}; up to {splicer['most_spliced_at_once']} at once, "
        f"{splicer['median_share_spliced']:.0%} of the connections at the median",
        f"went back (of those seen by looking every two seconds): {_list(splicer['went_back'])}",
        f"refused: {_list(splicer['refused'])}",
        f"chaos: {_list(document['chaos'])}; cpu quota by {document['cpu_quota']}",
        "memory limited by {by}: {refused_allocations} allocations had to wait or failed, "
        "{workers_killed} workers killed for it".format_map(document["memory_limit"]),
        "orderly stops of splicer: {orderly}, of them while workers were stopped or throttled "
        "{while_workers_were_stopped}; {connections_left_unread} connections left unread".format_map(
            document["stops"]
        ),
        *(f"not done: {kind}: {why}" for kind, why in document["not_done"].items()),
        *(f"ends, {kind}: {_list(document['ends'][kind])}" for kind in KINDS),
        "",
        *(
            f"stalls, {kind:8} p99 {stalls[kind]['p99_seconds'] * 1000:8.2f} ms   p99.9 "
            f"{stalls[kind]['p999_seconds'] * 1000:8.2f} ms   max "
            f"{stalls[kind]['max_seconds'] * 1000:8.2f} ms   of {stalls[kind]['measured']}"
            for kind in KINDS
        ),
        f"daemon: {document['daemon']['lives']} lives, resident at start, middle and end "
        f"{_series(document['daemon']['resident_kib'])} KiB, open files "
        f"{_series(document['daemon']['open_files'])}",
        f"left in maps: {_list(document['entries_left'])}",
        "",
    ]
    for each in document["rescues"][:SHOWN]:
        lines += [f"rescued: {each['flow']}", f"  before: {each['before']}, around: {each['around']}"]
    lines += [f"an end of a rescued flow: {each}" for each in document["described"][:SHOWN]]
    excused = sum(each["excused"] for each in document["long_stalls"])
    if excused:
        lines.append(f"{excused} long stalls of readers that trust FIONREAD while no daemon ran")
    for each in document["stalls_over"][:SHOWN]:
        lines.append(f"stall: {each}")
    shown: Counter[str] = Counter()
    for each in document["complaints"]:
        if each["kind"] == "quiet" or each["excused"]:
            continue
        shown[each["kind"]] += 1
        if shown[each["kind"]] <= SHOWN:
            lines.append(f"{each['kind']}: {each}")
    excused = sum(each["excused"] for each in document["complaints"])
    lines.append(f"{excused} connections broke off because their peer had been killed")
    lines += [
        f"{'kept  ' if each['kept'] else 'BROKEN'} {each['name']}: {each['detail']}"
        for each in document["promises"]
    ]
    lines.append("all promises were kept" if document["ok"] else "FAILED")
    return "\n".join(lines)


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def _series(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "none"
