# SPDX-License-Identifier: Apache-2.0
"""What would have more bytes redirected: for each reason a setting, another application, or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from splicer.model import Coverage, Owner, PlainTraffic
from splicer.policy.labels import ENABLE

# Rows with less of all bytes are not worth a word.
LEAST_SHARE = 0.01
_MOST_CONNECTIONS = 1_048_576
_EARLY_READS = 4
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Remedy:
    """What can be done about a reason: in a few words, and in a sentence or two. No `text`: nothing that is
    worth advice. `changes` are for one connection, each in a line; {port} in them is the server's."""

    hint: str
    text: str = ""
    changes: tuple[str, ...] = ()


_APPLICATION = "the application"
_NOTHING = "nothing"
_LATER = "nothing; it is tried again"

REMEDIES: dict[str, Remedy] = {
    "": Remedy("nothing: spliced by now"),
    "cold": Remedy(
        "keep-alive, or advise",
        "These connections end, or one of their ends stops reading, before both have read often enough to "
        "be called hot. Keep them open: keep-alive, a pool. Or call them hot earlier.",
        changes=(
            "nothing is wrong: traffic does it",
            "for a service that you vouch for, from the first byte: splicer set --port {port} eager",
        ),
    ),
    "pending": Remedy("nothing: it is about to be", changes=("nothing is wrong: wait a moment",)),
    "blocking_reader": Remedy(
        "splicer advise",
        "An end sleeps in reads. Have it read without blocking, or wait in poll before it reads. Or accept "
        "what a spliced blocking socket does differently.",
        changes=(
            "have the program set O_NONBLOCK and wait in poll or epoll, as event loops do",
            'or a [[policy]] table with ports = {port} and blocking = "allow"; read KNOWN_ISSUES.md first',
        ),
    ),
    "splice_reader": Remedy(
        "reads without splice(2)",
        "The reading process uses splice(2). Many have a switch for that: HAProxy's splice options, "
        "Docker's userland-proxy.",
        changes=(
            "switch splice(2) off in the program that reads (HAProxy: no option splice-auto), and start it "
            "anew",
        ),
    ),
    "unknown_reader": Remedy(
        "another way to read",
        "Its reader uses a system call that does not see redirected bytes. read, recv, recvmsg and io_uring"
        " do.",
        changes=("have the program read with recv, recvmsg, read or readv",),
    ),
    "rcvlowat": Remedy(
        _APPLICATION,
        "An end has SO_RCVLOWAT; the application can do without.",
        changes=("have the program leave SO_RCVLOWAT at 1",),
    ),
    "zerocopy": Remedy(
        _APPLICATION,
        "An end has SO_ZEROCOPY; within a host it copies all the same.",
        changes=("have the program do without SO_ZEROCOPY on local connections",),
    ),
    "ulp": Remedy(
        _APPLICATION,
        "An end has kernel TLS; within a host the library can do it.",
        changes=("do without kernel TLS, or whichever upper layer protocol it is, on local connections",),
    ),
    "mptcp": Remedy(
        _APPLICATION,
        "It is Multipath TCP, of no use within a host: use plain TCP there.",
        changes=("have the program use plain TCP (Go: GODEBUG=multipathtcp=0)",),
    ),
    "repair": Remedy(_NOTHING, changes=("nothing: TCP_REPAIR is for a moment, as of CRIU",)),
    "kernel_socket": Remedy(_NOTHING, changes=("nothing: the kernel itself reads it, as for NFS",)),
    "peek_offset": Remedy(
        _APPLICATION,
        "An end has SO_PEEK_OFF; the application can do without.",
        changes=("have the program do without SO_PEEK_OFF",),
    ),
    "foreign_psock": Remedy(
        "see the neighbours below",
        "Another program has the socket in a sockmap. splicer status lists such neighbours at its end.",
        changes=("take it out of the other sockmap; splicer status lists who has some",),
    ),
    "policy_off": Remedy("splicer advise", "It is switched off."),
    "map_full": Remedy(
        "splicer advise",
        "There are more connections than splicer may follow.",
        changes=("more room, at the next start: --max-connections; splicer status says how much there is",),
    ),
    "backpressure": Remedy(
        "a faster reader",
        "Its reader falls behind. TCP holds the sender back meanwhile.",
        changes=("a faster reader; it is tried again after a pause",),
    ),
    "stream": Remedy(
        "nothing: TCP is faster", changes=("nothing: for one direction only plain TCP is faster",)
    ),
    "rescue": Remedy(
        "report it",
        "Bytes waited unread in a spliced socket. This should not happen: please report which programs they"
        " are.",
        changes=("nothing to set: it is tried again after a pause; report it if it happens often",),
    ),
    "stop": Remedy(_NOTHING),
    "request": Remedy(_LATER),
    "busy": Remedy(
        _LATER, changes=("a moment in which neither end has anything on its way; it is looked for again",)
    ),
    "closing": Remedy(_NOTHING),
    "waitall_reader": Remedy(
        "reads without MSG_WAITALL",
        "An end reads with MSG_WAITALL on a blocking socket.",
        changes=("have the program read without MSG_WAITALL",),
    ),
    "control_messages": Remedy(
        "splicer advise",
        "An end asked for timestamps, or for TCP_INQ where the policy refuses it.",
        changes=(
            "have the program do without timestamps",
            'or, if it was TCP_INQ, a [[policy]] table with ports = {port} and tcp_inq = "allow"',
        ),
    ),
    "socket_filter": Remedy(
        _APPLICATION,
        "An end has a socket filter, which sees no redirected bytes.",
        changes=("have the program do without SO_ATTACH_FILTER",),
    ),
    "pacing": Remedy(
        _APPLICATION,
        "An end has SO_MAX_PACING_RATE, of little use within a host.",
        changes=("have the program do without SO_MAX_PACING_RATE",),
    ),
    "unaccepted": Remedy(_LATER, changes=("have the server accept it, and both ends read",)),
    "forged": Remedy(_NOTHING, changes=("find out who uses TCP_REPAIR",)),
    "memory": Remedy(
        "more memory for its cgroup",
        "A send found no socket memory, in its cgroup or on the host.",
        changes=("more socket memory (net.ipv4.tcp_mem, or memory.max of the cgroup)",),
    ),
    "spinning_reader": Remedy(
        "nothing: TCP is faster",
        changes=("have the program wait in poll or epoll; TCP serves one that spins faster",),
    ),
    "network_gone": Remedy(_NOTHING, changes=("nothing: a link or an address that it used is gone",)),
}
"""Reason to what would change it."""


@dataclass(frozen=True)
class Facts:
    """What advice depends on: `default` is "on" or "off"; `tcp_inq` and `max_connections` as in Settings."""

    default: str
    tcp_inq: str
    max_connections: int
    hot_reads: int


@dataclass(frozen=True)
class Advice:
    """What to do about a row of the coverage. `what` says it in words, `risk` what one puts up with. `toml`
    is for the configuration file, `compose` for the server's service in a compose file, and `command` to be
    run; empty where there is none such."""

    client: Owner
    server: Owner
    reason: str
    plain_bytes: int
    share: float
    what: str
    risk: str = ""
    toml: str = ""
    compose: str = ""
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find(coverage: Coverage, facts: Facts) -> list[Advice]:
    """Advice for each row that is worth it, the largest first."""
    return list(_find(coverage.plain, facts))


def _find(rows: Iterable[PlainTraffic], facts: Facts) -> Iterable[Advice]:
    for row in rows:
        remedy = REMEDIES.get(row.reason)
        if remedy is not None and remedy.text and row.share >= LEAST_SHARE:
            setting = _find_setting(row, facts)
            yield Advice(
                row.client, row.server, row.reason, row.plain_bytes, row.share, remedy.text, **setting
            )


def _find_setting(row: PlainTraffic, facts: Facts) -> dict[str, str]:
    selector = _select(row.server)
    if row.reason == "blocking_reader" and selector:
        return {
            "toml": _rule(selector, 'blocking = "allow"'),
            "risk": "a blocking recv may return EAGAIN when a signal, a RST or a debugger interrupts it, and "
            "MSG_WAITALL may return less",
        }
    if row.reason == "cold":
        return _warm_up(facts)
    if row.reason == "policy_off":
        return _switch_on(row, selector, facts)
    if row.reason == "map_full" and facts.max_connections < _MOST_CONNECTIONS:
        more = min(2 * facts.max_connections, _MOST_CONNECTIONS)
        return {
            "toml": f"max_connections = {more}",
            "risk": "more memory in the kernel, and a start with new programs: spliced connections go back "
            "to TCP for a moment",
        }
    if row.reason == "control_messages" and selector and facts.tcp_inq == "refuse":
        return {
            "toml": _rule(selector, 'tcp_inq = "allow"'),
            "risk": "a recvmsg that asked for TCP_INQ is not told how many bytes are left",
        }
    return {}


def _warm_up(facts: Facts) -> dict[str, str]:
    if facts.hot_reads <= _EARLY_READS:
        return {}
    return {
        "toml": f"hot_reads = {_EARLY_READS}",
        "risk": "how an end reads is judged by fewer reads, and more connections are spliced that end soon "
        "after",
    }


def _switch_on(row: PlainTraffic, selector: str, facts: Facts) -> dict[str, str]:
    if facts.default == "on":
        # Somebody has said so, and policy says who.
        name = next((end.container for end in (row.server, row.client) if end.container), "")
        return {
            "command": f"splicer policy {name}".rstrip(),
            "risk": "whoever switched it off had a reason, a capture or a firewall for instance",
        }
    setting = {"risk": "tcpdump, firewall rules and interface counters do not see redirected bytes"}
    if selector:
        setting["toml"] = _rule(selector, 'mode = "adaptive"')
    service = row.server.service
    if re.fullmatch(r"[\w.-]+", service, re.ASCII) and _can_be_pasted(service):
        setting["compose"] = f'services:\n  {service}:\n    labels:\n      {ENABLE}: "true"'
    return setting


def _select(owner: Owner) -> str:
    """What selects this end in a [[policy]] table; empty if nothing does."""
    named = {"service": owner.service, "container": owner.container, "cgroup": owner.cgroup.strip("/")}
    for selector, name in named.items():
        if _can_be_pasted(name):
            return f"{selector} = {_quote(name)}"
    return ""


def _can_be_pasted(name: str) -> bool:
    """Whoever starts a container may write anything into a label."""
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable()


def _quote(text: str) -> str:
    """As a basic string of TOML, which JSON's are but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _rule(selector: str, said: str) -> str:
    return f"[[policy]]\n{selector}\n{said}"
