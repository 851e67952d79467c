# SPDX-License-Identifier: Apache-2.0
"""Compile the BPF programs, for the kernel that runs.

bcc brings LLVM along (about 120 MB resident), so the daemon has this done by a child that exits (loader.py).
This is the only module that imports bcc.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import dataclasses
import hashlib
import importlib.util
import os
import platform
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splicer.errors import UNSUPPORTED, SplicerError
from splicer.kernel import libbpf, probes
from splicer.kernel.btf import Btf
from splicer.kernel.compiled import Compiled, find_references
from splicer.kernel.programs import ANSWERS, KERNEL_HINT, PROGRAMS, TAP, LoadError

PACKAGE = Path(__file__).resolve().parents[1]

# Joined into one text in this order: bcc rewrites map methods in the main text only.
SOURCES = (
    "types.h",
    "maps.h",
    "socket.h",
    "registry.h",
    "policy.h",
    "fitness.h",
    "volume.h",
    "register.c",
    "observe.c",
    "guard.c",
    "verdict.c",
    "tap.c",
    "adoption.h",
    "enlist.c",
    "adopt.c",
    "watch.c",
    "measure.c",
    "tally.c",
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
_CFLAGS = ("-Wno-macro-redefined",)


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


@dataclass(frozen=True)
class Sources:
    """All that goes into the compiler: one text, and its flags."""

    text: str
    flags: tuple[str, ...]

    def name_build(self, answer: bool) -> str:
        """Names what would be loaded: same sources, kernel layout, sizes and programs give the same name."""
        text = self.text + "\0".join(self.flags)
        text += "\0answer" if answer else ""
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name_compiled(self) -> str:
        """Names what would come out of the compiler. It looks at the kernel and at the headers as well."""
        parts = [*describe_kernel(), *_CFLAGS, *self.flags, self.text]
        include = find_sources() / "kernel"
        for path in sorted(include.rglob("*.h")):
            parts += [str(path.relative_to(include)), path.read_text()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def collect(max_connections: int) -> Sources:
    """What is compiled for so many connections. Raises SplicerError if the kernel lacks something."""
    return Sources(join_sources(find_sources()), tuple(collect_macros(max_connections)))


def describe_kernel() -> tuple[str, str, str]:
    """Release, version and machine of the kernel that runs."""
    kernel = os.uname()
    return kernel.release, kernel.version, kernel.machine


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


def compile_programs(sources: Sources) -> tuple[Compiled, Any]:
    """What comes of it, and the module of bcc, which has made the maps and holds their descriptors."""
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
    os.environ["BCC_KERNEL_SOURCE"] = str(find_sources() / "kernel")
    with _stderr_captured() as said:
        try:
            module = bcc.BPF(text=sources.text, cflags=[*sources.flags, *_CFLAGS])
        except Exception:
            module = None
    if module is None:
        first = next((line for line in said if "error:" in line), said[-1] if said else "no message")
        raise LoadError(f"the BPF programs do not compile: {first}", "\n".join(said))
    return _record(module, bcc.__file__), module


def find_maps(module: Any) -> dict[str, int]:
    """The descriptors of a module's maps by name, in the order in which it has them."""
    from bcc.libbcc import lib

    lib.bpf_num_tables.restype = ct.c_size_t
    lib.bpf_num_tables.argtypes = [ct.c_void_p]
    lib.bpf_table_name.restype = ct.c_char_p
    lib.bpf_table_name.argtypes = [ct.c_void_p, ct.c_size_t]
    numbers = range(lib.bpf_num_tables(module.module))
    names = [lib.bpf_table_name(module.module, number) for number in numbers]
    return {name.decode(): lib.bpf_table_fd(module.module, name) for name in names}


def _record(module: Any, package: str) -> Compiled:
    """What bcc has made of the sources, with maps by their numbers instead of their descriptors."""
    from bcc.libbcc import lib

    maps = find_maps(module)
    numbers = {fd: number for number, fd in enumerate(maps.values())}
    # The kernel cuts names.
    shapes = {name: libbpf.read_shape(fd) for name, fd in maps.items()}
    code = {}
    for program in (*PROGRAMS, *ANSWERS, TAP):
        function = program.function.encode()
        start, size = (
            call(module.module, function) for call in (lib.bpf_function_start, lib.bpf_function_size)
        )
        instructions = bytearray(ct.string_at(start, size))
        for place in find_references(instructions):
            (fd,) = struct.unpack_from("=i", instructions, place)
            struct.pack_into("=i", instructions, place, numbers[fd])
        code[program.function] = bytes(instructions)
    types = {shape.types for shape in shapes.values() if shape.types}
    return Compiled(
        tuple(dataclasses.replace(shape, name=name) for name, shape in shapes.items()),
        {number: libbpf.read_types(number) for number in types},
        code,
        _describe_compiler(package),
    )


def _describe_compiler(package: str) -> dict[str, str]:
    """The files that the compiler was made of, each with what tells it from another one."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as mapped:
        paths = set(re.findall(r"/\S*/lib(?:bcc|clang|LLVM)\S*\.so\S*$", mapped.read(), re.M))
    return {path: _describe_file(path) for path in sorted({package, *paths})}


def _describe_file(path: str) -> str:
    """Empty if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} bytes of {int(found.st_mtime)}"


def is_same_compiler(made_by: Mapping[str, str]) -> bool:
    """Would it be compiled by the same compiler? Where there is none, what there is has to do."""
    try:
        if importlib.util.find_spec("bcc") is None:
            return True
    except (ImportError, ValueError):
        return True
    return all(_describe_file(path) == said for path, said in made_by.items())
