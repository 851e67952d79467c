# SPDX-License-Identifier: Apache-2.0
"""Loading the programs: how much of the verifier's patience it takes, and how few privileges."""

from __future__ import annotations

import ctypes
import heapq
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.daemon import call, environment
from support.host import Host
from support.lab import Lab
from support.trees import copy_changed

from splicer.doctor.prerequisites import CAPABILITIES
from splicer.errors import UNSUPPORTED
from splicer.kernel import compiler, libbpf, probes
from splicer.kernel.btf import Btf
from splicer.kernel.layout import WATCH_PAIRS
from splicer.kernel.programs import PROGRAMS

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


READ_CODE = """
from splicer.kernel import compiler
compiled, _ = compiler.compile_programs(compiler.collect(1024))
print(compiled.code["verdict"].hex())
"""
# Helpers by number, include/uapi/linux/bpf.h.
LOOKUP, APPLY_BYTES, REDIRECT, READ_KERNEL, TO_TCP_SOCK = 1, 61, 71, 113, 137


def _find_next(code: bytes, at: int) -> list[int]:
    """Where a program may go on after its instruction number `at`."""
    opcode, _, offset, immediate = struct.unpack_from("=BBhi", code, 8 * at)
    kind, operation = opcode & 7, opcode >> 4
    if kind not in (5, 6) or operation == 8:  # no jump, or a call
        return [at + (2 if opcode == 0x18 else 1)]  # a load of 64 bits takes two places
    if operation == 9:
        return []
    if operation == 0:
        return [at + 1 + (offset if kind == 5 else immediate)]
    return [at + 1, at + 1 + offset]


def _find_cheapest(code: bytes, to: int) -> Counter[int]:
    """The calls on the path to a call of `to` that has the fewest."""
    waiting: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    seen = set()
    while True:
        calls, at, made = heapq.heappop(waiting)
        if at in seen:
            continue
        seen.add(at)
        opcode, _, _, number = struct.unpack_from("=BBhi", code, 8 * at)
        if opcode == libbpf.CALL:
            calls, made = calls + 1, (*made, number)
            if number == to:
                return Counter(made)
        for each in _find_next(code, at):
            heapq.heappush(waiting, (calls, each, made))


def test_what_is_called_for_a_message_that_is_redirected() -> None:
    """Sizes and times differ by compiler and machine, what is called does not: the record and the settings
    are looked up, and nothing of the receiver is read by a helper, where the kernel can do without."""
    command = [sys.executable, "-c", READ_CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    calls = _find_cheapest(bytes.fromhex(done.stdout), REDIRECT)
    btf = Btf()
    reading = {compiler.RDONLY_CAST: 1} if probes.can_cast(btf) else {READ_KERNEL: 4}
    btf.close()
    assert calls == {LOOKUP: 2, APPLY_BYTES: 1, TO_TCP_SOCK: 1, REDIRECT: 1, **reading}


def test_a_kernel_without_the_cast(lab: Lab, tmp_path: Path) -> None:
    """Before Linux 6.2 nothing makes a pointer of an address: a helper reads what the verdict has to know of
    the receiver. What is redirected is the same."""
    tree = copy_changed(tmp_path / "tree", "splicer/kernel/compiler.py", "probes.can_cast(btf)", "False")
    with Host(start=False) as host:
        host.prefix = ("env", f"PYTHONPATH={tree}")
        host.start()
        pair = host.hot_pair(lab)
        before = host.flow(pair)["redirected_messages"]
        pair.pingpong(20)
        assert host.flow(pair)["redirected_messages"] == before + 40
        pair.verify()


def test_three_capabilities_are_enough(lab: Lab) -> None:
    """What the prerequisites ask for is enough; CAP_SYSLOG, to see the kernel's addresses, is not needed."""
    names = [f"+{name.removeprefix('CAP_').lower()}" for name in CAPABILITIES]
    capabilities = ",".join(["-all", *names])
    with Host(start=False) as host:
        host.prefix = ("setpriv", f"--bounding-set={capabilities}", "--inh-caps=-all")
        host.start()
        pair = host.hot_pair(lab)
        pair.verify()


def test_a_program_that_the_verifier_refuses(tmp_path: Path) -> None:
    """The error names the program, the errno and the reason. It is the host that lacks something, so there is
    no traceback; the log is where the hint says; and nothing is left behind."""
    size = f"#define WATCH_PAIRS\t{WATCH_PAIRS}\n"
    tree = copy_changed(tmp_path / "tree", "bpf/types.h", size, "#define WATCH_PAIRS\t12\n")
    with Host(start=False) as host:
        where = [f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}", "--docker=off"]
        for debug in ([], ["--debug"]):
            prefix = ("env", f"PYTHONPATH={tree}")
            done = call("run", f"--cgroup={host.cgroup.path}", *where, *debug, prefix=prefix, timeout=60.0)
            assert done.code == UNSUPPORTED
            message, hint = done.stderr.splitlines()[-2:]
            refused = "splicer: the kernel refused the watch program (EACCES): "
            assert message == refused + "invalid bpf_context access off=96 size=8"
            assert hint == "hint: run again with --debug for the verifier's log"
            assert "Traceback" not in done.stderr
            assert ("loader_log" in done.stderr) == bool(debug)
            assert host.bpffs.pins() == []


REFUSED = """
from splicer.kernel import compiler, libbpf, probes
from splicer.kernel import programs
program = next(each for each in programs.PROGRAMS if each.name == "watch")
code = bytes([0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])  # return 0
for verbose in (False, True):
    fd, log = libbpf.load_program(program.kind, program.name, code, verbose=verbose)
    error = programs.explain_refusal(program, -fd, log)
    print(error, error.hint, sep="\\n")
"""


def test_a_kind_of_program_that_is_forbidden() -> None:
    """The kernel says EPERM and its verifier nothing. Whoever lacks a capability is told just that, as is
    everybody on a kernel that is hardened so: the hint does not send anybody to an empty log."""
    command = [
        "setpriv",
        "--bounding-set=-perfmon,-sys_admin",
        "--inh-caps=-all",
        sys.executable,
        "-c",
        REFUSED,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    message, hint, *again = done.stdout.splitlines()
    assert message == "the kernel refused the watch program (EPERM): Operation not permitted"
    assert "forbids this kind of program (raw tracepoint program)" in hint
    assert again == [message, hint]
