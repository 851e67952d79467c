# SPDX-License-Identifier: Apache-2.0
"""Redirects every message of every local connection below a cgroup, for the suite `naive`: a program of its
own, run by its path.

    naive.py CGROUP HEADERS

HEADERS are those of a kernel, as bcc wants them. It says `ready`, and ends with standard input; then it says
how many messages it has redirected, and how often that program ran while the kernel timed programs, and for
how many nanoseconds. What bcc says of the C that it compiles goes to standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bcc import BPF, BPFAttachType
from bcc.libbcc import lib

# BPF_F_ALLOW_MULTI: beside the programs of others.
_BESIDE_OTHERS = 1 << 1


def main() -> None:
    cgroup = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
    os.environ["BCC_KERNEL_SOURCE"] = sys.argv[2]
    programs = BPF(text=Path(__file__).with_suffix(".c").read_text(encoding="ascii"))
    redirect = programs.load_func("redirect", BPF.SK_MSG)
    # Of a map of this type bcc has no object.
    ends = lib.bpf_table_fd(programs.module, b"ends")
    programs.attach_func(redirect, ends, BPFAttachType.SK_MSG_VERDICT)
    put_in = programs.load_func("put_in", BPF.SOCK_OPS)
    programs.attach_func(put_in, cgroup, BPFAttachType.CGROUP_SOCK_OPS, _BESIDE_OTHERS)
    try:
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        programs.detach_func(put_in, cgroup, BPFAttachType.CGROUP_SOCK_OPS)
    lines = Path(f"/proc/self/fdinfo/{redirect.fd}").read_text(encoding="ascii").splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    print(programs["redirected"].sum(0).value, int(facts["run_cnt"]), int(facts["run_time_ns"]))


if __name__ == "__main__":
    main()
