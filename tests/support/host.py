# SPDX-License-Identifier: Apache-2.0
"""A host with splicer on it: cgroup, bpffs, run directory, daemon, peers; and proof that nothing is left."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splicer.kernel import answer, libbpf
from splicer.kernel.generation import LINKS
from splicer.kernel.layout import PAIR, STATE_PAIRED
from support.bpf import Bpffs, count_spliced, find_leftovers, list_attached, list_objects
from support.cgroup import Cgroup
from support.daemon import Daemon, call, wait_until
from support.holders import describe_holders
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import PROGRAM, End, Pair, Peer

HOT_TIMEOUT = 5.0  # seconds
STATE, CHANGED_NS, RETRY_NS = 2, 45, 46  # among the fields of layout.PAIR

# Ports whose service has a policy of its own in the configuration below.
EAGER, OFF, ALLOW, EAGER_ALLOW, NO_INQ, EAGER_NO_INQ = 7101, 7102, 7103, 7104, 7105, 7106
SERVICES = f"""
[[policy]]
ports = {EAGER}
mode = "eager"

[[policy]]
ports = {OFF}
mode = "off"

[[policy]]
ports = {ALLOW}
blocking = "allow"

[[policy]]
ports = {EAGER_ALLOW}
mode = "eager"
blocking = "allow"

[[policy]]
ports = {NO_INQ}
tcp_inq = "refuse"

[[policy]]
ports = {EAGER_NO_INQ}
mode = "eager"
tcp_inq = "refuse"
"""

ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class Host:
    """A context manager: leaving it stops and removes everything, then complains about what had been left."""

    def __init__(self, *arguments: str, services: str = SERVICES, start: bool = True) -> None:
        self.arguments = arguments
        self.directory = Path(tempfile.mkdtemp(prefix=f"splicer-test-{os.getpid()}-"))
        self.run_dir = self.directory / "run"
        self._undo: list[Callable[[], None]] = [lambda: shutil.rmtree(self.directory)]
        self.expected_rescues = 0
        # A command that the daemon is started through.
        self.prefix: tuple[str, ...] = ()
        self._peers: list[Peer] = []
        self._daemons: list[Daemon] = []
        self._names = itertools.count()
        try:
            self.bpffs = Bpffs(self.directory / "bpffs")
            self._undo.append(self.bpffs.unmount)
            self.before = list_objects()
            self.pin_dir = self.bpffs.path / "splicer"
            self.cgroup = Cgroup()
            self._undo.append(self.cgroup.remove)
            self.config = self.directory / "splicer.toml"
            self.config.write_text(services)
            if start:
                self.start()
        except BaseException:
            self._clean_up()
            raise

    # the daemon

    @property
    def daemon(self) -> Daemon:
        return self._daemons[-1]

    @property
    def has_run(self) -> bool:
        """True once a daemon has been started."""
        return bool(self._daemons)

    def start(self, *arguments: str) -> Daemon:
        """Start a daemon with the host's arguments and these."""
        daemon = Daemon(
            self.cgroup.path,
            self.run_dir,
            self.pin_dir,
            f"--config={self.config}",
            *self.arguments,
            *arguments,
            prefix=self.prefix,
        )
        self._daemons.append(daemon)
        return daemon

    def unload(self) -> str:
        """`splicer unload`, which must end with 0; what it says."""
        done = call("unload", f"--run-dir={self.run_dir}", f"--pin-dir={self.pin_dir}", "--stop-timeout=1")
        assert done.code == 0, done
        return done.stdout

    def reload(self, services: str) -> None:
        """Give the daemon another configuration; returns when it has read it, or refused it."""
        self.config.write_text(services)
        before = self.count_reloads()
        self.daemon.send_signal(signal.SIGHUP)
        wait_until("the configuration was read", lambda: self.count_reloads() > before)

    def count_reloads(self) -> int:
        log = self.daemon.log.read_text()
        return log.count('"reloaded"') + log.count('"reload_failed"')

    @property
    def is_answered(self) -> bool:
        """True if splicer answers FIONREAD itself, as the last daemon has said when it was ready."""
        return self.daemon.log.exists() and '"fionread": "splicer"' in self.daemon.log.read_text()

    def name_links(self) -> set[str]:
        """The links of a complete generation."""
        return {*LINKS, *(answer.NAMES if self.is_answered else ())}

    def list_pins(self) -> list[Path]:
        """What is pinned, but for what answers FIONREAD for sockets that were left spliced."""
        left = list(self.pin_dir.glob("left-*")) if self.has_run and self.is_answered else []
        if not left:
            return self.bpffs.pins()
        kept = {self.pin_dir, *left, *(path for each in left for path in each.iterdir())}
        return [path for path in self.bpffs.pins() if path not in kept]

    def count_spliced(self) -> int:
        """How many sockets are in the SOCKHASH."""
        return count_spliced(self.pin_dir)

    # peers

    def peer(
        self,
        lab: Lab,
        host: str,
        *,
        inside: bool = True,
        cgroup: Cgroup | None = None,
        program: Path = PROGRAM,
    ) -> Peer:
        """A process in a host's namespace, in the attached cgroup unless it is to play another machine, or in
        the `cgroup` given, which lies below it."""
        peer = Peer(lab.namespace(host), cgroup or (self.cgroup if inside else None), program)
        self._peers.append(peer)
        return peer

    def connect(
        self,
        client: Peer,
        server: Peer,
        address: str,
        *,
        port: int = 0,
        dial: tuple[str, int] | None = None,
        client_family: int = socket.AF_INET,
        server_family: int | None = None,
        source: tuple[str, int] | None = None,
        blocking: tuple[bool, bool] = (False, False),
        options: tuple[list[list[int]], list[list[int]]] = ([], []),
        seed: int | None = None,
        protocol: int = 0,
        **listening: Any,
    ) -> Pair:
        """A connection from one peer to another, which listens on `address`, or on any if families differ.

        `dial` is what the client connects to where that is not the server's address and port. `blocking`
        and `options` (lists of [level, option, value], set before connecting and after accepting) name the
        client's first.
        """
        server_family = client_family if server_family is None else server_family
        name = f"c{next(self._names)}"
        accepted = f"{name}-accepted"
        bind = address if server_family == client_family and not _is_mapped(address) else ANY[server_family]
        port = server.call(
            "listen", name=name, family=server_family, host=bind, port=port, protocol=protocol, **listening
        )
        streams = next(self._names) * 2 if seed is None else seed * 2
        to = (address, port) if dial is None else dial
        client_ends = client.call(
            "connect",
            conn=name,
            family=client_family,
            host=to[0],
            port=to[1],
            source=source,
            sends=streams,
            receives=streams + 1,
            blocking=blocking[0],
            options=options[0],
            protocol=protocol,
        )
        server_ends = server.call(
            "accept",
            listener=name,
            conn=accepted,
            sends=streams + 1,
            receives=streams,
            blocking=blocking[1],
            options=options[1],
        )
        server.call("unlisten", listener=name)
        return Pair(
            End(client, name, *(tuple(each) for each in client_ends)),
            End(server, accepted, *(tuple(each) for each in server_ends)),
            name,
        )

    @contextmanager
    def running(
        self, lab: Lab, place: str, command: list[str], end_by: int = signal.SIGKILL
    ) -> Iterator[subprocess.Popen[str]]:
        """A program in a host's namespace, whose sockets are below the attached cgroup."""
        # The shell moves itself before it becomes the program: not one socket is made outside.
        inside = f'echo $$ > {self.cgroup.path}/cgroup.procs && exec "$@"'
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{lab.namespace(place)}", "sh", "-c", inside, "sh", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.send_signal(end_by)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    # flows

    def find_flow(self, pair: Pair, **fields: Any) -> dict[str, Any] | None:
        """The row of a connection in `splicer flows`, found by the client's ports and network namespace. The
        daemon is asked with these `fields`."""
        cookie = pair.client.peer.call("netns_cookie")
        for flow in self.daemon.flows(**fields):
            ports = (_port(flow["local"]), _port(flow["remote"]))
            if ports == (pair.client.local[1], pair.client.remote[1]) and flow["netns"] == cookie:
                return flow
        return None

    def flow(self, pair: Pair, **fields: Any) -> dict[str, Any]:
        """The same of a connection that must be there."""
        found = self.find_flow(pair, **fields)
        assert found is not None, f"{pair.label} is not known"
        return found

    def wait_flow(
        self,
        pair: Pair,
        state: str,
        reason: str | None = None,
        timeout: float = 5.0,
        rounds: int = 0,
    ) -> dict[str, Any]:
        """The row of a connection once it is in `state` (and has `reason`, if one is named). Before each look
        it ping-pongs for so many `rounds`."""
        told = f"{pair.label} not {state} {reason or ''} within {timeout} s"
        with Stopwatch() as watch:
            while True:
                if rounds:
                    pair.pingpong(rounds)
                seen = self.find_flow(pair)
                if seen is not None and seen["state"] == state and reason in (None, seen["reason"]):
                    return seen
                assert watch.seconds < timeout, f"{told}, last seen: {seen}"
                time.sleep(0.02)

    def talk_until(
        self,
        pair: Pair,
        state: str,
        reason: str | None = None,
        rounds: int = 20,
        timeout: float = HOT_TIMEOUT,
    ) -> dict[str, Any]:
        """Ping-pong until the connection is in `state` (and has `reason`, if one is named); its row.

        An adoption that found bytes in flight is tried again only while the connection is in use, so no
        fixed number of messages makes a connection spliced."""
        return self.wait_flow(pair, state, reason, timeout, rounds)

    def make_hot(self, pair: Pair, rounds: int = 40, timeout: float = HOT_TIMEOUT) -> dict[str, Any]:
        """Ping-pong until the connection is spliced; its row."""
        flow = self.talk_until(pair, "spliced", rounds=rounds, timeout=timeout)
        # The first messages after adoption may still go through TCP; leave none of them behind.
        pair.pingpong(4)
        return flow

    def dial(
        self,
        client: Peer,
        server: Peer,
        address: str,
        *,
        port: int = 0,
        fast_open: str = "",
        **listening: Any,
    ) -> Pair:
        """A connection whose server has not accepted yet: `accept` does that."""
        name = f"c{next(self._names)}"
        where = {"family": socket.AF_INET, "host": address}
        port = server.call("listen", name=name, port=port, **where, **listening)
        ends = client.call("connect", conn=name, port=port, fast_open=fast_open, **where)
        local, remote = (tuple(each) for each in ends)
        return Pair(End(client, name, local, remote), End(server, name, remote, local), name)

    def accept(self, pair: Pair) -> None:
        pair.server.peer.call("accept", listener=pair.label, conn=pair.server.conn)

    def pair(self, lab: Lab, **arguments: Any) -> Pair:
        """A connection between new peers on two hosts; `arguments` as for `connect`."""
        return self.connect(self.peer(lab, "a"), self.peer(lab, "b"), lab.address("b"), **arguments)

    def hot_pair(self, lab: Lab, **arguments: Any) -> Pair:
        """The same, spliced."""
        pair = self.pair(lab, **arguments)
        self.make_hot(pair)
        return pair

    def edit_pairs(self, edit: Callable[[list[Any]], None]) -> None:
        """Change the fields of layout.PAIR of every connection. Meanwhile nobody may use them."""
        pairs = libbpf.Map.open(str(self.pin_dir / "maps" / "pairs"))
        try:
            for key, value in pairs.items():
                fields = list(PAIR.unpack(value))
                edit(fields)
                pairs.set(key, PAIR.pack(*fields))
        finally:
            pairs.close()

    def forget_cool_downs(self) -> list[float]:
        """Let every pair be tried again at once; for how many seconds from its last change it should not have
        been. As for `edit_pairs`."""
        found = []

        def forget(fields: list[Any]) -> None:
            if fields[STATE] == STATE_PAIRED:  # else it is something else
                found.append((fields[RETRY_NS] - fields[CHANGED_NS]) / 1e9)
                fields[RETRY_NS] = 1

        self.edit_pairs(forget)
        return found

    def check_alive(self, lab: Lab) -> None:
        """The daemon is well, and splices what is new."""
        assert self.daemon.status()["healthy"]
        self.hot_pair(lab).verify()

    def watch_cold(self, pair: Pair, reason: str, seconds: float = 0.6) -> None:
        """Ping-pong for some time; the connection must stay plain throughout and end up with `reason`."""
        with Stopwatch() as watch:
            while True:
                pair.pingpong(40)
                flow = self.flow(pair)
                assert flow["state"] == "paired", flow
                if watch.seconds >= seconds and flow["reason"] == reason:
                    return
                assert watch.seconds < seconds + HOT_TIMEOUT, f"not {reason}: {flow}"

    # the end

    def check_clean(self, timeout: float = 15.0) -> None:
        """Nothing is left: no pins, programs, maps or links, nothing attached, no socket, no ready file."""
        if self.list_pins() != self.bpffs.pins():
            # What answered for them goes when somebody looks, and they are closed by now.
            self.unload()
        assert self.bpffs.pins() == [], "pins are left"
        assert list_attached(self.cgroup.path) == []
        pids = {daemon.pid for daemon in self._daemons} | {peer.pid for peer in self._peers}
        left = find_leftovers(self.before, pids, self.bpffs.path, timeout)
        assert not left, f"left behind in the kernel: {', '.join(map(str, left))}\n{describe_holders(left)}"
        if self._daemons:
            assert not self.daemon.ready_file.exists()
            assert not (self.run_dir / "control.sock").exists()

    def stop_peers(self) -> None:
        for peer in self._peers:
            peer.stop()
        self._peers.clear()

    def stop(self) -> None:
        """Stop the daemon, which must end with 0, and check that nothing is left of it."""
        if self.daemon.alive:
            code = self.daemon.stop()
            assert code == 0, f"splicer run ended with {code}:\n{self.daemon.tail()}"
        self.check_clean()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        complaint: BaseException | None = None
        try:
            self.stop_peers()
            if self._daemons and error is None:
                crashed = [each for each in self._daemons if each.process.poll() not in (None, 0, -9)]
                assert not crashed, f"splicer run ended by itself:\n{crashed[0].tail()}"
                self.stop()
            elif error is None:
                self.check_clean()
        except BaseException as raised:
            complaint = raised
        self._clean_up()
        if complaint is not None:
            raise complaint

    def _clean_up(self) -> None:
        for peer in self._peers:
            peer.stop()
        for daemon in self._daemons:
            daemon.kill()
        while self._undo:
            self._undo.pop()()


def _port(text: str) -> int:
    return int(text.rpartition(":")[2])


def _is_mapped(address: str) -> bool:
    return address.startswith("::ffff:")
