# SPDX-License-Identifier: Apache-2.0
"""What a machine must have before the kernel tests can say anything, and what to do where it has not.

The variable SPLICER_KERNEL_TESTS has three states: unset, the tests run where they can and are skipped
elsewhere; ``1``, anything missing makes them fail; ``0``, they are off.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

from support.cgroup import find_v2_root

VARIABLE = "SPLICER_KERNEL_TESTS"
PROGRAMS = ("ip", "bpftool", "nsenter", "mount", "umount")


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


def decide() -> tuple[str, str]:
    """What to do with the kernel tests: ("run" | "skip" | "fail", reason)."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "0", "1"):
        return "fail", f"{VARIABLE} is {wanted!r}; it may be 0, 1 or unset"
    if wanted == "0":
        return "skip", f"{VARIABLE}=0"
    missing = name_missing()
    if not missing:
        return "run", ""
    reason = f"missing: {', '.join(missing)}"
    if wanted == "1":
        return "fail", f"{VARIABLE}=1, but {reason}"
    return "skip", f"{reason} ({VARIABLE}=1 makes this a failure)"
