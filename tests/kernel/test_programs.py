# SPDX-License-Identifier: Apache-2.0
"""Loading the programs: how much of the verifier's patience it takes, and how few privileges."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import pytest
from support.host import Host
from support.lab import Lab

from splicer import libbpf
from splicer.btf import Btf
from splicer.cli.prerequisites import CAPABILITIES
from splicer.compiler import PROGRAMS

# The verifier gives up at a million; other versions of clang make three times as much of the same source.
PATIENCE = 150_000


def _read_effort(pin: Path) -> int:
    """Instructions that the verifier has walked through for a pinned program."""
    btf = Btf()
    place = btf.locate("bpf_prog_info.verified_insns")
    btf.close()
    if place is None:
        pytest.skip("this kernel (before 5.16) does not tell how much it has verified")
    info = ctypes.create_string_buffer(256)
    size = ctypes.c_uint32(len(info))
    fd = libbpf.open_pin(str(pin))
    try:
        libbpf.check(
            libbpf.get_library().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)), "program info"
        )
    finally:
        os.close(fd)
    return int(struct.unpack_from("=I", info, place.offset)[0])


def test_the_verifier_has_patience_left(host: Host) -> None:
    """Each program stays far below the limit, so that other compilers and kernels load it too."""
    for program in PROGRAMS:
        effort = _read_effort(host.pin_dir / "programs" / program.name)
        assert 100 < effort < PATIENCE, f"{program.name}: {effort}"


def test_three_capabilities_are_enough(lab: Lab) -> None:
    """What the prerequisites ask for is enough; CAP_SYSLOG, to see the kernel's addresses, is not needed."""
    names = [f"+{name.removeprefix('CAP_').lower()}" for name in CAPABILITIES]
    capabilities = ",".join(["-all", *names])
    with Host(start=False) as host:
        host.prefix = ("setpriv", f"--bounding-set={capabilities}", "--inh-caps=-all")
        host.start()
        pair = host.connect(host.peer(lab, "a"), host.peer(lab, "b"), lab.address("b"))
        host.make_hot(pair)
        pair.verify()
