# SPDX-License-Identifier: Apache-2.0
"""What the kernel holds of BPF, whoever loaded it: programs, maps and links by id, and what is where.

All of it takes CAP_SYS_ADMIN (bpf_prog_get_next_id() and its like, kernel/bpf/syscall.c). Structures are read
as far as include/uapi/linux/bpf.h had them in Linux 5.10; the kernel fills as much as it is given room for.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from splicer.kernel import libbpf

_Info = TypeVar("_Info")
_MOST_ATTACHED = 64  # BPF_CGROUP_MAX_PROGS, kernel/bpf/cgroup.c


class _LinkInfo(ct.Structure):
    """First fields of struct bpf_link_info, of a link to a network namespace."""

    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("prog_id", ct.c_uint32),
        ("unused", ct.c_uint32),
        ("netns_ino", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("room", ct.c_uint64 * 8),
    ]


@dataclass(frozen=True)
class Program:
    """A program: its id, enum bpf_prog_type, and its name as the kernel has it (15 characters at most)."""

    id: int
    type: int
    name: str


@dataclass(frozen=True)
class Table:
    """A map: its id, enum bpf_map_type, and its name."""

    id: int
    type: int
    name: str


@dataclass(frozen=True)
class Link:
    """A link: its id, enum bpf_link_type, and the id of its program. `netns` is the inode number of the
    network namespace that a link of that type attaches it to, and `attach_type` the hook there."""

    id: int
    type: int
    program: int
    netns: int
    attach_type: int


def read_program(fd: int) -> Program:
    info = libbpf.ProgramInfo()
    libbpf.read_info(fd, info)
    return Program(info.id, info.type, info.name.decode(errors="replace"))


def read_map(fd: int) -> Table:
    info = libbpf.MapInfo()
    libbpf.read_info(fd, info)
    return Table(info.id, info.type, info.name.decode(errors="replace"))


def read_link(fd: int) -> Link:
    info = _LinkInfo()
    libbpf.read_info(fd, info)
    return Link(info.id, info.type, info.prog_id, info.netns_ino, info.attach_type)


def list_programs() -> list[Program]:
    """All programs in the kernel. Raises KernelError."""
    return list(_list("prog", read_program))


def list_maps() -> list[Table]:
    """All maps in the kernel. Raises KernelError."""
    return list(_list("map", read_map))


def list_links() -> list[Link]:
    """All links in the kernel. Raises KernelError."""
    return list(_list("link", read_link))


def _list(kind: str, read: Callable[[int], _Info]) -> Iterator[_Info]:
    following = getattr(libbpf.get_library(), f"bpf_{kind}_get_next_id")
    number = ct.c_uint32(0)
    while True:
        try:
            libbpf.check(following(number, ct.byref(number)), f"list {kind}s")
            fd = _open(kind, number.value)
        except libbpf.KernelError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        if fd is None:
            continue  # it has gone meanwhile
        try:
            info = read(fd)
        finally:
            os.close(fd)
        yield info


def _open(kind: str, number: int) -> int | None:
    """Descriptor of an object by its id; None if there is none such."""
    fd = getattr(libbpf.get_library(), f"bpf_{kind}_get_fd_by_id")(ct.c_uint32(number))
    try:
        return libbpf.check(fd, f"open {kind} {number}")
    except libbpf.KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def query(fd: int, attach_type: int) -> list[int]:
    """Ids of the programs that are attached to a cgroup, or to a sockmap, itself. Raises KernelError."""
    attached = (ct.c_uint32 * _MOST_ATTACHED)()
    count, flags = ct.c_uint32(_MOST_ATTACHED), ct.c_uint32(0)
    result = libbpf.get_library().bpf_prog_query(
        fd, attach_type, ct.c_uint32(0), ct.byref(flags), attached, ct.byref(count)
    )
    libbpf.check(result, "list attached programs")
    return list(attached[: count.value])


def query_map(number: int, attach_type: int) -> list[int]:
    """The same of a sockmap, by its id; empty if it has gone, or its kind of map has no such hook."""
    fd = _open("map", number)
    if fd is None:
        return []
    try:
        return query(fd, attach_type)
    except libbpf.KernelError as error:
        # EBUSY: a verdict without a parser, and the other kind is there (sock_map_prog_link_lookup() in
        # net/core/sock_map.c). EOPNOTSUPP: the kernel has no parsers.
        if error.errno in (errno.EBUSY, errno.EOPNOTSUPP):
            return []
        raise
    finally:
        os.close(fd)


def read_pin(path: str) -> Program | Table | Link | None:
    """What is pinned there; None if it is no pin, or has gone."""
    try:
        fd = libbpf.open_pin(path)
    except OSError:
        return None
    try:
        kind = os.readlink(f"/proc/self/fd/{fd}").replace("_", "-")
        for name, read in (("bpf-prog", read_program), ("bpf-map", read_map), ("bpf-link", read_link)):
            if kind.endswith(name):
                return read(fd)
        return None
    except OSError:
        return None
    finally:
        os.close(fd)
