# SPDX-License-Identifier: Apache-2.0
"""Checks of privileges, and of what this host or container has mounted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from splicer.doctor import prerequisites
from splicer.doctor.check import AS_ROOT, Check, Outcome, ok, unknown, warn
from splicer.doctor.surroundings import Surroundings
from splicer.host import cgroups, process
from splicer.kernel import bpffs, probes

# Splicer does without them; see docs/kernels.md.
WELCOME = {"CAP_NET_BROADCAST": 11, "CAP_NET_RAW": 13}  # include/uapi/linux/capability.h
_WITHOUT = {
    "CAP_NET_BROADCAST": "networks that are taken away are noticed a second later",
    "CAP_NET_RAW": "conntrack and IPVS may forget connections that are spliced",
}


def _check_capability(name: str, surroundings: Surroundings) -> Outcome:
    wanted = {**prerequisites.CAPABILITIES, **WELCOME}
    if not prerequisites.find_missing(surroundings.capabilities, {name: wanted[name]}):
        return ok("this process has it")
    if surroundings.uid != 0:
        return unknown("not held by this user", AS_ROOT)
    if name in WELCOME:
        return warn(
            f"missing: {_WITHOUT[name]}",
            f"in a container: --cap-add {name.removeprefix('CAP_')}",
        )
    raise prerequisites.refuse_missing([name], "run")


def _check_user_namespace(surroundings: Surroundings) -> Outcome:
    if prerequisites.in_user_namespace(surroundings.root / "proc/self/uid_map"):
        raise prerequisites.refuse_user_namespace("run")
    return ok("this is the host's")


def _check_cgroup(surroundings: Surroundings) -> Outcome:
    found = surroundings.cgroup
    return ok(f"v2 at {found.path}" + (" (v1 beside it)" if found.substituted else ""))


def _check_cgroup_root(surroundings: Surroundings) -> Outcome:
    found = surroundings.cgroup
    if found.is_a_namespaces_root:
        return warn(f"{found.path} is this container's, not the host's", cgroups.HINT_HOST_ROOT)
    return ok("the host's root" if found.is_root else "a cgroup below the root, as asked for")


def _check_pids(surroundings: Surroundings) -> Outcome:
    if process.sees_host_pids(str(surroundings.root / "proc")):
        return ok("/proc shows the host's processes")
    return warn("/proc shows this container's processes only", process.HINT_HOST_PIDS)


def _check_bpffs(surroundings: Surroundings) -> Outcome:
    place = surroundings.settings.pin_dir
    if missing := bpffs.find_missing(place):
        return ok(f"none on {missing} yet; splicer run mounts it")
    return ok(f"mounted, with room for {place}")


def _check_lockdown(_surroundings: Surroundings) -> Outcome:
    level = probes.read_lockdown()
    if level in ("", "none"):
        return ok("the kernel is not locked down")
    return warn(
        f"{level}: splicer may not answer FIONREAD"
        + (", nor read the kernel's memory" if level == "confidentiality" else ""),
        "Secure Boot off, no lockdown= on the kernel's command line",
    )


def list_checks() -> Iterator[Check]:
    """In the order in which they are looked at."""
    for name in prerequisites.CAPABILITIES:
        yield Check(name.lower(), partial(_check_capability, name))
    for name in WELCOME:
        yield Check(name.lower(), partial(_check_capability, name), is_needed=False)
    yield Check("user_namespace", _check_user_namespace)
    yield Check("cgroup", _check_cgroup)
    yield Check("cgroup_root", _check_cgroup_root, is_needed=False)
    yield Check("pids", _check_pids, is_needed=False)
    yield Check("bpffs", _check_bpffs, privileged=True)  # others may not look into its directories
    yield Check("lockdown", _check_lockdown, is_needed=False)
