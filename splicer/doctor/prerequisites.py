# SPDX-License-Identifier: Apache-2.0
"""What must be there before programs can be loaded: privileges, and BPF's bcc.

bcc is looked at from a child process: importing it would map LLVM into a process that may live for months.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from splicer.errors import FAILURE, UNSUPPORTED, SplicerError

# Numbers from include/uapi/linux/capability.h. CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON for bpf(2)
# (bpf_capable() and perfmon_capable() in include/linux/capability.h) and is what setns(2) asks for; creating
# a SOCKHASH and attaching to a cgroup ask for CAP_NET_ADMIN by itself.
# /proc/<pid>/ns of another user's process opens with CAP_SYS_PTRACE only (ptrace_may_access() in
# kernel/ptrace.c); without it that process's network namespace would not be found, in silence.
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}

_INSTALL_HINT = (
    "apt-get install python3-bpfcc, or make setup; a virtual environment needs --system-site-packages"
)
_IMPORT_TIMEOUT_S = 60
_PROBE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    import bcc
    print(json.dumps({"bpf": hasattr(bcc, "BPF"), "file": getattr(bcc, "__file__", None), "error": None}))
except Exception as error:
    print(json.dumps({"bpf": False, "file": None, "error": f"{type(error).__name__}: {error}"}))
"""


def require_privileges(command: str, *, proc: Path = Path("/proc/self")) -> None:
    """Raise SplicerError unless this process may load BPF programs.

    Asks for effective capabilities and not for user id 0: root in a container often has few, and a service
    may have enough without being root. Capabilities inside a user namespace do not count for bpf(2).
    """
    if missing := find_missing(read_effective_capabilities(proc / "status"), CAPABILITIES):
        raise refuse_missing(missing, command)
    if in_user_namespace(proc / "uid_map"):
        raise refuse_user_namespace(command)


def find_missing(effective: int, wanted: Mapping[str, int]) -> list[str]:
    """Names of the capabilities that are not in the set."""
    return [name for name, number in wanted.items() if not effective >> number & 1]


def refuse_missing(missing: Sequence[str], command: str) -> SplicerError:
    """These capabilities are missing."""
    return SplicerError(
        f"not enough privileges (missing: {', '.join(missing)})",
        hint=f"run it as root: sudo splicer {command}; in a container: --privileged, "
        "or --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add SYS_PTRACE",
        exit_code=FAILURE,
    )


def refuse_user_namespace(command: str) -> SplicerError:
    """Root of a user namespace is nobody."""
    return SplicerError(
        "not enough privileges (root of a user namespace is not root of the host)",
        hint=f"run splicer {command} outside of rootless containers and unshare --user; "
        "with Docker: --userns=host",
        exit_code=FAILURE,
    )


def read_effective_capabilities(status: Path) -> int:
    """The effective capability set, one bit for each capability, from a /proc/<pid>/status file."""
    try:
        lines = status.read_text().splitlines()
    except OSError as error:
        raise SplicerError(
            f"cannot read this process's privileges ({status}: {error.strerror})",
            hint="mount -t proc proc /proc",
        ) from error
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def in_user_namespace(uid_map: Path) -> bool:
    """True when user ids are mapped, as in every user namespace but the first (user_namespaces(7))."""
    try:
        return uid_map.read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False  # a kernel without user namespaces has no such file


def require_bcc() -> None:
    """Raise SplicerError, exit code 4, unless `import bcc` gives a child of this interpreter BPF's bcc."""
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise SplicerError("python module bcc is missing", hint=_INSTALL_HINT, exit_code=UNSUPPORTED)
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROBE, json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT_S,
            check=False,
        )
        # What a module prints while it is imported comes before our line.
        found = json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise SplicerError(
            f"python module bcc cannot be imported ({spec.origin}: {type(error).__name__})",
            hint=f'see why: {sys.executable} -c "import bcc"',
            exit_code=UNSUPPORTED,
        ) from error
    if found["error"] is not None:
        raise SplicerError(
            f"python module bcc cannot be imported ({found['error']})",
            hint="reinstall it: apt-get install --reinstall python3-bpfcc libbpfcc",
            exit_code=UNSUPPORTED,
        )
    if not found["bpf"]:
        raise SplicerError(
            f"python module bcc is not BPF's bcc ({found['file'] or spec.origin or 'a directory'}); "
            "PyPI's package of that name is about crystal lattices",
            hint=f"{sys.executable} -m pip uninstall bcc; then {_INSTALL_HINT}",
            exit_code=UNSUPPORTED,
        )
