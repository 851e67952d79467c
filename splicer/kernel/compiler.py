# SPDX-License-Identifier: Apache-2.0
"""Compile, load and pin the BPF programs; run as a short-lived child: `python -m splicer.kernel.compiler`.

bcc brings LLVM along (about 120 MB resident), so the daemon has this done by a child that exits. The child
reads one JSON object from stdin ({pin_dir, max_connections, answer, debug, parent}; it dies with the process
parent) and prints one: {"ok": true, "missing": {program: why it does without}, ...} or {"ok": false, "error",
"hint", "exit_code", "log"}. With {"rehearse": true} it pins nothing; see loader.py for what it says then.

This is the only module that imports bcc.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import hashlib
import json
import os
import platform
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splicer.errors import FAILURE, UNSUPPORTED, SplicerError
from splicer.kernel import libbpf, probes
from splicer.kernel.btf import Btf
from splicer.kernel.layout import ENLIST_SIZE, MEASURE_REQUEST, WATCH_REQUEST_SIZE
from splicer.kernel.programs import (
    ANSWERS,
    KERNEL_HINT,
    MAPS,
    PROGRAMS,
    LoadError,
    Program,
    explain_refusal,
)

PACKAGE = Path(__file__).resolve().parents[1]

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h

# Joined into one text in this order: bcc rewrites map methods in the main text only.
SOURCES = (
    "types.h",
    "maps.h",
    "socket.h",
    "registry.h",
    "policy.h",
    "fitness.h",
    "register.c",
    "observe.c",
    "guard.c",
    "verdict.c",
    "adoption.h",
    "enlist.c",
    "adopt.c",
    "watch.c",
    "measure.c",
    "census.c",
    "answer.c",
)

# Macro name (OFF_*, MASK_*) to the kernel's path of the field.
FIELDS = {
    "sock_skc_family": "sock.__sk_common.skc_family",
    "sock_skc_state": "sock.__sk_common.skc_state",
    "sock_skc_num": "sock.__sk_common.skc_num",
    "sock_skc_dport": "sock.__sk_common.skc_dport",
    "sock_skc_daddr": "sock.__sk_common.skc_daddr",
    "sock_skc_rcv_saddr": "sock.__sk_common.skc_rcv_saddr",
    "sock_skc_v6_daddr": "sock.__sk_common.skc_v6_daddr",
    "sock_skc_v6_rcv_saddr": "sock.__sk_common.skc_v6_rcv_saddr",
    "sock_skc_net": "sock.__sk_common.skc_net",
    "sock_skc_bound_dev_if": "sock.__sk_common.skc_bound_dev_if",
    "sock_sk_mark": "sock.sk_mark",
    "net_net_cookie": "net.net_cookie",
    "sock_skc_cookie": "sock.__sk_common.skc_cookie",
    "sock_sk_user_data": "sock.sk_user_data",
    "sock_sk_data_ready": "sock.sk_data_ready",
    "sock_sk_rmem_alloc": "sock.sk_backlog.rmem_alloc",
    "sock_sk_lock_owned": "sock.sk_lock.owned",
    "sock_sk_shutdown": "sock.sk_shutdown",
    "sock_sk_wmem_queued": "sock.sk_wmem_queued",
    "sock_sk_socket": "sock.sk_socket",
    "sock_sk_wq": "sock.sk_wq",
    "sock_sk_write_pending": "sock.sk_write_pending",
    "socket_wq_wait_head": "socket_wq.wait.head",
    "wait_queue_entry_private": "wait_queue_entry.private",
    "wait_queue_entry_entry": "wait_queue_entry.entry",
    "poll_wqueues_polling_task": "poll_wqueues.polling_task",
    "sock_sk_rcvlowat": "sock.sk_rcvlowat",
    "sock_sk_flags": "sock.__sk_common.skc_flags",
    "sock_sk_peek_off": "sock.sk_peek_off",
    "sock_sk_kern_sock": "sock.sk_kern_sock",
    "socket_sk": "socket.sk",
    "socket_file": "socket.file",
    "socket_flags": "socket.flags",
    "file_f_flags": "file.f_flags",
    "inet_connection_sock_icsk_ulp_ops": "inet_connection_sock.icsk_ulp_ops",
    "tcp_sock_snd_una": "tcp_sock.snd_una",
    "tcp_sock_rcv_nxt": "tcp_sock.rcv_nxt",
    "tcp_sock_bytes_acked": "tcp_sock.bytes_acked",
    "tcp_sock_bytes_received": "tcp_sock.bytes_received",
    "tcp_sock_write_seq": "tcp_sock.write_seq",
    "tcp_sock_copied_seq": "tcp_sock.copied_seq",
    "tcp_sock_cb_flags": "tcp_sock.bpf_sock_ops_cb_flags",
    "tcp_sock_data_segs_in": "tcp_sock.data_segs_in",
    "tcp_sock_repair": "tcp_sock.repair",
    "tcp_sock_notsent_lowat": "tcp_sock.notsent_lowat",
    "tcp_sock_urg_data": "tcp_sock.urg_data",
    "tcp_sock_urg_seq": "tcp_sock.urg_seq",
    "sk_psock_refcnt": "sk_psock.refcnt",
    "sk_psock_ingress_msg": "sk_psock.ingress_msg",
    "sk_psock_link": "sk_psock.link",
    "sk_psock_stream_parser": "sk_psock.progs.stream_parser",
    "sk_psock_stream_verdict": "sk_psock.progs.stream_verdict",
    "sk_psock_skb_verdict": "sk_psock.progs.skb_verdict",
    "sk_psock_sk": "sk_psock.sk",
    "sk_msg_list": "sk_msg.list",
    "sk_msg_sg_size": "sk_msg.sg.size",
    "sock_sk_tsflags": "sock.sk_tsflags",
    "sock_sk_filter": "sock.sk_filter",
    "sock_sk_max_pacing_rate": "sock.sk_max_pacing_rate",
    "tcp_sock_recvmsg_inq": "tcp_sock.recvmsg_inq",
    "task_struct_flags": "task_struct.flags",
    "task_struct_thread_info_flags": "task_struct.thread_info.flags",
    "task_struct_stack": "task_struct.stack",
    "task_struct_group_leader": "task_struct.group_leader",
    "task_struct_start_boottime": "task_struct.start_boottime",
    "sock_sk_cgroup": "sock.sk_cgrp_data.cgroup",
    "cgroup_self": "cgroup.self",
    "cgroup_self_parent": "cgroup.self.parent",
    "cgroup_kn": "cgroup.kn",
    "kernfs_node_id": "kernfs_node.id",
    "bpf_iter_meta_seq": "bpf_iter_meta.seq",
}
RDONLY_CAST = 0x7FFE0001  # no helper has such a number
SOCKET_FLAGS = ("SOCK_ZEROCOPY", "SOCK_RCVTSTAMP", "SOCK_URGINLINE", "SOCK_DONE")
OPTIONAL_FIELDS = {"tcp_sock_is_mptcp": "tcp_sock.is_mptcp"}


@dataclass(frozen=True)
class Architecture:
    """Where a task's system call number and its third and fourth argument are in pt_regs (path, and bytes
    from there), and the numbers of the reading calls (asm/unistd.h)."""

    call: str
    call_type: str
    arguments: tuple[tuple[str, int], tuple[str, int]]
    calls: dict[str, int]


ARCHITECTURES = {
    "x86_64": Architecture(
        "pt_regs.orig_ax",
        "u64",
        (("pt_regs.dx", 0), ("pt_regs.r10", 0)),
        {
            "read": 0,
            "readv": 19,
            "recvfrom": 45,
            "recvmsg": 47,
            "splice": 275,
            "recvmmsg": 299,
            "preadv2": 327,
            "io_uring_enter": 426,
        },
    ),
    "aarch64": Architecture(
        "pt_regs.syscallno",
        "s32",
        (("pt_regs.regs", 16), ("pt_regs.regs", 24)),
        {
            "read": 63,
            "readv": 65,
            "splice": 76,
            "recvfrom": 207,
            "recvmsg": 212,
            "recvmmsg": 243,
            "preadv2": 286,
            "io_uring_enter": 426,
        },
    ),
}


def find_sources() -> Path:
    """The bpf/ directory: beside the package in a checkout, inside it when installed."""
    for path in (PACKAGE / "bpf", PACKAGE.parent / "bpf"):
        if (path / SOURCES[0]).exists():
            return path
    raise SplicerError("the BPF sources are missing from this installation", hint="reinstall splicer")


def join_sources(root: Path) -> str:
    """One text; #line makes compiler errors name the file they are in."""
    return "\n".join(f'#line 1 "bpf/{name}"\n{(root / name).read_text()}' for name in SOURCES)


def collect_macros(max_connections: int) -> list[str]:
    """-D flags: offsets, masks, system call numbers, sizes. Raises SplicerError if a field is missing."""
    btf = Btf()
    try:
        flags = []
        for table, required in ((FIELDS, True), (OPTIONAL_FIELDS, False)):
            for macro, path in table.items():
                place = btf.locate(path)
                if place is None and required:
                    raise SplicerError(
                        f"this kernel has no {path}",
                        hint=KERNEL_HINT,
                        exit_code=UNSUPPORTED,
                    )
                if place is not None:
                    flags.append(f"-DOFF_{macro}={place.offset}")
                    flags.append(f"-DMASK_{macro}={place.mask or 0xFF}")
        if probes.can_cast(btf):
            flags.append(f"-DCALL_RDONLY_CAST={RDONLY_CAST}")
            flags.append(f"-DTYPE_tcp_sock={btf.find_structure('tcp_sock')}")
        socket_flags = {name: btf.find_enumerator("sock_flags", name) for name in SOCKET_FLAGS}
        architecture = ARCHITECTURES.get(platform.machine())
        missing = [name for name, value in socket_flags.items() if value is None]
        if missing:
            raise SplicerError(
                f"this kernel has no {', '.join(missing)}", hint=KERNEL_HINT, exit_code=UNSUPPORTED
            )
        if architecture is None:
            raise SplicerError(
                f"splicer does not know this architecture ({platform.machine()})",
                hint=f"supported: {', '.join(ARCHITECTURES)}",
                exit_code=UNSUPPORTED,
            )
        arguments = zip(("arg3", "arg4"), architecture.arguments, strict=True)
        registers = (("call", (architecture.call, 0)), *arguments)
        for name, (path, further) in registers:
            place = btf.locate(path)
            if place is None:
                raise SplicerError(f"this kernel has no {path}", hint=KERNEL_HINT, exit_code=UNSUPPORTED)
            flags.append(f"-DOFF_pt_regs_{name}={place.offset + further}")
    finally:
        btf.close()
    flags += [f"-DENUM_{name}={value}" for name, value in socket_flags.items()]
    flags.append(f"-DCALL_TYPE={architecture.call_type}")
    flags += [f"-DSYSCALL_{name}={number}" for name, number in architecture.calls.items()]
    flags.append(f"-DPAGE_SIZE={os.sysconf('SC_PAGE_SIZE')}")
    flags.append(f"-DMAX_PAIRS={max_connections}")
    return flags


def identify_build(max_connections: int, answer: bool) -> str:
    """Names what would be loaded: same sources, kernel layout, sizes and programs give the same name."""
    text = join_sources(find_sources()) + "\0".join(collect_macros(max_connections))
    text += "\0answer" if answer else ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def link_cast(code: bytes, function: int) -> bytes:
    """The program with its calls of RDONLY_CAST made calls of the kernel function with this BTF id."""
    ours = struct.pack("=BBhi", libbpf.CALL, 0, 0, RDONLY_CAST)
    kernels = struct.pack("=BBhi", libbpf.CALL, libbpf.PSEUDO_KFUNC_CALL << 4, 0, function)
    return b"".join(kernels if code[i : i + 8] == ours else code[i : i + 8] for i in range(0, len(code), 8))


@contextlib.contextmanager
def _stderr_captured() -> Iterator[list[str]]:
    """clang and libbpf write to file descriptor 2; keep what they say."""
    lines: list[str] = []
    with open(os.memfd_create("stderr"), "w+b") as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines += sink.read().decode(errors="replace").splitlines()


def _compile(flags: list[str]) -> Any:
    try:
        import bcc
    except ImportError as error:
        raise SplicerError(
            f"cannot import bcc ({error})", hint="apt-get install python3-bpfcc", exit_code=UNSUPPORTED
        ) from error
    if not hasattr(bcc, "BPF"):
        raise SplicerError(
            f"the bcc module at {bcc.__file__} is not the BPF Compiler Collection",
            hint="pip uninstall bcc; apt-get install python3-bpfcc",
            exit_code=UNSUPPORTED,
        )
    root = find_sources()
    os.environ["BCC_KERNEL_SOURCE"] = str(root / "kernel")
    with _stderr_captured() as said:
        try:
            module = bcc.BPF(text=join_sources(root), cflags=[*flags, "-Wno-macro-redefined"])
        except Exception:
            module = None
    if module is None:
        first = next((line for line in said if "error:" in line), said[-1] if said else "no message")
        raise LoadError(f"the BPF programs do not compile: {first}", "\n".join(said))
    return module


def _read_code(module: Any, program: Program) -> bytes:
    """The instructions of a program as clang made them."""
    from bcc.libbcc import lib

    function = program.function.encode()
    start = lib.bpf_function_start(module.module, function)
    return ct.string_at(start, lib.bpf_function_size(module.module, function))


def _try_to_run(program: Program, fd: int) -> None:
    """watch, measure and enlist are run like this for ever; better know at once that they can be."""
    try:
        if program.name == "watch":
            libbpf.TestRun(fd, WATCH_REQUEST_SIZE).run()
        elif program.name == "measure":
            libbpf.TestRun(fd, MEASURE_REQUEST.size).run()
        elif program.name == "enlist":
            libbpf.PacketRun(fd, ENLIST_SIZE).run(1)
    except libbpf.KernelError as error:
        raise SplicerError(
            f"the kernel loads the {program.name} program and does not run it: {error.strerror}",
            hint=f"this kernel, or a security policy, lacks or forbids BPF_PROG_TEST_RUN; {KERNEL_HINT}",
            exit_code=UNSUPPORTED,
        ) from error


class _Loader:
    """Has everything compiled, and loads the programs one by one."""

    def __init__(self, max_connections: int, debug: bool) -> None:
        self._module = _compile(collect_macros(max_connections))
        self._debug = debug
        self._btf = Btf()
        self._cast = self._btf.find_function("bpf_rdonly_cast")
        self.logs: dict[str, str] = {}

    def close(self) -> None:
        self._btf.close()

    def load(self, program: Program) -> int:
        """Its descriptor. Raises SplicerError if the kernel refuses it, or does not run it."""
        fd, log = libbpf.load_program(
            program.kind,
            program.name,
            link_cast(_read_code(self._module, program), self._cast),
            attach_type=program.attach_type,
            btf_id=program.find_target(self._btf),
            verbose=self._debug,
        )
        self.logs[program.name] = log
        if fd < 0:
            raise explain_refusal(program, -fd, log)
        _try_to_run(program, fd)
        return fd

    def find_map(self, name: str) -> int:
        """The descriptor of a map."""
        from bcc.libbcc import lib

        return int(lib.bpf_table_fd(self._module.module, name.encode()))


def build(pin_dir: str, max_connections: int, debug: bool, answer: bool) -> dict[str, Any]:
    """Compile, load and pin everything below `pin_dir`, with what answers FIONREAD if `answer`; removes what
    it pinned when it fails half-way."""
    loader = _Loader(max_connections, debug)
    pinned: list[str] = []
    missing: dict[str, str] = {}

    def pin(fd: int, directory: str, name: str) -> None:
        path = os.path.join(pin_dir, directory, name)
        libbpf.pin(fd, path)
        pinned.append(path)

    try:
        for directory in ("maps", "programs", "links"):
            os.makedirs(os.path.join(pin_dir, directory), mode=0o700, exist_ok=True)
        for program in (*PROGRAMS, *(ANSWERS if answer else ())):
            try:
                fd = loader.load(program)
            except SplicerError as error:
                if not program.is_optional:
                    raise
                missing[program.name] = error.message
                continue
            pin(fd, "programs", program.name)
            if program.name == "verdict":
                libbpf.attach_program_to_map(fd, loader.find_map("spliced"))
        for name in MAPS:
            pin(loader.find_map(name), "maps", name)
    except BaseException:
        for path in pinned:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    finally:
        loader.close()
    return {"programs": loader.logs if debug else {}, "maps": list(MAPS), "missing": missing}


def rehearse(max_connections: int, debug: bool, answer: bool) -> dict[str, Any]:
    """Compile and load everything, and say what the kernel refuses. What answers FIONREAD is attached as
    well, until this process ends, which is at once: see class Rehearsal."""
    loader = _Loader(max_connections, debug)
    refused: dict[str, tuple[str, str | None]] = {}
    loaded: dict[str, int] = {}
    try:
        for program in (*PROGRAMS, *(ANSWERS if answer else ())):
            try:
                loaded[program.name] = loader.load(program)
            except SplicerError as error:
                refused[program.name] = (error.message, error.hint)
        answered, unanswered = "", ""
        if answer:
            answered, unanswered = _rehearse_answer(loader, loaded, refused)
    finally:
        loader.close()
    return {"refused": refused, "answered": answered, "unanswered": unanswered}


def _rehearse_answer(
    loader: _Loader, loaded: dict[str, int], refused: dict[str, tuple[str, str | None]]
) -> tuple[str, str]:
    """The class that a socket of ours sees with the answers attached, or why there are none."""
    names = [program.name for program in ANSWERS]
    for name in names:
        if name in refused:
            return "", refused[name][0]
    try:
        for name in names:
            libbpf.link_function(loaded[name])
        return probes.find_class(libbpf.Map(os.dup(loader.find_map("ends")))).name, ""
    except libbpf.KernelError as error:
        return "", str(error.strerror)


def _die_with(parent: int) -> None:
    """Not outlive the daemon: the next one must not find us pinning beside its own loader."""
    ct.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    request = json.load(sys.stdin)
    if "parent" in request:
        _die_with(request["parent"])
    try:
        what = (request["max_connections"], request.get("debug", False), request.get("answer", False))
        done = rehearse(*what) if request.get("rehearse") else build(request["pin_dir"], *what)
        json.dump({"ok": True, **done}, sys.stdout)
        return 0
    except SplicerError as error:
        reply = {
            "ok": False,
            "error": str(error),
            "hint": error.hint,
            "exit_code": error.exit_code,
            "log": getattr(error, "log", ""),
        }
    except OSError as error:
        message = f"cannot load the BPF programs: {error.strerror}"
        reply = {"ok": False, "error": message, "exit_code": FAILURE}
    json.dump(reply, sys.stdout)
    return 1


if __name__ == "__main__":
    sys.exit(main())
