# SPDX-License-Identifier: Apache-2.0
"""Packet filter rules in the way into a namespace, for as long as a test needs them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

TABLE = "inet hazard"


class Firewall:
    """What comes into one namespace, or passes through, is filtered, and watched by conntrack."""

    def __init__(self, namespace: str) -> None:
        self._inside = ["nsenter", f"--net=/run/netns/{namespace}"]

    @contextmanager
    def dropping(self, port: int) -> Iterator[None]:
        """Nothing gets to a TCP port any more."""
        with self._rule(f"tcp dport {port} drop", f"-p tcp --dport {port} -j DROP"):
            yield

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """A stateful rule, the usual first one: connections have conntrack entries."""
        with self._rule("ct state established accept", "-m conntrack --ctstate ESTABLISHED -j ACCEPT"):
            yield

    @contextmanager
    def strict(self, seconds: int) -> Iterator[None]:
        """What passes through must belong to a connection that conntrack knows, and conntrack forgets one
        without packets after so many seconds."""
        with ExitStack() as undo:
            for key, value in (("loose", 0), ("timeout_established", seconds)):
                before = self._set(key, value)
                undo.callback(self._set, key, before)
            undo.enter_context(
                self._rule("ct state invalid drop", "-m conntrack --ctstate INVALID -j DROP", hook="forward")
            )
            yield

    @contextmanager
    def only_marked(self, mark: int, port: int) -> Iterator[None]:
        """What goes out to a TCP port must have this mark."""
        with self._rule(
            f"meta mark != {mark} tcp dport {port} drop",
            f"-p tcp --dport {port} -m mark ! --mark {mark} -j DROP",
            hook="output",
        ):
            yield

    def is_known(self, port: int) -> bool:
        """Has a connection from this port, that is established, a conntrack entry?"""
        lines = self._run("cat", "/proc/net/nf_conntrack").splitlines()
        return any(f" sport={port} " in line and " ESTABLISHED " in line for line in lines)

    def _set(self, key: str, value: int | str) -> str:
        path = f"/proc/sys/net/netfilter/nf_conntrack_tcp_{key}"
        before = self._run("cat", path).strip()
        self._run("sh", "-c", f"echo {value} > {path}")
        return before

    def count_seconds_left(self, port: int) -> int:
        """After which the conntrack entry of a connection from this port expires if nothing comes."""
        for line in self._run("cat", "/proc/net/nf_conntrack").splitlines():
            if f" sport={port} " in line:
                return int(line.split()[4])
        raise AssertionError(f"no conntrack entry for a connection from port {port}")

    @contextmanager
    def _rule(self, nft: str, iptables: str, hook: str = "input") -> Iterator[None]:
        with ExitStack() as undo:
            if shutil.which("nft"):
                rules = f"""table {TABLE} {{
                    chain {hook} {{
                        type filter hook {hook} priority 0;
                        {nft}
                    }}
                }}"""
                self._run("nft", "-f", "-", stdin=rules)
                undo.callback(self._run, "nft", "delete", "table", *TABLE.split())
            else:
                self._run("iptables", "-I", hook.upper(), *iptables.split())
                undo.callback(self._run, "iptables", "-D", hook.upper(), *iptables.split())
            yield

    def _run(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(
            [*self._inside, *command], input=stdin, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout
