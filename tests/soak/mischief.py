# SPDX-License-Identifier: Apache-2.0
"""Carries out the events of chaos.py."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

from support.cgroup import find_v2_root

from soak.chaos import Event
from soak.crew import Hand
from soak.field import Field
from soak.services import BASE, MISTAKES, list_policies

if TYPE_CHECKING:
    from soak.soak import Soak

GO_ON_AFTER = 1.0  # seconds that workers stay stopped after a new daemon is ready
MUCH = 0.25  # of the connections; with fewer of them spliced such a restart shows little
RESTART_TRIES = 20
THROTTLED_SECONDS = 1.0  # at least: nothing is relieved while splicer stops and starts


class Mischief:
    """All of it happens in the thread of the run; what ends later is put on its list of actions."""

    def __init__(self, soak: Soak) -> None:
        self._soak = soak
        self._away: set[int] = set()  # hosts that are being deleted
        self._stopped: Counter[int] = Counter()  # pids, and by how many events each is stopped
        self._since: dict[int, float] = {}  # pids, and since when each is
        self._throttled: Counter[int] = Counter()  # hosts, in the same way
        self._restarting = False

    def cause(self, event: Event) -> None:
        getattr(self, f"_do_{event.kind}")(random.Random(event.seed))

    def count_stopped(self) -> int:
        """Workers that are stopped or throttled now."""
        pids = set(self._stopped)
        pids |= {hand.pid for hand in self._soak.crew.hands if hand.host in self._throttled}
        return len(pids)

    # workers

    def _pick(self, rng: random.Random, *roles: str) -> Hand:
        return rng.choice([hand for hand in self._soak.crew.hands if hand.role in roles or not roles])

    def _do_kill_client(self, rng: random.Random) -> None:
        self._kill(self._pick(rng, "client", "client", "control_client"), rng)

    def _do_kill_server(self, rng: random.Random) -> None:
        self._kill(self._pick(rng, "server", "server", "control_server"), rng)

    def _kill(self, hand: Hand, rng: random.Random) -> None:
        if hand.host in self._away:
            return
        self._soak.bury(hand)
        self._soak.later(rng.uniform(0.05, 0.6), lambda: self._replace(hand))

    def _replace(self, hand: Hand) -> None:
        present = {(each.role, each.host) for each in self._soak.crew.hands}
        if hand.host not in self._away and (hand.role, hand.host) not in present:
            self._soak.man(hand.role, hand.host)

    def _stop(self, hand: Hand) -> None:
        self._stopped[hand.pid] += 1
        self._since.setdefault(hand.pid, time.monotonic())
        hand.process.send_signal(signal.SIGSTOP)

    def _go_on(self, hand: Hand) -> None:
        hand.process.send_signal(signal.SIGCONT)
        self._stopped[hand.pid] -= 1
        self._stopped += Counter()  # drops what is zero
        if hand.pid not in self._stopped and hand.pid in self._since:
            self._soak.findings.halts.append((hand.name, self._since.pop(hand.pid), time.monotonic()))

    def _do_pause(self, rng: random.Random) -> None:
        hand = self._pick(rng)
        self._stop(hand)
        self._soak.later(rng.uniform(0.1, 1.3), lambda: self._go_on(hand))

    def _do_quota(self, rng: random.Random) -> None:
        self._throttle(rng.randrange(self._soak.options.hosts), rng.uniform(1.0, 2.5), rng.uniform(0.05, 0.4))

    def _throttle(self, host: int, seconds: float, share: float) -> None:
        soak = self._soak
        hands = [hand for hand in soak.crew.hands if hand.host == host]
        if soak.quota.by:
            self._throttled[host] += 1
            soak.quota.limit(soak.groups[host], [hand.pid for hand in hands], share)
            soak.later(seconds, lambda: self._relieve(host))
            return
        for number in range(int(seconds / 0.1)):
            for hand in hands:
                soak.later(number * 0.1, lambda hand=hand: self._stop(hand))
                soak.later(number * 0.1 + 0.07, lambda hand=hand: self._go_on(hand))

    def _relieve(self, host: int) -> None:
        self._soak.quota.free(self._soak.groups[host])
        self._throttled[host] -= 1
        self._throttled += Counter()

    def _do_memory(self, rng: random.Random) -> None:
        soak = self._soak
        host = rng.randrange(soak.options.hosts)
        group = soak.groups[host]
        # Where the OOM killer is off, a worker waits instead. It is on now and then.
        killer = rng.random() < 0.25
        soak.pressure.limit(group, rng.choice((0, 0, 256 << 10)), killer)
        soak.later(rng.uniform(1.0, 3.0), lambda: soak.pressure.free(group))

    def _do_socket_memory(self, rng: random.Random) -> None:
        soak = self._soak
        group = rng.choice(soak.groups)
        soak.pressure.limit_sockets(group, rng.choice((0, 64 << 10, 512 << 10)))
        soak.later(rng.uniform(0.5, 2.5), lambda: soak.pressure.free_sockets(group))

    # namespaces

    def _do_delete_namespace(self, rng: random.Random) -> None:
        host = rng.randrange(self._soak.options.hosts)
        if host in self._away:
            return
        self._away.add(host)
        if rng.random() < 0.5:
            self._soak.field.unplug(host)
            self._soak.later(rng.uniform(0.1, 0.8), lambda: self._delete(host))
        else:
            self._delete(host)

    def _delete(self, host: int) -> None:
        soak = self._soak
        for hand in [each for each in soak.crew.hands if each.host == host]:
            soak.bury(hand)
        soak.field.delete_host(host)
        soak.crew.tell_all("gone", hosts=[Field.address(host), Field.address(host, 6)])
        soak.field.make_host(host)
        self._away.discard(host)
        present = {each.role for each in soak.crew.hands if each.host == host}
        wanted = {"server", "client"}
        wanted |= {"control_client"} if host == 0 else set()
        wanted |= {"control_server"} if host == soak.options.hosts - 1 else set()
        for role in sorted(wanted - present, reverse=True):
            soak.man(role, host)

    # rules

    def _do_policy(self, rng: random.Random) -> None:
        root = find_v2_root()
        assert root is not None
        host = rng.randrange(self._soak.options.hosts)
        cgroup = str(self._soak.groups[host].path.relative_to(root))
        text = rng.choice(list_policies(host, cgroup))
        self._soak.note(" ".join(text.split()))
        self._soak.keeper.reload(text)
        self._soak.later(rng.uniform(0.3, 2.5), lambda: self._soak.keeper.reload(BASE))

    def _do_mistake(self, rng: random.Random) -> None:
        if self._soak.keeper.alive:
            self._soak.keeper.reload(rng.choice(MISTAKES))
            self._soak.keeper.reload(BASE)

    def _do_drain(self, rng: random.Random) -> None:
        self._soak.keeper.drain()

    # the daemon

    def _do_daemon_kill(self, rng: random.Random) -> None:
        self._soak.keeper.kill()
        self._soak.later(rng.uniform(0.1, 2.0), self._soak.keeper.start)

    def _do_daemon_restart(self, rng: random.Random) -> None:
        self._soak.keeper.stop()
        self._soak.later(rng.uniform(0.0, 1.0), self._start_and_renew)

    def _do_daemon_unload(self, rng: random.Random) -> None:
        self._soak.keeper.kill()
        self._soak.keeper.unload()
        self._soak.later(rng.uniform(0.0, 1.0), self._start_and_renew)

    def _do_restart_while_paused(self, rng: random.Random) -> None:
        """Readers that have bytes to read and cannot, while splicer stops and until the next one is there."""
        if not self._restarting:
            self._restarting = True
            self._restart_while_paused(rng, RESTART_TRIES)

    def _restart_while_paused(self, rng: random.Random, tries: int) -> None:
        soak = self._soak
        if soak.watch.count_spliced() < soak.options.connections * MUCH:
            # It has only just started, or a policy has switched most of it off.
            if tries:
                soak.later(0.3, lambda: self._restart_while_paused(rng, tries - 1))
            self._restarting = tries > 0
            return
        loops = [hand for hand in soak.crew.hands if "control" not in hand.role]
        hands = rng.sample(loops, rng.randint(1, 3))
        host = rng.randrange(soak.options.hosts)
        for hand in hands:
            self._stop(hand)
        if rng.random() < 0.5:
            self._throttle(host, THROTTLED_SECONDS, 0.05)

        def restart() -> None:
            soak.keeper.stop()
            self._start_and_renew()
            for hand in hands:
                soak.later(GO_ON_AFTER, lambda hand=hand: self._go_on(hand))
            self._restarting = False

        soak.later(rng.uniform(0.2, 0.8), restart)

    def _start_and_renew(self) -> None:
        """Connections that the daemon before knew are left alone by this one: new ones are wanted."""
        self._soak.keeper.start()
        self._soak.tell_phase(renew=True)
