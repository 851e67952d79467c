# SPDX-License-Identifier: Apache-2.0
"""Keeps the policy in the kernel equal to what settings, labels and the operator want.

Everything here may be called from any thread: the daemon's own, those that answer requests, the watcher's.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from splicer.errors import SplicerError
from splicer.host.process import HINT_HOST_PIDS, find_by_name, sees_host_pids
from splicer.kernel.layout import MODES, NETWORK, NETWORK_KEY, NOTHING_SAID, RULE, RULE_KEY
from splicer.kernel.libbpf import KernelError, Map
from splicer.kernel.settings import SettingsMap
from splicer.logs import Logger
from splicer.model import Container
from splicer.policy import entries, labels, overrides, precedence
from splicer.policy.config import Rule, Settings
from splicer.policy.decision import MEASUREMENT, PAUSE, Book
from splicer.policy.entries import CGROUP, NETNS, Changes, Compiled, Entry, Key
from splicer.policy.explanation import Explanation, explain
from splicer.policy.holds import Holds
from splicer.policy.overrides import Subject

# Bounds of the verdict; why they are what they are: ARCHITECTURE.md, "Backpressure" and "Streams".
QUEUE_MESSAGES = 1024
QUEUE_BYTES = 2 << 20
STREAM_MESSAGES = 64
STREAM_SIZE = 16 << 10

# Shorter ones would match by accident.
_LEAST_ID = 4


class PolicyReconciler:
    """Owns the policy of one generation of programs."""

    def __init__(
        self,
        settings: Settings,
        live: SettingsMap,
        maps: Mapping[str, Map],
        v2_root: str,
        read_inventory: Callable[[], Mapping[str, Container] | None],
        log: Logger,
        find_processes: Callable[[Collection[str]], dict[str, frozenset[int]]] = find_by_name,
    ) -> None:
        """`live` are the settings of the loaded programs. `read_inventory` gives the running containers,
        by id, or None while nobody has listed them yet. `find_processes` finds pids by names."""
        self._settings = settings
        self._live = live
        self._maps = maps
        self._v2_root = v2_root
        self._read_inventory = read_inventory
        self._log = log
        self._guard = threading.RLock()
        self._find_processes = find_processes
        self._overrides = overrides.load(settings.run_dir, log)
        self._holds = Holds()
        self._paused_at = overrides.read_pause(settings.run_dir)
        self._processes: dict[str, frozenset[int]] = {}
        self._complaints: frozenset[tuple[str, ...]] = frozenset()
        self._cgroup_ids: dict[str, int] = {}
        self._failure = ""
        self._failing_since = 0.0

    # -- wanted against actual -------------------------------------------------------------------------------

    @property
    def failure(self) -> str:
        """Why the kernel does not have the whole policy; empty when it does."""
        return self._failure

    @property
    def failing_seconds(self) -> float:
        """For how long it has not had it; 0 when it has."""
        return time.monotonic() - self._failing_since if self._failure else 0.0

    def use_settings(self, settings: Settings) -> None:
        """Settings as read again; takes effect with the next `apply`."""
        with self._guard:
            self._settings = settings

    def have_cgroups_changed(self) -> bool:
        """Has a cgroup that a rule names come, gone, or been made anew under another id?"""
        with self._guard:
            return self._find_cgroups() != self._cgroup_ids

    def have_processes_changed(self) -> bool:
        """Have processes come or gone whose names an operator has set?"""
        with self._guard:
            return self._find_named() != self._processes

    def _find_named(self) -> dict[str, frozenset[int]]:
        named = [name for name, _ in precedence.from_process_overrides(self._overrides)]
        return self._find_processes(named) if named else {}

    def apply(self) -> bool:
        """Make the kernel's policy what it should be. True if anything had to change.

        Living connections follow when the programs next look at them: at a read, or in the daemon's watch.
        """
        with self._guard:
            compiled = self._compile()
            actual = self._read_entries()
            wanted = dict(compiled.entries)
            if self._read_inventory() is None and not self._say_off():
                # Until the containers are known, what an earlier daemon knew of them holds.
                kept = {key: entry for key, entry in actual.items() if key.kind in (CGROUP, NETNS)}
                wanted = kept | wanted
            networks = entries.find_changes(compiled.networks, self._read_networks())
            changes = entries.find_changes(wanted, actual)
            try:
                self._write(changes, networks)
                self._failure = ""
            except KernelError as error:
                # Whatever could not be written is as if nobody had asked for it: say so, and try again.
                if not self._failure:
                    self._failing_since = time.monotonic()
                self._failure = f"the policy does not fit into the kernel ({error.strerror})"
                self._log.error("policy_incomplete", rules=len(wanted), error=error.strerror)
            changed = self._write_settings(
                compiled, wanted, bool(changes.put or changes.delete or networks.put or networks.delete)
            )
            self._complain()
            if changed:
                self._log.debug("policy_applied", rules=len(wanted), networks=len(compiled.networks))
            return changed

    def _compile(self) -> Compiled:
        self._cgroup_ids = self._find_cgroups()
        self._processes = self._find_named()
        if self._say_off():
            return Compiled({}, {}, dataclasses.replace(self._host(), default="off"))
        return entries.compile_policy(
            self._host(),
            self._settings.policies,
            list(self._containers().values()),
            self._list_overrides(),
            self._cgroup_ids,
            root=self._v2_root,
            processes=self._processes,
        )

    def _say_off(self) -> str:
        """What keeps everything plain, whatever else is said; empty if nothing does."""
        if self._paused_at is not None:
            return PAUSE
        hold = self._holds.current
        return MEASUREMENT if hold is not None and hold.containers is None else ""

    def _list_overrides(self) -> Mapping[str, str]:
        """The operator's, oldest first, and newer than all of them what is held plain."""
        hold = self._holds.current
        held = (hold and hold.containers) or frozenset()
        said = {key: mode for key, mode in self._overrides.items() if key not in held}
        return said | dict.fromkeys(sorted(held), "off")

    def _host(self) -> precedence.Host:
        settings = self._settings
        return precedence.Host(settings.mode, settings.default, settings.blocking, settings.tcp_inq)

    def _containers(self) -> Mapping[str, Container]:
        return self._read_inventory() or {}

    def _find_cgroups(self) -> dict[str, int]:
        """The cgroups that rules and overrides name, those that are there, to their ids."""
        found = {}
        placed = [rule for rule, _ in precedence.from_place_overrides(self._overrides)]
        for rule in (*placed, *self._settings.policies):
            if rule.cgroup is not None:
                path = precedence.find_cgroup(rule.cgroup, self._v2_root)
                try:
                    found[rule.cgroup] = os.stat(path).st_ino
                except OSError:
                    continue
        return found

    def _read_entries(self) -> dict[Key, Entry]:
        found = {}
        for raw_key, raw in self._maps["rules"].items():
            key, entry = _unpack_entry(raw_key, raw)
            found[key] = entry
        return found

    def _read_networks(self) -> dict[ipaddress.IPv6Network, int]:
        found = {}
        networks = self._maps["networks"]
        for raw_key in list(networks.walk_keys()):
            prefix, address = NETWORK_KEY.unpack(raw_key)
            raw = networks.get(raw_key)
            if raw is not None:
                found[ipaddress.IPv6Network((address, prefix))] = NETWORK.unpack(raw)[0]
        return found

    def _write(
        self,
        changes: Changes[Key, Entry],
        networks: Changes[ipaddress.IPv6Network, int],
    ) -> None:
        for network in networks.delete:
            self._maps["networks"].delete(_pack_network(network))
        for key in changes.delete:
            self._maps["rules"].delete(_pack_key(key))
        for key, entry in changes.put.items():
            self._maps["rules"].set(_pack_key(key), _pack_entry(key, entry))
        for network, number in networks.put.items():
            self._maps["networks"].set(_pack_network(network), NETWORK.pack(number))

    def _write_settings(self, compiled: Compiled, entries: Mapping[Key, Entry], changed: bool) -> bool:
        now = self._live.read()
        host = compiled.host
        mode = MODES[host.mode if host.default == "on" else "off"]
        allow_blocking, allow_inq = host.blocking == "allow", host.tcp_inq == "allow"
        changed |= (mode, allow_blocking, allow_inq) != (now.mode, now.allow_blocking, now.allow_inq)
        changed |= not now.policy
        # Decisions made while the rules were being written carry the old number and are made again.
        number = now.policy % 0xFFFFFFFF + 1 if changed else now.policy
        self._live.write(
            mode=mode,
            allow_blocking=allow_blocking,
            allow_inq=allow_inq,
            policy=number,
            has_rules=sum({1 << key.kind for key in entries}),
            has_eager=compiled.has_eager,
        )
        return changed

    def start_splicing(self) -> None:
        """Apply the policy, then let the programs work."""
        self.apply()
        self._live.write(
            splicing=True,
            # What a daemon that was killed could not take back.
            stopping=0,
            finishing=False,
            registering=True,
            hot_reads=self._settings.hot_reads,
            queue_messages=QUEUE_MESSAGES,
            queue_bytes=QUEUE_BYTES,
            stream_messages=STREAM_MESSAGES,
            stream_size=STREAM_SIZE,
        )

    # -- what is wrong with the labels -----------------------------------------------------------------------

    def list_problems(self) -> list[dict[str, str]]:
        """Labels that could not be read, with the container they are on."""
        found = []
        for container in self._containers().values():
            for problem in labels.read(container.labels_and_annotations)[1]:
                found.append(
                    {
                        "container": container.name,
                        "label": problem.label,
                        "value": problem.value,
                        "accepted": problem.accepted,
                        "meant": problem.meant,
                    }
                )
        return found

    def _complain(self) -> None:
        problems = {tuple(problem.values()): problem for problem in self.list_problems()}
        for key, problem in problems.items():
            if key not in self._complaints:
                self._log.warning("bad_label", **problem)
        self._complaints = frozenset(problems)

    # -- requests --------------------------------------------------------------------------------------------

    def find_containers(self, text: str) -> list[Container]:
        """Containers by name, compose service or the first digits of the id. Raises SplicerError if none."""
        containers = list(self._containers().values())
        for matching in (
            [each for each in containers if each.name == text],
            [each for each in containers if each.service == text],
            [each for each in containers if len(text) >= _LEAST_ID and each.id.startswith(text)],
        ):
            if matching:
                return sorted(matching, key=lambda each: each.name)
        known = sorted({name for each in containers for name in (each.name, each.service) if name})
        near = difflib.get_close_matches(text, known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "list them with: splicer policy"
        if not containers:
            hint = "no containers are known; splicer status says whether the container engine is reached"
        raise SplicerError(f"no running container of that name, service or id ({text})", hint=hint)

    def override(
        self, text: str, mode: str | None, kind: str = overrides.CONTAINER
    ) -> tuple[list[str], list[str]]:
        """Set what `text` says, something of this kind (overrides.KINDS), to a mode, or take that back
        (None), and apply it.

        Returns what it changed something for and what not, in words. Raises SplicerError.
        """
        with self._guard:
            subjects = self._find_subjects(text, mode, kind)
            newest = list(self._overrides)[-len(subjects) :]
            changed = [
                each
                for each in subjects
                if self._overrides.get(each.key) != mode or (mode is not None and each.key not in newest)
            ]
            if changed:
                draft = dict(self._overrides)
                for subject in changed:
                    draft.pop(subject.key, None)
                    if mode is not None:
                        draft[subject.key] = mode  # at the end: the newest counts first
                self._store(draft)
                self._log.info("override", subjects=[each.words for each in changed], mode=mode or "unset")
            self.apply()
            return [each.words for each in changed], [each.words for each in subjects if each not in changed]

    def _find_subjects(self, text: str, mode: str | None, kind: str) -> list[Subject]:
        if kind != overrides.CONTAINER:
            return [overrides.read_subject(kind, text)]
        if mode is None and text in self._overrides:
            return [Subject(kind, text)]  # it need not run any more
        return [Subject(kind, container.name) for container in self.find_containers(text)]

    def _store(self, draft: dict[str, str]) -> None:
        if len(draft) > overrides.MOST:
            raise SplicerError(
                f"too many overrides (more than {overrides.MOST})",
                hint="list them with: splicer policy; take some back with: splicer unset",
            )
        try:
            overrides.store(self._settings.run_dir, draft)
        except OSError as error:
            raise self._refuse_store("the override", error) from error
        self._overrides = draft

    def _refuse_store(self, what: str, error: OSError) -> SplicerError:
        return SplicerError(
            f"cannot store {what} ({self._settings.run_dir}: {error.strerror})",
            hint="nothing was changed; see whether the file system is full or read-only",
        )

    def note(self, text: str, kind: str) -> str:
        """What else there is to know of an override of this kind, in a sentence; empty if nothing."""
        subject = overrides.read_subject(kind, text)
        if kind == overrides.PROCESS and not sees_host_pids():
            return f"splicer sees none of the host's processes: {HINT_HOST_PIDS}"
        if kind == overrides.PROCESS and not self._find_processes([subject.value])[subject.value]:
            return "no process of that name runs now; it holds from when there is one"
        if kind == overrides.CGROUP and not os.path.isdir(precedence.find_cgroup(text, self._v2_root)):
            return "there is no such cgroup now; it holds from when there is one"
        return ""

    def list_overrides(self) -> list[tuple[Subject, str]]:
        """What an operator has set, the newest first, with the mode."""
        return [(overrides.read_key(key), mode) for key, mode in reversed(self._overrides.items())]

    # -- pause -----------------------------------------------------------------------------------------------

    @property
    def paused_seconds(self) -> float | None:
        """For how many seconds splicing is paused; None if it is not."""
        since = self._paused_at
        return None if since is None else max(0.0, overrides.read_time_since_boot() - since)

    def pause(self, paused: bool) -> bool:
        """Have nothing spliced until further notice, or end that; True if it changes something. Raises
        SplicerError."""
        with self._guard:
            if paused == (self._paused_at is not None):
                return False
            since = overrides.read_time_since_boot() if paused else None
            try:
                overrides.store_pause(self._settings.run_dir, since)
            except OSError as error:
                raise self._refuse_store("the pause", error) from error
            self._paused_at = since
            if paused:
                self._log.info("paused")
            else:
                self._log.info("resumed")
            self.apply()
            return True

    def hold(self, holder: str, seconds: float, texts: list[str] | None) -> list[str] | None:
        """Keep containers plain for a while, or everything (None), and apply it.

        Returns the names of the containers. Raises SplicerError.
        """
        with self._guard:
            names = None
            if texts is not None:
                names = sorted({each.name for text in texts for each in self.find_containers(text)})
            self._holds.take(holder, seconds, None if names is None else frozenset(names))
            self.apply()
            return names

    def release(self, holder: str) -> bool:
        """End a hold, and apply the policy. False if there is none of that holder."""
        with self._guard:
            found = self._holds.release(holder)
            self.apply()
            return found

    def is_hold_over(self) -> bool:
        """Has a hold ended by itself since this was asked last? The policy is to be applied then."""
        return self._holds.drop_expired()

    def describe_hold(self) -> dict[str, Any]:
        """For `splicer status`; empty without one."""
        return self._holds.describe()

    def explain(self, text: str | None) -> list[Explanation]:
        """The policy of one container, or of all by name. Raises SplicerError for an unknown one."""
        with self._guard:
            everybody = list(self._containers().values())
            chosen = sorted(everybody, key=lambda each: each.name) if not text else self.find_containers(text)
            return [
                explain(
                    each,
                    self._host(),
                    self._settings.policies,
                    self._list_overrides(),
                    everybody,
                    root=self._v2_root,
                )
                for each in chosen
            ]

    def read_book(self) -> Book:
        """All that is said now, to decide on single connections."""
        with self._guard:
            return Book(
                self._host(),
                self._settings.policies,
                dict(self._list_overrides()),
                tuple(self._containers().values()),
                self._processes,
                self._v2_root,
                self._say_off(),
            )

    @property
    def number(self) -> int:
        """The number of the policy that is in the kernel: pairs that have another one are yet to be
        decided."""
        return self._live.read().policy

    def list_rules(self) -> list[tuple[Rule, int]]:
        """The rules of the configuration, each with the number of containers it is about."""
        containers = list(self._containers().values())
        return [
            (rule, sum(precedence.is_about(rule, container, self._v2_root) for container in containers))
            for rule in self._settings.policies
        ]

    def describe(self) -> dict[str, Any]:
        """The host's own policy."""
        host = self._host()
        return {
            "default": host.default,
            "mode": host.mode,
            "blocking": host.blocking,
            "tcp_inq": host.tcp_inq,
            "paused": self._paused_at is not None,
        }


def _pack_entry(key: Key, entry: Entry) -> bytes:
    """struct rule: of two rules with the same rank the one that names a port comes first."""

    def pack(rank: int, value: int) -> int:
        return (2 * rank + (not key.port)) << 32 | value if rank else NOTHING_SAID

    return RULE.pack(
        pack(entry.mode_rank, entry.mode),
        pack(entry.blocking_rank, entry.blocking),
        pack(entry.tcp_inq_rank, entry.tcp_inq),
    )


def _unpack_entry(raw_key: bytes, raw: bytes) -> tuple[Key, Entry]:
    who, kind, port = RULE_KEY.unpack(raw_key)
    said = [(0, 0) if word == NOTHING_SAID else (word & 0xFFFFFFFF, word >> 33) for word in RULE.unpack(raw)]
    return Key(kind, who, port), Entry(*said[0], *said[1], *said[2])


def _pack_key(key: Key) -> bytes:
    return RULE_KEY.pack(key.who, key.kind, key.port)


def _pack_network(network: ipaddress.IPv6Network) -> bytes:
    return NETWORK_KEY.pack(network.prefixlen, network.network_address.packed)
