# SPDX-License-Identifier: Apache-2.0
"""What a machine must have before the tests that need root can say anything; what to do where it has not.

The variables SPLICER_KERNEL_TESTS and SPLICER_E2E_TESTS have three states: unset, the tests run where they
can and are skipped elsewhere; ``1``, anything missing makes them fail; ``0``, they are off.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable

from support.cgroup import find_v2_root

VARIABLE = "SPLICER_KERNEL_TESTS"
PROGRAMS = ("ip", "bpftool", "nsenter", "mount", "umount")
E2E_VARIABLE = "SPLICER_E2E_TESTS"
E2E_PROGRAMS = (
    *("ip", "bpftool", "nsenter", "unshare", "mount", "umount", "iptables"),
    *("docker", "dockerd", "debootstrap", "slirp4netns", "tcpdump", "systemd-analyze", "lintian"),
    *("prometheus", "promtool", "podman", "crun", "catatonit"),
)
# Podman's network, which its package only recommends; not in PATH.
PODMAN_HELPERS = ("netavark", "aardvark-dns")
PODMAN_DIRECTORIES = ("/usr/lib/podman", "/usr/libexec/podman")


def name_missing() -> list[str]:
    """What this machine lacks, in words; empty if the tests can run."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root privileges")
    missing += [f"the program {name}" for name in PROGRAMS if shutil.which(name) is None]
    if shutil.which("nft") is None and shutil.which("iptables") is None:
        missing.append("the program nft or iptables")
    if find_v2_root() is None:
        missing.append("a mounted cgroup v2 hierarchy")
    if importlib.util.find_spec("bcc") is None:
        missing.append("the Python package bcc (python3-bpfcc)")
    return missing


def name_missing_for_e2e() -> list[str]:
    """The same for the tests with containers."""
    missing = [] if os.geteuid() == 0 else ["root privileges"]
    missing += [f"the program {name}" for name in E2E_PROGRAMS if shutil.which(name) is None]
    missing += [
        f"Podman's helper {name}"
        for name in PODMAN_HELPERS
        if shutil.which(name, path=os.pathsep.join(PODMAN_DIRECTORIES)) is None
    ]
    if find_v2_root() is None:
        missing.append("a mounted cgroup v2 hierarchy")
    if find_compose() is None:
        missing.append("the program docker-compose, or docker with its plugin compose")
    if not os.path.exists("/dev/net/tun"):
        missing.append("the device /dev/net/tun")
    return missing


def find_compose() -> list[str] | None:
    """How Compose is called here; a standalone program of either version before the plugin."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = ["docker", "compose"]
    try:
        done = subprocess.run([*plugin, "version"], capture_output=True, check=False)
    except OSError:
        return None
    return None if done.returncode else plugin


def decide() -> tuple[str, str]:
    """What to do with the kernel tests: ("run" | "skip" | "fail", reason)."""
    return _decide(VARIABLE, name_missing)


def decide_e2e() -> tuple[str, str]:
    """The same for the tests with containers."""
    return _decide(E2E_VARIABLE, name_missing_for_e2e)


def _decide(variable: str, name_missing: Callable[[], list[str]]) -> tuple[str, str]:
    wanted = os.environ.get(variable, "")
    if wanted not in ("", "0", "1"):
        return "fail", f"{variable} is {wanted!r}; it may be 0, 1 or unset"
    if wanted == "0":
        return "skip", f"{variable}=0"
    missing = name_missing()
    if not missing:
        return "run", ""
    reason = f"missing: {', '.join(missing)}"
    if wanted == "1":
        return "fail", f"{variable}=1, but {reason}"
    return "skip", f"{reason} ({variable}=1 makes this a failure)"
