# SPDX-License-Identifier: Apache-2.0
"""What splicer knows about connections, in words: states, reasons, rows and totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1

# Labels by which compose and swarm say whose container it is; the first that is there counts.
PROJECT_LABELS = ("com.docker.compose.project", "io.podman.compose.project", "com.docker.stack.namespace")
SERVICE_LABELS = ("com.docker.compose.service", "io.podman.compose.service", "com.docker.swarm.service.name")

# A pair that is leaving (4) differs from one that drains in what its verdict does meanwhile.
STATES = {1: "paired", 2: "spliced", 3: "draining", 4: "draining"}

# Position is the number in `enum reason` of bpf/types.h; a kernel test compares the two.
_REASONS: tuple[tuple[str, str], ...] = (
    ("", "The connection is spliced."),
    ("cold", "Too few reads so far to call it hot; it is spliced once both ends have read often enough."),
    ("pending", "Both ends are hot and fit; adoption waits for a moment with nothing in flight."),
    (
        "blocking_reader",
        "An end sleeps in reads, or may (no O_NONBLOCK): a spliced socket cannot serve it faithfully.",
    ),
    ("splice_reader", "The reading process uses splice(2), which would never see redirected bytes."),
    ("unknown_reader", "An end is read by a system call that is not known to see redirected bytes."),
    ("rcvlowat", "An end has SO_RCVLOWAT above 1."),
    ("zerocopy", "An end has SO_ZEROCOPY."),
    ("ulp", "An end has an upper layer protocol such as kernel TLS."),
    ("mptcp", "An end belongs to a Multipath TCP connection."),
    ("repair", "An end is in TCP_REPAIR mode."),
    ("kernel_socket", "An end is used inside the kernel and not by a process."),
    ("peek_offset", "An end has SO_PEEK_OFF."),
    (
        "foreign_psock",
        "Another program has an end in a sockmap, or another socket of its process, or uses sk_user_data.",
    ),
    ("policy_off", "The policy of an end is off, or splicer is paused; splicer policy says why."),
    ("map_full", "The limit of --max-connections was reached, or the share of the client's cgroup in it."),
    ("backpressure", "The reader fell behind; TCP now holds the sender back."),
    ("stream", "One direction only, where plain TCP is faster."),
    ("rescue", "Bytes waited unread in a spliced socket; it went back to plain TCP."),
    ("stop", "splicer is stopping."),
    ("request", "An operator asked for it to be drained."),
    ("busy", "No moment without bytes in flight was found; another attempt follows."),
    ("closing", "An end has begun to close."),
    ("waitall_reader", "A blocking end is read with MSG_WAITALL, which a spliced socket does not honour."),
    (
        "control_messages",
        "An end asked for timestamps, or for TCP_INQ against the policy; redirected bytes carry neither.",
    ),
    ("socket_filter", "An end has a socket filter (SO_ATTACH_FILTER), which would not see redirected bytes."),
    ("pacing", "An end has SO_MAX_PACING_RATE, which redirected bytes would not obey."),
    ("unaccepted", "Eager: the server has not accepted the connection, or an end has not read from it."),
    ("forged", "Another socket claims to be an end of it, which takes TCP_REPAIR."),
    ("memory", "A send found no socket memory, in its cgroup or on the host; TCP always has a reserve."),
    ("spinning_reader", "A reader asks again and again whether there is anything, which TCP serves faster."),
    ("network_gone", "A link or an address of an end is gone; plain TCP stalls, or finds another way."),
)

REASON_NAMES: tuple[str, ...] = tuple(name for name, _ in _REASONS)
REASONS: dict[str, str] = {name: text for name, text in _REASONS if name}
"""Reason name to one sentence, for help texts and documents."""


TOP_KEYS = ("bytes", "redirected", "plain", "messages", "connections")
"""What `splicer top` can be sorted by: rates, and the number of connections."""

# The last ones are what the command adds to what the daemon tells.
MISSED = "missed"
DAEMON_GONE, DAEMON_BACK, DAEMON_RESTARTED = "daemon_gone", "daemon_back", "daemon_restarted"
EVENTS: dict[str, str] = {
    "spliced": "The connection was spliced. Without names: so many were, by an eager policy or by a walk.",
    "draining": "The connection begins to go back to plain TCP, for the reason named.",
    "rescued": "The same, since bytes waited unread in a spliced socket.",
    "refused": "It is not spliced, for the reason named. Without names: so many times since the last line.",
    "lost": "So many words of the programs did not reach the daemon, which was too slow.",
    "override": "splicer set or splicer unset has changed something.",
    "policy_changed": "The policy in the kernel is another one: by labels, rules, overrides, or a pause.",
    "policy_incomplete": "The policy does not fit into the kernel.",
    "bad_label": "A container has a label of ours that cannot be read.",
    "paused": "splicer pause.",
    "resumed": "splicer resume.",
    "drain_requested": "splicer drain.",
    "network_gone": "A link or an address was taken away; so many connections go back to plain TCP.",
    "reloaded": "The configuration was read again.",
    "reload_failed": "It could not be.",
    "restart_needed": "What has changed in it takes effect with the next start.",
    "census_taken": "Connections that are older than splicer were looked for.",
    "census_failed": "They could not be.",
    "docker_connected": "The container engine is reached.",
    "docker_lost": "It is not any more.",
    "docker_absent": "There is none to be reached.",
    "sweeps_held_up": "Ends cannot be put in or taken out in so many namespaces: somebody holds a lock.",
    "started": "The daemon is ready.",
    "signal": "The daemon was sent a signal.",
    "drained": "The daemon stops, and has taken back what was spliced.",
    MISSED: "So many events are not known any more here.",
    DAEMON_GONE: "The daemon does not answer; the command goes on trying.",
    DAEMON_BACK: "It answers again.",
    DAEMON_RESTARTED: "It is another process than before, and begins to count anew.",
}
"""Type of event to one sentence, for help texts and documents."""


@dataclass(frozen=True)
class Container:
    """A running container.

    `id` is 64 hexadecimal digits, `name` has no leading slash, `image` is as the engine names it. `pid` is
    its first process in the host's pid namespace. `cgroup` is the absolute path of its cgroup v2 directory,
    `cgroup_id` that directory's inode number, and `netns` the cookie of its network namespace; they are empty
    or 0 when not found. `network_mode` is "bridge", "host", "container:<id>" or a network's name. `addresses`
    are all in its namespace but loopback and link-local ones, without prefix length. `published` looks like
    "0.0.0.0:8080->80/tcp". `pod` is the name of Podman's pod that it is in. It and `annotations` are empty
    where the engine does not tell.
    """

    id: str
    name: str
    image: str
    labels: Mapping[str, str]
    pid: int = 0
    cgroup: str = ""
    cgroup_id: int = 0
    netns: int = 0
    network_mode: str = ""
    addresses: tuple[str, ...] = ()
    published: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    pod: str = ""

    @property
    def labels_and_annotations(self) -> Mapping[str, str]:
        """What both say. An annotation comes before a label of that name, which may be the image's."""
        return {**self.labels, **self.annotations}

    @property
    def project(self) -> str:
        """Compose project or swarm stack; empty if it is of none."""
        return next((self.labels[label] for label in PROJECT_LABELS if label in self.labels), "")

    @property
    def service(self) -> str:
        """Compose or swarm service; empty if it is of none."""
        return next((self.labels[label] for label in SERVICE_LABELS if label in self.labels), "")


@dataclass(frozen=True)
class Owner:
    """Whose end of a connection it is; what is not known is empty or 0.

    `process`, `command` and `pid` (in this process's pid namespace) are those of the last reader. `pod` is
    the uid of a Kubernetes pod, or the name of a pod of Podman's. `cgroup` is the path below the root of the
    hierarchy.
    """

    container: str = ""
    service: str = ""
    project: str = ""
    pod: str = ""
    process: str = ""
    pid: int = 0
    command: str = ""
    cgroup: str = ""


@dataclass(frozen=True)
class Unread:
    """Bytes that wait at an end: redirected, and come through TCP."""

    redirected_bytes: int
    tcp_bytes: int


@dataclass(frozen=True)
class Flow:
    """One connection with both ends on this host.

    `local` and `remote` are the client's view, `peer` is the address the server itself has (another one
    than `remote` under DNAT). `netns` and `peer_netns` are network namespace cookies of client and server.
    Counts cover both directions since pairing, bytes and messages through the redirect only. What waits
    unread at an end is None unless it was asked for, the connection is spliced or draining, and the kernel
    tells.
    """

    local: str
    remote: str
    peer: str
    netns: int
    peer_netns: int
    state: str
    reason: str
    redirected_bytes: int
    redirected_messages: int
    passed_messages: int
    age_seconds: float
    client: Owner = Owner()
    server: Owner = Owner()
    client_unread: Unread | None = None
    server_unread: Unread | None = None

    def to_json(self) -> dict[str, Any]:
        # As asdict() does it, which is ten times as slow. There may be hundreds of thousands.
        return {name: _to_json(value) for name, value in vars(self).items()}


def _to_json(value: Any) -> Any:
    return dict(vars(value)) if isinstance(value, Owner | Unread) else value


# Where BPF programs of others can be that have to do with the same sockets, and what it means.
_BESIDE = "runs beside ours, as if alone"
_TAKES = "its sockets are plain, or become so"
HOOKS: dict[str, str] = {
    "sock_ops": _BESIDE,
    "setsockopt": _BESIDE,
    "getsockopt": _BESIDE,
    "connect4": _BESIDE,
    "connect6": _BESIDE,
    "sk_msg": "its sockets stay plain",
    "skb_parser": _TAKES,
    "skb_verdict": _TAKES,
    "sockmap": "no program; its sockets stay as they are",
    "sk_lookup": "chooses listeners, and no more",
}
"""Hook to what it means for connections, in a few words; docs/operations.md says more."""

ANOTHER_SPLICER = "another splicer, or left by one"


@dataclass(frozen=True)
class Neighbour:
    """A BPF program of somebody else at a hook that splicer uses, or their sockmap without programs.

    `hook` is a key of HOOKS, `program` the program's name as the kernel has it and `id` its id, empty and 0
    for a map without programs. `place` is "cgroup", "map" or "netns", `where` the path, the map's name, or
    the network namespace as /proc names it, and `where_id` the cgroup's id, the map's, or the
    namespace's inode number. `is_splicer` is true if it has the name and type of one of splicer's own.
    """

    hook: str
    program: str
    id: int
    place: str
    where: str
    where_id: int
    is_splicer: bool = False

    @property
    def meaning(self) -> str:
        """What it means for connections, in a few words."""
        return ANOTHER_SPLICER if self.is_splicer else HOOKS[self.hook]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "meaning": self.meaning}


@dataclass(frozen=True)
class Neighbourhood:
    """All that were found, and what could not be looked at: a line for each such thing, with the reason."""

    neighbours: tuple[Neighbour, ...] = ()
    unknown: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"others": [each.to_json() for each in self.neighbours], "unknown": list(self.unknown)}


@dataclass(frozen=True)
class Connections:
    """Connections per state at one moment."""

    paired: int = 0
    spliced: int = 0
    draining: int = 0


@dataclass(frozen=True)
class Totals:
    """Counts since the programs were loaded; they survive a restart of the daemon.

    A message is what one send(2) has sent, or up to 32 KiB of it.
    """

    paired: int = 0
    spliced: int = 0
    drained: int = 0
    redirected_bytes: int = 0
    redirected_messages: int = 0
    passed_messages: int = 0
    rescued: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Traffic:
    """What was redirected between two owners, closed connections and open ones; processes are not told
    apart."""

    client: Owner
    server: Owner
    connections: int
    redirected_bytes: int
    redirected_messages: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PlainTraffic:
    """Bytes between two owners that TCP has carried, both ways, and why they were not redirected: a reason,
    empty for those of connections that are spliced by now. `connections` are those that carried them, 0 if
    that is not known any more. `share` is of all bytes of local connections."""

    client: Owner
    server: Owner
    reason: str
    connections: int
    plain_bytes: int
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Coverage:
    """How much of what local connections carry is redirected.

    Bytes are those of applications, both ways, since the programs were loaded: at `since`, in seconds since
    the epoch. A connection's bytes through TCP count for the reason that it has now, or had when it was
    closed. `plain` has the largest rows, `others_bytes` what is in none of them. Not `is_complete`: what TCP
    carries of connections that are open counts when they close. `older_uncounted` is how many connections
    that are older than splicer are not counted, None if nobody has looked for them.
    """

    since: float
    redirected_bytes: int
    plain_bytes: int
    plain: tuple[PlainTraffic, ...] = ()
    others_bytes: int = 0
    is_complete: bool = True
    older_uncounted: int | None = 0

    @property
    def share(self) -> float | None:
        """Of all bytes, those that are redirected: 0 to 1; None if there are no bytes."""
        everything = self.redirected_bytes + self.plain_bytes
        return self.redirected_bytes / everything if everything else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class Status:
    """Answer to `splicer status`.

    `docker` and `problems` are what the watcher and the labels' reader say; `healthy` is for a health check:
    the daemon's loop turns, and the policy is in the kernel; `trouble` says which of them is not so.
    `kernel_class` is the kernel's by itself, and `fionread` says who sees to it that FIONREAD counts all
    bytes of a spliced socket: "kernel", "splicer" or "nobody". `adoption` is "name" or, where enlist cannot
    be run, "walk". `blocking_readers` is "told apart" or, where the programs cannot tell who sleeps in a
    read, "refused". `census` says what became of connections that are older than the programs; see class
    CensusReport. `networks` says whether losses of networks are heard of ("hears"), looked for ("asks"), or
    neither ("unavailable"), and in which namespaces (cookies). `leases` says whether busy spliced connections
    get a packet each way through TCP once in so many seconds ("kept"), or not ("off", or "forbidden" without
    CAP_NET_RAW); see class LeaseKeeper. `paused` is empty unless splicing is, and `reload` unless the
    configuration could not be read again; see class ReloadReport. `neighbours` are others that use BPF at the
    same hooks; see class Neighbourhood. `coverage` is how much is redirected; see class Coverage. Both are
    empty unless they were asked for. `hold` says what a measurement keeps plain, and for how long; see class
    Holds.
    """

    pid: int
    version: str
    mode: str
    cgroup: str
    connections: Connections
    totals: Totals
    running: bool = True
    kernel_class: str = ""
    fionread: str = ""
    adoption: str = ""
    blocking_readers: str = ""
    uptime_seconds: float = 0.0
    default: str = "on"
    healthy: bool = True
    trouble: str = ""
    docker: dict[str, Any] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    leases: dict[str, Any] = field(default_factory=dict)
    paused: dict[str, Any] = field(default_factory=dict)
    reload: dict[str, Any] = field(default_factory=dict)
    neighbours: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    hold: dict[str, Any] = field(default_factory=dict)
    traffic: list[Traffic] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}
