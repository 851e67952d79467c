# SPDX-License-Identifier: Apache-2.0
"""What a bug report needs of the host, besides what the daemon and the checks say: facts of the kernel, what
is loaded, the end of the log. Nothing is changed."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

# Options without which something of splicer's does not work, or works otherwise.
CONFIG = (
    "BPF",
    "BPF_SYSCALL",
    "BPF_JIT",
    "BPF_JIT_ALWAYS_ON",
    "BPF_UNPRIV_DEFAULT_OFF",
    "BPF_STREAM_PARSER",
    "CGROUP_BPF",
    "CGROUPS",
    "DEBUG_INFO_BTF",
    "DEBUG_INFO_BTF_MODULES",
    "BPF_EVENTS",
    "BPF_LSM",
    "BPF_KPROBE_OVERRIDE",
    "FUNCTION_TRACER",
    "DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
    "FPROBE",
    "KPROBES",
    "NET_NS",
    "INET",
    "INET_DIAG",
    "IPV6",
    "MPTCP",
    "TLS",
    "NETFILTER",
    "NF_CONNTRACK",
    "IP_VS",
    "SECURITY_LOCKDOWN_LSM",
    "LSM",
    "PREEMPT",
    "PREEMPT_VOLUNTARY",
    "PREEMPT_DYNAMIC",
    "PREEMPT_RT",
    "HZ",
    "NR_CPUS",
)
SYSCTLS = (
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_harden",
    "net/core/bpf_jit_limit",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/tcp_mem",
    "net/ipv4/tcp_congestion_control",
    "kernel/unprivileged_bpf_disabled",
    "kernel/kptr_restrict",
    "kernel/perf_event_paranoid",
    "kernel/bpf_stats_enabled",
)
LOG_LINES = 500
_PATIENCE_S = 10.0


def read_kernel(root: str = "/") -> dict[str, Any]:
    """Version, options and switches of the kernel, and how large the machine is; not its name."""
    base = Path(root)
    return {
        "release": platform.release(),
        "version": platform.version(),
        "machine": platform.machine(),
        "distribution": _read(base / "etc/os-release").splitlines()[:4],
        "cpus": os.cpu_count(),
        "memory": _read(base / "proc/meminfo").splitlines()[:3],
        "lockdown": _read(base / "sys/kernel/security/lockdown"),
        "lsm": _read(base / "sys/kernel/security/lsm"),
        "sysctl": {name: _read(base / "proc/sys" / name) for name in SYSCTLS},
        "config": read_config(root),
    }


def read_config(root: str = "/") -> dict[str, str]:
    """The options of CONFIG with which the kernel was built, those that are not set as "n"; empty if nobody
    says."""
    base = Path(root)
    text = ""
    with contextlib.suppress(OSError, EOFError):
        text = gzip.decompress((base / "proc/config.gz").read_bytes()).decode(errors="replace")
    text = text or _read(base / f"boot/config-{platform.release()}")
    found = dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.M))
    return {name: found.get(name, "n").strip('"') for name in CONFIG} if text else {}


def _read(path: Path) -> str:
    """What is there, empty if nothing."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_loaded(pin_dir: str) -> list[dict[str, Any]]:
    """What is pinned there: its place, and what the kernel says of it. Raises OSError, SplicerError."""
    from splicer.kernel import libbpf

    found = []
    for path in sorted(Path(pin_dir).rglob("*")):
        if path.is_dir() or path.is_symlink():
            continue
        fd = libbpf.open_pin(str(path))
        try:
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text(errors="replace").splitlines()
        finally:
            os.close(fd)
        facts = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        for dull in ("pos", "flags", "mnt_id", "ino"):
            facts.pop(dull, None)
        found.append({"pin": str(path.relative_to(pin_dir)), **facts})
    return found


def find_unit(pid: int, proc: str = "/proc") -> str:
    """The service that a process is of; empty if it is of none."""
    for part in reversed(_read(Path(proc) / str(pid) / "cgroup").rpartition(":")[2].split("/")):
        if part.endswith(".service") and not part.startswith("user@"):
            return part
    return ""


def read_log(unit: str, lines: int = LOG_LINES) -> list[str]:
    """The last lines that a service has written to the journal. Raises OSError, ValueError."""
    command = ["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", str(lines), "-u", unit]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, errors="replace"
    )
    if done.returncode:
        raise ValueError(done.stderr.strip()[:300] or f"journalctl ended with {done.returncode}")
    return done.stdout.splitlines()


def parse_log(lines: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects, as the daemon writes them where there is no terminal; and how many are
    not."""
    found: list[dict[str, Any]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                found.append(entry)
    return found, len(lines) - len(found)
