# SPDX-License-Identifier: Apache-2.0
"""A small network: hosts on a bridge in a namespace of its own, which also routes to one host beyond.

::

    a 10.77.0.1 ---+
    b 10.77.0.2 ---+--- router (bridge br0, 10.77.0.254) --- far 10.78.0.1
                                            10.78.0.254 ---+

The bridge is not in the machine's own namespace because a running dockerd drops what bridges there forward.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from socket import AF_INET, AF_INET6

_numbers = itertools.count()

HOSTS = {"a": 1, "b": 2}
# Families of client and server, version of IP, and what is before the address that the client connects to.
MIXES = {
    "v4": (AF_INET, AF_INET, 4, ""),
    "v6": (AF_INET6, AF_INET6, 6, ""),
    "v4-to-dual": (AF_INET, AF_INET6, 4, ""),
    "mapped-to-v4": (AF_INET6, AF_INET, 4, "::ffff:"),
    "mapped-to-dual": (AF_INET6, AF_INET6, 4, "::ffff:"),
}
# Where client and server are, and whose address the client connects to.
PLACES = {"loopback": ("a", "a", "lo"), "bridge": ("a", "b", "b"), "router": ("far", "b", "b")}


class Lab:
    """The namespaces; `remove` takes them away again, with everything in them."""

    def __init__(self) -> None:
        self.prefix = f"spltest-{os.getpid()}-{next(_numbers)}"
        self._namespaces: list[str] = []
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    def namespace(self, host: str) -> str:
        """The name of a host's namespace as `ip netns` knows it."""
        return f"{self.prefix}-{host}"

    @staticmethod
    def address(host: str, family: int = 4) -> str:
        """A host's address; `family` is 4 or 6."""
        if host == "lo":
            return "127.0.0.1" if family == 4 else "::1"
        network, number = ("78", 1) if host == "far" else ("77", HOSTS[host])
        return f"10.{network}.0.{number}" if family == 4 else f"fd{network}::{number}"

    def translate(self, host: str, hook: str, visible: tuple[str, int], actual: tuple[str, int]) -> None:
        """Rewrite the destination `visible` to `actual` in a host's namespace.

        `hook` is "prerouting" for what passes through and "output" for what starts there.
        """
        family = "ip6" if ":" in visible[0] else "ip"
        target = f"[{actual[0]}]:{actual[1]}" if family == "ip6" else f"{actual[0]}:{actual[1]}"
        if shutil.which("nft"):
            table = f"translate_{visible[1]}_{hook}"
            rules = f"""table {family} {table} {{
                chain nat {{
                    type nat hook {hook} priority -100;
                    {family} daddr {visible[0]} tcp dport {visible[1]} dnat to {target}
                }}
            }}"""
            self._run("nsenter", f"--net=/run/netns/{self.namespace(host)}", "nft", "-f", "-", stdin=rules)
            return
        program = "ip6tables" if family == "ip6" else "iptables"
        rule = ["-A", hook.upper(), "-p", "tcp", "-d", visible[0], "--dport", str(visible[1])]
        rule += ["-j", "DNAT", "--to", target]
        self._run("nsenter", f"--net=/run/netns/{self.namespace(host)}", program, "-t", "nat", *rule)

    def masquerade(self, host: str, interface: str) -> None:
        """Rewrite the source of IPv4 packets that leave a host's namespace through an interface."""
        inside = ["nsenter", f"--net=/run/netns/{self.namespace(host)}"]
        if shutil.which("nft"):
            rules = f"""table ip hide {{
                chain nat {{
                    type nat hook postrouting priority 100;
                    oifname "{interface}" masquerade
                }}
            }}"""
            self._run(*inside, "nft", "-f", "-", stdin=rules)
            return
        rule = ["-A", "POSTROUTING", "-o", interface, "-j", "MASQUERADE"]
        self._run(*inside, "iptables", "-t", "nat", *rule)

    def set_sysctl(self, host: str, key: str, value: str) -> None:
        """Set a sysctl of a host's namespace."""
        command = f"echo {value} > /proc/sys/{key.replace('.', '/')}"
        self._run("nsenter", f"--net=/run/netns/{self.namespace(host)}", "sh", "-c", command)

    def remove(self) -> None:
        while self._namespaces:
            self._run("ip", "netns", "del", self._namespaces.pop())

    def _build(self) -> None:
        for host in ("router", *HOSTS, "far"):
            self._run("ip", "netns", "add", self.namespace(host))
            self._namespaces.append(self.namespace(host))
        router = [
            "link set lo up",
            "link add br0 type bridge forward_delay 0",
            "link set br0 up",
            "addr add 10.77.0.254/24 dev br0",
            "addr add fd77::254/64 dev br0 nodad",
            f"link add to-far type veth peer name eth0 netns {self.namespace('far')}",
            "link set to-far up",
            "addr add 10.78.0.254/24 dev to-far",
            "addr add fd78::254/64 dev to-far nodad",
        ]
        for host in HOSTS:
            router += [
                f"link add to-{host} type veth peer name eth0 netns {self.namespace(host)}",
                f"link set to-{host} master br0 up",
            ]
        self._batch("router", router)
        self.set_sysctl("router", "net.ipv4.ip_forward", "1")
        self.set_sysctl("router", "net.ipv6.conf.all.forwarding", "1")
        for host in (*HOSTS, "far"):
            network = "78" if host == "far" else "77"
            lines = [
                "link set lo up",
                "link set eth0 up",
                f"addr add {self.address(host)}/24 dev eth0",
                f"addr add {self.address(host, 6)}/64 dev eth0 nodad",
                f"route add default via 10.{network}.0.254",
                f"-6 route add default via fd{network}::254",
            ]
            self._batch(host, lines)

    def _batch(self, host: str, lines: list[str]) -> None:
        # A line of a batch may not carry options of its own, so IPv6 routes go on their own.
        plain = [line for line in lines if not line.startswith("-6 ")]
        self._run("ip", "-n", self.namespace(host), "-batch", "-", stdin="\n".join(plain) + "\n")
        for line in lines:
            if line.startswith("-6 "):
                self._run("ip", "-n", self.namespace(host), *line.split())

    @staticmethod
    def _run(*command: str, stdin: str = "") -> None:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
