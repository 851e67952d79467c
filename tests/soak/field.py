# SPDX-License-Identifier: Apache-2.0
"""Hosts on a bridge, each a network namespace that can be deleted and made again with the same addresses.

The bridge is in a namespace of its own, because a running dockerd drops what bridges in the machine's own
forward.
"""

from __future__ import annotations

import itertools
import os
import subprocess

_numbers = itertools.count()


class Field:
    """The namespaces; `remove` takes them away."""

    def __init__(self, hosts: int) -> None:
        # Runs that were killed outright are known by this form of name: support/leftovers.py.
        self._prefix = f"spltest-{os.getpid()}-soak{next(_numbers)}"
        self._made: set[str] = set()
        self._plugged: set[int] = set()
        self._generations = [0] * hosts
        try:
            self._add("router")
            self._batch(
                "router", "link set lo up", "link add br0 type bridge forward_delay 0", "link set br0 up"
            )
            for host in range(hosts):
                self.make_host(host)
        except BaseException:
            self.remove()
            raise

    def namespace(self, host: int) -> str:
        """As `ip netns` knows it. A host that is made again has another one."""
        return f"{self._prefix}-h{host}x{self._generations[host]}"

    @staticmethod
    def address(host: int, family: int = 4) -> str:
        return f"10.79.0.{host + 1}" if family == 4 else f"fd79::{host + 1:x}"

    def make_host(self, host: int) -> None:
        self._add(f"h{host}x{self._generations[host]}")
        inside = f"h{host}x{self._generations[host]}"
        port = f"to-{inside}"
        self._batch(
            "router",
            # The same hardware address as the host before it: neighbours need not learn another one.
            f"link add {port} type veth peer name eth0 address 02:00:00:79:00:{host + 1:02x}"
            f" netns {self.namespace(host)}",
            f"link set {port} master br0 up",
        )
        self._plugged.add(host)
        self._batch(
            inside,
            "link set lo up",
            "link set eth0 up",
            f"addr add {self.address(host)}/24 dev eth0",
            f"addr add {self.address(host, 6)}/64 dev eth0 nodad",
        )
        # Sockets of killed processes whose peers are gone too are not to linger for minutes.
        values = {"tcp_orphan_retries": 3, "tcp_fin_timeout": 5}
        commands = [f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in values.items()]
        inside = f"--net=/run/netns/{self.namespace(host)}"
        _run("nsenter", inside, "sh", "-c", "; ".join(commands))

    def unplug(self, host: int) -> None:
        """Delete the host's link, as if somebody had pulled the cable."""
        _run("ip", "-n", f"{self._prefix}-router", "link", "del", f"to-h{host}x{self._generations[host]}")
        self._plugged.discard(host)

    def delete_host(self, host: int) -> None:
        """Delete the namespace. It lives on for a while; its link does not, or the next host with the same
        addresses would share them with it, and connections to that one be reset by this one."""
        if host in self._plugged:
            self.unplug(host)
        self._delete(f"h{host}x{self._generations[host]}")
        self._generations[host] += 1

    def remove(self) -> None:
        for name in sorted(self._made):
            self._delete(name)

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", f"{self._prefix}-{name}")
        self._made.add(name)

    def _delete(self, name: str) -> None:
        _run("ip", "netns", "del", f"{self._prefix}-{name}")
        self._made.discard(name)

    def _batch(self, name: str, *lines: str) -> None:
        _run("ip", "-n", f"{self._prefix}-{name}", "-batch", "-", stdin="\n".join(lines) + "\n")


def _run(*command: str, stdin: str = "") -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
