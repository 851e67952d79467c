# SPDX-License-Identifier: Apache-2.0
"""Packet filter rules in the way into a namespace, for as long as a test needs them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

TABLE = "inet hazard"


class Firewall:
    """What comes into one namespace is filtered, and watched by conntrack."""

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

    def count_seconds_left(self, port: int) -> int:
        """After which the conntrack entry of a connection from this port expires if nothing comes."""
        for line in self._run("cat", "/proc/net/nf_conntrack").splitlines():
            if f" sport={port} " in line:
                return int(line.split()[4])
        raise AssertionError(f"no conntrack entry for a connection from port {port}")

    @contextmanager
    def _rule(self, nft: str, iptables: str) -> Iterator[None]:
        with ExitStack() as undo:
            if shutil.which("nft"):
                rules = f"""table {TABLE} {{
                    chain input {{
                        type filter hook input priority 0;
                        {nft}
                    }}
                }}"""
                self._run("nft", "-f", "-", stdin=rules)
                undo.callback(self._run, "nft", "delete", "table", *TABLE.split())
            else:
                self._run("iptables", "-I", "INPUT", *iptables.split())
                undo.callback(self._run, "iptables", "-D", "INPUT", *iptables.split())
            yield

    def _run(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(
            [*self._inside, *command], input=stdin, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout
