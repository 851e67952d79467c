# SPDX-License-Identifier: Apache-2.0
"""Answers `splicer explain`: finds the connections that are meant, known or not, and what there is to say of
them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splicer.daemon.account import Account, Evidence, Finding, describe
from splicer.daemon.attempts import Attempts
from splicer.daemon.attribution import Attribution
from splicer.daemon.judge import Judge, Judges, split_endpoint
from splicer.errors import USAGE, SplicerError
from splicer.host import process, scopes, sockets
from splicer.host.cgroups import Cgroup
from splicer.host.namespaces import Directory
from splicer.host.sockets import Endpoint, Ends, Socket
from splicer.kernel.gauge import Gauge
from splicer.kernel.layout import (
    COUNT_REFUSED,
    Pair,
    pack_endpoint,
    read_addresses,
    read_pair,
    read_seed,
    read_seed_end,
)
from splicer.kernel.libbpf import Map
from splicer.kernel.sweep import Sweeper
from splicer.kernel.tenants import read_room
from splicer.model import REASON_NAMES, SCHEMA, STATES, Owner
from splicer.policy.reconciler import PolicyReconciler

# So many kinds of connections are told of, and so many connections of a process are looked for.
_MOST_KINDS = 20
_MOST_SOCKETS = 500


@dataclass(frozen=True)
class _Told:
    """A connection with what there is to say of it; `count`: so many are alike."""

    local: str
    remote: str
    peer: str
    netns: int
    peer_netns: int
    state: str
    reason: str
    client: Owner
    server: Owner
    account: Account
    count: int = 1

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike of those that need be told of once."""
        port = split_endpoint(self.remote)[1]
        return self.state, self.reason, self.client.container, self.server.container, self.peer_netns, port

    def to_json(self, count: int) -> dict[str, Any]:
        document = asdict(self)
        account = document.pop("account")
        return {**document, **account, "count": count}


class Explainer:
    """Explains connections of one generation of programs. Used by one thread at a time."""

    def __init__(
        self,
        cgroup: Cgroup,
        maps: Mapping[str, Map],
        sweeper: Sweeper,
        gauge: Gauge | None,
        reconciler: PolicyReconciler,
        attribution: Attribution,
        attempts: Attempts,
        describe_census: Callable[[], dict[str, Any]],
        v2_root: str,
    ) -> None:
        self._cgroup = cgroup
        self._maps = maps
        self._gauge = gauge
        self._sweeper = sweeper
        self._reconciler = reconciler
        self._judges = Judges(reconciler, attribution)
        self._attribution = attribution
        self._attempts = attempts
        self._describe_census = describe_census
        self._root = v2_root.rstrip("/")
        self._directory = Directory()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request with `local` and `remote`, or `subject`: a container, or a pid. Raises
        SplicerError."""
        local, remote, subject = (request.get(key) for key in ("local", "remote", "subject"))
        if isinstance(local, str) and isinstance(remote, str):
            asked = f"{local} {remote}"
            told = self._explain_addresses(_read_endpoint(local), _read_endpoint(remote))
        elif isinstance(subject, str) and subject:
            asked = subject
            told = list(self._explain_sockets(self._list_sockets(subject)))
        else:
            raise SplicerError(
                "which connection?", hint="splicer explain 10.0.0.1:40000 10.0.0.2:80", exit_code=USAGE
            )
        groups: dict[tuple[object, ...], list[_Told]] = {}
        for each in told:
            groups.setdefault(each.kind, []).append(each)
        chosen = sorted(groups.values(), key=lambda group: -len(group))
        return {
            "schema": SCHEMA,
            "asked": asked,
            "connections": [group[0].to_json(len(group)) for group in chosen[:_MOST_KINDS]],
            "left_out": sum(len(group) for group in chosen[_MOST_KINDS:]),
        }

    # -- what is meant ---------------------------------------------------------------------------------------

    def _list_sockets(self, subject: str) -> list[Socket]:
        """The connections of a process, or of all processes of a container."""
        if subject.isascii() and subject.isdigit():
            try:
                found = sockets.list_of_process(int(subject))
            except OSError as error:
                raise SplicerError(
                    f"cannot look at the sockets of that process ({subject}: {error.strerror})",
                    hint="find it with: ss -tnp; or ask for a container, or for two addresses",
                ) from error
            return found[:_MOST_SOCKETS]
        seen: dict[int, Socket] = {}
        for container in self._reconciler.find_containers(subject):
            for pid in scopes.list_processes(container.cgroup):
                try:
                    seen |= {each.inode: each for each in sockets.list_of_process(pid)}
                except OSError:
                    continue  # it has ended
                if len(seen) >= _MOST_SOCKETS:
                    break
        return list(seen.values())[:_MOST_SOCKETS]

    def _explain_sockets(self, found: Iterable[Socket]) -> Iterator[_Told]:
        wanted = {(each.local, each.remote): each for each in found}
        if not wanted:
            return
        judge = self._judges.make()
        known: dict[Ends, list[Pair]] = {}
        for pair, ends in self._find_pairs(wanted.keys()):
            known.setdefault(ends, []).append(pair)
        told: set[int] = set()
        unknown: list[Socket] = []
        for ends, each in wanted.items():
            pairs = [
                pair
                for pair in known.get(ends, ())
                if each.netns in (pair.client.netns, pair.server.netns) or not pair.client.netns
            ]
            for pair in pairs:
                if pair.name not in told:  # of a process that has both ends
                    told.add(pair.name)
                    yield self._explain_known(pair, judge)
            if not pairs:
                unknown.append(each)
        yield from self._explain_all_unknown(unknown)

    def _explain_addresses(self, local: Endpoint, remote: Endpoint) -> list[_Told]:
        judge = self._judges.make()
        pairs = {pair.name: pair for pair, _ in self._find_pairs([(local, remote), (remote, local)])}
        told = [self._explain_known(pair, judge) for pair in pairs.values()]
        if told:
            return told
        found = sockets.find([(local, remote), (remote, local)], self._directory)
        [either, other] = found.values()
        return list(self._explain_all_unknown(either or other)) or [self._explain_nobody(local, remote)]

    def _find_pairs(self, wanted: Iterable[Ends]) -> Iterator[tuple[Pair, Ends]]:
        """Those that have an end with these addresses, with them."""
        packed = {
            pack_endpoint(local.address, local.port) + pack_endpoint(remote.address, remote.port): (
                local,
                remote,
            )
            for local, remote in wanted
        }
        # A client's addresses are its server's turned round, but for NAT.
        turned = {key[20:] + key[:20]: ends for key, ends in packed.items()}
        for value in self._sweeper.walk_raw_pairs():
            client, server = read_addresses(value)
            matching = [packed.get(client), packed.get(server)]
            if not any(matching) and not any(client):
                matching.append(turned.get(server))  # its client was not observed yet
            for ends in matching:
                if ends is not None and (pair := read_pair(value)).state in STATES:
                    yield pair, ends
        for value in self._sweeper.walk_raw_seeds():
            end = read_seed_end(value)
            if (ends := packed.get(end) or turned.get(end)) is not None:
                yield read_seed(value), ends

    # -- what there is to say --------------------------------------------------------------------------------

    def _explain_known(self, pair: Pair, judge: Judge) -> _Told:
        settings = self._sweeper.settings.read()
        found: dict[tuple[int, int, int], Owner] = {}
        owners = [self._attribution.find_owner(end, found) for end in (pair.client, pair.server)]
        readers = [f"{owner.process}[{owner.pid}]" if owner.pid else "" for owner in owners]
        reason = judge.find_reason(pair)
        evidence = Evidence(
            pair=pair,
            reason=reason,
            decision=judge.decide(pair),
            now_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            hot_reads=settings.hot_reads,
            off_because=judge.book.off_because,
            splicing=settings.splicing and not settings.stopping,
            facts=self._gauge.read_facts(pair) if self._gauge else (None, None),
            unread=(self._gauge.read(pair) if self._gauge else None) or (None, None),
            readers=(readers[0], readers[1]),
            tried_ns=self._attempts.find(pair.name),
            port=split_endpoint(pair.server.local)[1],
        )
        return _Told(
            local=pair.client.local,
            remote=pair.client.remote,
            peer=pair.server.local,
            netns=pair.client.netns,
            peer_netns=pair.server.netns,
            state=STATES[pair.state],
            reason=reason,
            client=owners[0],
            server=owners[1],
            account=describe(evidence),
        )

    def _explain_nobody(self, local: Endpoint, remote: Endpoint) -> _Told:
        count = len(list(self._directory.walk()))
        saw = f"no socket with these addresses in any of {count} network namespaces"
        tells = sockets.can_find()
        if not tells:
            saw = "splicer does not follow it; this kernel does not tell who else has it (tcp_diag)"
        account = Account(
            verdict="Nobody on this host has such a connection." if tells else "Nobody knows of it.",
            checks=(Finding("exists", False if tells else None, saw),),
            next="nothing",
            change=(
                "what splicer follows: splicer flows; what there is: ss -tn, in the network namespace of its "
                "process",
            ),
        )
        return _unknown(local, remote, "unknown", account)

    def _explain_all_unknown(self, unknown: Sequence[Socket]) -> Iterator[_Told]:
        """Of connections that are there, and that splicer does not follow: why not?"""
        wanted = [(each.local, each.remote) for each in unknown]
        found = sockets.find({*wanted, *((remote, local) for local, remote in wanted)}, self._directory)
        for each in unknown:
            own = [other for other in found[each.local, each.remote] if other.inode == each.inode]
            peers = found[each.remote, each.local]
            yield self._explain_unknown(own[0] if own else each, peers)

    def _explain_unknown(self, socket: Socket, others: Sequence[Socket]) -> _Told:
        exists = Finding("exists", True, f"TCP state {socket.state}, {self._name_place(socket)}")
        if not others:
            return self._explain_remote(socket, exists)
        [peer, *_] = others
        local = Finding("local", True, f"the other end is on this host, {self._name_place(peer)}")
        outside = [each for each in (socket, peer) if not self._is_inside(each)]
        if outside:
            names = ", ".join(self._find_path(each) or "a cgroup that is gone" for each in outside)
            account = Account(
                verdict="It is plain TCP: an end is outside of the cgroup that splicer is attached to.",
                checks=(exists, local, Finding("cgroup", False, f"{names}, and not in {self._cgroup.path}")),
                next="nothing: it stays plain for as long as it lives",
                change=("start splicer with a --cgroup that holds both ends, such as /sys/fs/cgroup",),
            )
            return _unknown(socket.local, socket.remote, "outside", account)
        cgroup = Finding("cgroup", True, f"both ends are in {self._cgroup.path}")
        return self._explain_unfollowed(socket, peer, (exists, local, cgroup))

    def _explain_remote(self, socket: Socket, exists: Finding) -> _Told:
        saw = f"no socket on this host is {socket.remote} of it. If addresses are translated on the way, "
        account = Account(
            verdict="It is plain TCP: the other end is not on this host.",
            checks=(
                exists,
                Finding("local", False, saw + "they do not tell; splicer goes by numbers"),
            ),
            next="nothing: it stays plain for as long as it lives",
            change=("have both services on one host",),
        )
        return _unknown(socket.local, socket.remote, "remote", account)

    def _explain_unfollowed(self, socket: Socket, peer: Socket, before: tuple[Finding, ...]) -> _Told:
        room = read_room(self._maps)
        refused = self._sweeper.read_counter(COUNT_REFUSED + REASON_NAMES.index("map_full"))
        saw = f"{room.used} of at most {room.most} are followed, {room.largest} of them of one cgroup"
        saw += f"; {refused} were not for want of room so far"
        if room.is_full and refused:
            account = Account(
                verdict="It is plain TCP: splicer has no room for it (map_full).",
                checks=(*before, Finding("map_full", False, saw)),
                next="nothing: it stays plain for as long as it lives",
                change=("more room, at the next start: --max-connections",),
            )
            return _unknown(socket.local, socket.remote, "map_full", account)
        census = self._describe_census().get("state", "")
        said = {
            "off": "connections older than splicer are left alone (--no-census)",
            "done": "older ones were looked for once, and it was not among those that were found",
            "earlier": "older ones were looked for when the programs were loaded",
            "running": "older ones are being looked for just now",
        }.get(census, "older ones cannot be looked for; see the log")
        account = Account(
            verdict="It is plain TCP: splicer does not follow it. It is older, most likely.",
            checks=(*before, Finding("map_full", not refused or None, saw), Finding("followed", False, said)),
            next="it is found within moments"
            if census == "running"
            else "nothing: it stays plain while it lives",
            change=(
                "connect anew: have one of the two programs close it, or start one of them again",
                *(("at the next start, without --no-census",) if census == "off" else ()),
            ),
        )
        return _unknown(socket.local, socket.remote, "older", account)

    def _find_path(self, socket: Socket) -> str:
        path = self._attribution.find_path(socket.cgroup)
        return self._root + path if path else ""

    def _is_inside(self, socket: Socket) -> bool:
        path, root = self._find_path(socket), self._cgroup.path.rstrip("/")
        # Not known, or gone: nothing speaks against it.
        return not path or path == root or path.startswith(root + "/") or path.rstrip("/") == root

    def _name_place(self, socket: Socket) -> str:
        pid = sockets.find_owner(socket.inode)
        who = f"{process.read_name(pid)}[{pid}]" if pid else "no process"
        return f"of {who}"


def _unknown(local: Endpoint, remote: Endpoint, reason: str, account: Account) -> _Told:
    state = "" if reason == "unknown" else "plain"
    return _Told(str(local), str(remote), str(remote), 0, 0, state, reason, Owner(), Owner(), account)


def _read_endpoint(text: str) -> Endpoint:
    try:
        return sockets.read_endpoint(text)
    except ValueError:
        raise SplicerError(
            f"not an address with a port ({text})",
            hint="such as 10.0.0.1:40000 or [::1]:40000; list them with: splicer flows",
            exit_code=USAGE,
        ) from None
