# SPDX-License-Identifier: Apache-2.0
"""Maps, programs, links, iterators, test runs and the ring buffer, through libbpf's C API.

libbpf comes with python3-bpfcc. The daemon works on pinned objects through this module alone, so it never
loads bcc and the LLVM behind it. Functions raise KernelError, an OSError that names the operation.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import ctypes.util
import errno
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from splicer.errors import UNSUPPORTED, SplicerError

# enum bpf_attach_type, include/uapi/linux/bpf.h
BPF_CGROUP_SOCK_OPS = 3
BPF_SK_MSG_VERDICT = 7
BPF_CGROUP_SETSOCKOPT = 22
BPF_TRACE_RAW_TP = 23
BPF_TRACE_FEXIT = 25
BPF_TRACE_ITER = 28

# enum bpf_prog_type
BPF_PROG_TYPE_SCHED_CLS = 3
BPF_PROG_TYPE_SOCK_OPS = 13
BPF_PROG_TYPE_SK_MSG = 16
BPF_PROG_TYPE_RAW_TRACEPOINT = 17
BPF_PROG_TYPE_CGROUP_SOCKOPT = 25
BPF_PROG_TYPE_TRACING = 26

# A load of 64 bits, which takes two places: its code, and its source register where it is a map's address, or
# that of a value in a map.
LD_IMM64 = 0x18
PSEUDO_MAP_FD, PSEUDO_MAP_VALUE = 1, 2
# A call instruction: its code, and its source register where a kernel function is called by BTF id.
CALL = 0x85
PSEUDO_KFUNC_CALL = 2

BPF_MAP_TYPE_ARRAY = 2
BPF_MAP_TYPE_SOCKHASH = 18
BPF_ANY = 0
ENOTSUPP = 524  # include/linux/errno.h, not for user space and seen there all the same
NAME_LENGTH = 15  # BPF_OBJ_NAME_LEN, without the zero at the end
BATCH = 4096
_ITERATOR_READ = 65536


class KernelError(OSError):
    """A bpf(2) operation failed; `errno` and `strerror` are the kernel's."""

    def __init__(self, number: int, operation: str) -> None:
        super().__init__(number, f"{operation}: {os.strerror(number)}")


class _BatchOptions(ct.Structure):
    _fields_ = [("size", ct.c_size_t), ("elem_flags", ct.c_uint64), ("flags", ct.c_uint64)]


class _LoadOptions(ct.Structure):
    """struct bpf_prog_load_opts as of libbpf 0.6; later fields are told apart by `size`."""

    _fields_ = [
        ("size", ct.c_size_t),
        ("attempts", ct.c_int),
        ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32),
        ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p),
        ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p),
        ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_char_p),
    ]


class _RunOptions(ct.Structure):
    """struct bpf_test_run_opts as of libbpf 0.4."""

    _fields_ = [
        ("size", ct.c_size_t),
        ("data_in", ct.c_void_p),
        ("data_out", ct.c_void_p),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("ctx_in", ct.c_void_p),
        ("ctx_out", ct.c_void_p),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("repeat", ct.c_int),
        ("duration", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
    ]


class _MapOptions(ct.Structure):
    """struct bpf_map_create_opts as of libbpf 0.6; later fields are told apart by `size`."""

    _fields_ = [
        ("size", ct.c_size_t),
        ("btf_fd", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("map_extra", ct.c_uint64),
        ("numa_node", ct.c_uint32),
        ("map_ifindex", ct.c_uint32),
    ]


class MapInfo(ct.Structure):
    """First fields of struct bpf_map_info."""

    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
        ("ifindex", ct.c_uint32),
        ("btf_vmlinux_value_type_id", ct.c_uint32),
        ("netns_dev", ct.c_uint64),
        ("netns_ino", ct.c_uint64),
        ("btf_id", ct.c_uint32),
        ("btf_key_type_id", ct.c_uint32),
        ("btf_value_type_id", ct.c_uint32),
    ]


class _TypesInfo(ct.Structure):
    """struct bpf_btf_info."""

    _fields_ = [
        ("btf", ct.c_uint64),
        ("btf_size", ct.c_uint32),
        ("id", ct.c_uint32),
        ("name", ct.c_uint64),
        ("name_len", ct.c_uint32),
        ("kernel_btf", ct.c_uint32),
    ]


class ProgramInfo(ct.Structure):
    """First fields of struct bpf_prog_info."""

    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_prog_len", ct.c_uint32),
        ("xlated_prog_len", ct.c_uint32),
        ("jited_prog_insns", ct.c_uint64),
        ("xlated_prog_insns", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("created_by_uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
    ]


def _open_library() -> ct.CDLL:
    for name in ("libbpf.so.1", "libbpf.so.0", ctypes.util.find_library("bpf")):
        if not name:
            continue
        try:
            library = ct.CDLL(name, use_errno=True)
        except OSError:
            continue
        library.btf__load_vmlinux_btf.restype = ct.c_void_p
        library.ring_buffer__new.restype = ct.c_void_p
        library.libbpf_set_print(None)  # what goes wrong is said once, by whoever asked
        return library
    raise SplicerError(
        "libbpf is not installed",
        hint="apt-get install python3-bpfcc (it brings libbpf), or: make setup",
        exit_code=UNSUPPORTED,
    )


_library: ct.CDLL | None = None


def get_library() -> ct.CDLL:
    """libbpf, opened once. Raises SplicerError (exit code 4) where it is missing."""
    global _library
    if _library is None:
        _library = _open_library()
    return _library


def check(result: int, operation: str) -> int:
    """Turn libbpf's two error conventions (-1 and errno, or -errno) into KernelError."""
    if result >= 0:
        return result
    raise KernelError(ct.get_errno() or -result, operation)


def read_info(fd: int, info: ct.Structure, what: str = "object info") -> None:
    """Have the kernel fill in what it knows of an object."""
    size = ct.c_uint32(ct.sizeof(info))
    check(get_library().bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(size)), what)


def pin(fd: int, path: str) -> None:
    check(get_library().bpf_obj_pin(fd, path.encode()), f"pin {path}")


def open_pin(path: str) -> int:
    """File descriptor of a pinned object."""
    return check(get_library().bpf_obj_get(path.encode()), f"open {path}")


class Map:
    """A BPF map by file descriptor; keys and values are bytes as the kernel has them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = MapInfo()
        read_info(fd, info, "map info")
        self.key_size: int = info.key_size
        self.max_entries: int = info.max_entries
        self.name: str = info.name.decode()
        per_cpu = info.type in (5, 6, 10)  # BPF_MAP_TYPE_PERCPU_{HASH,ARRAY}, LRU_PERCPU_HASH
        self.cpus: int = get_library().libbpf_num_possible_cpus() if per_cpu else 1
        self.value_size: int = (info.value_size + 7) // 8 * 8 * self.cpus if per_cpu else info.value_size

    @classmethod
    def open(cls, path: str) -> Map:
        return cls(open_pin(path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def get(self, key: bytes) -> bytes | None:
        value = ct.create_string_buffer(self.value_size)
        if get_library().bpf_map_lookup_elem(self.fd, key, value) < 0:
            if ct.get_errno() == errno.ENOENT:
                return None
            raise KernelError(ct.get_errno(), f"lookup in {self.name}")
        return value.raw

    def set(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        check(
            get_library().bpf_map_update_elem(self.fd, key, value, ct.c_uint64(flags)),
            f"update of {self.name}",
        )

    def delete(self, key: bytes) -> bool:
        """False if there was nothing to delete."""
        if get_library().bpf_map_delete_elem(self.fd, key) < 0:
            if ct.get_errno() == errno.ENOENT:
                return False
            raise KernelError(ct.get_errno(), f"delete in {self.name}")
        return True

    def walk_keys(self) -> Iterator[bytes]:
        """Keys one by one; entries that come or go meanwhile may be missed or seen twice.

        Where the one in hand goes away the kernel begins anew, so there is an end to it after as many keys as
        the map can hold twice over."""
        key: bytes | None = None
        following = ct.create_string_buffer(self.key_size)
        for _ in range(2 * self.max_entries):
            if get_library().bpf_map_get_next_key(self.fd, key, following) != 0:
                return
            key = following.raw
            yield key

    def walk(self) -> Walk:
        """All entries, in steps; see Walk."""
        return Walk(self)

    def items(self) -> list[tuple[bytes, bytes]]:
        """All entries. Not for per-CPU maps or the SOCKHASH."""
        found: list[tuple[bytes, bytes]] = []
        for keys, values in read_steps(self.walk()):
            found += zip(split(keys, self.key_size), split(values, self.value_size), strict=True)
        return found


def split(text: memoryview, size: int) -> list[bytes]:
    """What lies one after the other there, each with so many bytes."""
    whole = bytes(text)
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def read_steps(walk: Walk, most: int | None = None) -> Iterator[tuple[memoryview, memoryview]]:
    """A walk to its end: keys and values, so many at a time (None: BATCH)."""
    while (step := walk.step(most or BATCH)) is not None:
        yield step


class Walk:
    """Goes through a hash or an array in steps, with as much time between them as one likes.

    What is there all the time is met once; what comes or goes meanwhile may be missed. Not for per-CPU maps
    or the SOCKHASH.
    """

    def __init__(self, entries: Map) -> None:
        self._map = entries
        self._room = 0
        self._keys = self._values = bytearray()
        self._token: Any = None  # where to go on; None at the beginning
        self._ended = False

    def _make_room(self, entries: int) -> None:
        self._room = entries
        self._keys = bytearray(entries * self._map.key_size)
        self._values = bytearray(entries * self._map.value_size)

    def step(self, wanted: int) -> tuple[memoryview, memoryview] | None:
        """Keys and values of about so many entries, good until the next step; None at the end."""
        if self._ended:
            return None
        wanted = min(wanted, self._map.max_entries)
        if self._room < wanted:
            self._make_room(wanted)
        while True:
            count = ct.c_uint32(wanted)
            following = ct.create_string_buffer(max(self._map.key_size, 8))
            options = _BatchOptions(ct.sizeof(_BatchOptions), 0, 0)
            result = get_library().bpf_map_lookup_batch(
                self._map.fd,
                self._token,
                following,
                (ct.c_char * len(self._keys)).from_buffer(self._keys),
                (ct.c_char * len(self._values)).from_buffer(self._values),
                ct.byref(count),
                ct.byref(options),
            )
            number = ct.get_errno() if result < 0 else 0
            if number != errno.ENOSPC:
                break
            # A step ends with a whole hash bucket, and the next one has more entries than there is room for.
            wanted *= 2
            self._make_room(wanted)
        if number not in (0, errno.ENOENT):
            raise KernelError(number, f"reading {self._map.name}")
        self._token, self._ended = following, number == errno.ENOENT
        keys, values = memoryview(self._keys), memoryview(self._values)
        return keys[: count.value * self._map.key_size], values[: count.value * self._map.value_size]


@dataclass(frozen=True)
class MapShape:
    """What a map is made from: enum bpf_map_type, sizes in bytes, the kernel's flags; and the BTF that
    describes it, by id (0: none), with its types of key and value."""

    name: str
    kind: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    types: int = 0
    key_type: int = 0
    value_type: int = 0


def create_map(kind: int, name: str, key_size: int, value_size: int, max_entries: int) -> int:
    """File descriptor of a new map; sizes in bytes."""
    return create_like(MapShape(name, kind, key_size, value_size, max_entries))


def create_like(shape: MapShape, types_fd: int = 0) -> int:
    """File descriptor of a new map of this shape. `types_fd`: descriptor of the BTF that describes it."""
    options = _MapOptions()
    options.size = ct.sizeof(_MapOptions)
    options.map_flags = shape.flags
    if types_fd:
        options.btf_fd = types_fd
        options.btf_key_type_id = shape.key_type
        options.btf_value_type_id = shape.value_type
    fd = get_library().bpf_map_create(
        shape.kind,
        shape.name.encode(),
        shape.key_size,
        shape.value_size,
        shape.max_entries,
        ct.byref(options),
    )
    return check(fd, f"create map {shape.name}")


def read_shape(fd: int) -> MapShape:
    """What would make a map like this one."""
    info = MapInfo()
    read_info(fd, info, "map info")
    return MapShape(
        info.name.decode(),
        info.type,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.map_flags,
        info.btf_id,
        info.btf_key_type_id,
        info.btf_value_type_id,
    )


def read_types(number: int) -> bytes:
    """The BTF with this id."""
    library = get_library()
    fd = check(library.bpf_btf_get_fd_by_id(ct.c_uint32(number)), "open BTF")
    try:
        info = _TypesInfo()
        read_info(fd, info, "BTF info")
        room = ct.create_string_buffer(info.btf_size)
        wanted = _TypesInfo(btf=ct.addressof(room), btf_size=len(room))
        read_info(fd, wanted, "read BTF")
        return room.raw
    finally:
        os.close(fd)


def load_types(data: bytes) -> int:
    """File descriptor of this BTF."""
    return check(get_library().bpf_btf_load(data, ct.c_size_t(len(data)), None), "load BTF")


def load_program(
    kind: int, name: str, code: bytes, *, attach_type: int = 0, btf_id: int = 0, verbose: bool = False
) -> tuple[int, str]:
    """Load one program. Returns (file descriptor, verifier log); the descriptor is -errno on refusal."""
    log = ct.create_string_buffer((32 if verbose else 4) << 20)
    options = _LoadOptions()
    options.size = ct.sizeof(_LoadOptions)
    options.expected_attach_type = attach_type
    options.attach_btf_id = btf_id
    instructions = ct.create_string_buffer(code, len(code))

    def attempt(level: int) -> int:
        options.log_level = level
        options.log_size = ct.sizeof(log) if level else 0
        options.log_buf = ct.cast(log, ct.c_char_p) if level else None
        fd: int = get_library().bpf_prog_load(
            kind, name.encode(), b"GPL", instructions, ct.c_size_t(len(code) // 8), ct.byref(options)
        )
        return fd if fd >= 0 else -(ct.get_errno() or -fd)

    fd = attempt(2 if verbose else 0)
    if fd == -errno.ENOSPC and verbose:
        fd = attempt(4)  # a log of all paths that does not fit is no reason to refuse
    if fd < 0 and not verbose:
        fd = attempt(1)
    return fd, log.value.decode(errors="replace")


def attach_program_to_map(program_fd: int, map_fd: int) -> None:
    """Make an SK_MSG program the verdict of a SOCKHASH; it lasts as long as the map."""
    check(get_library().bpf_prog_attach(program_fd, map_fd, BPF_SK_MSG_VERDICT, 0), "attach verdict")


def link_cgroup(program_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """Attach to a cgroup beside other programs (links always use BPF_F_ALLOW_MULTI)."""
    return check(
        get_library().bpf_link_create(program_fd, cgroup_fd, attach_type, None), "attach to the cgroup"
    )


def detach(link_fd: int) -> None:
    """Detach a cgroup link at once; closing its last descriptor leaves that to a worker of the kernel."""
    check(get_library().bpf_link_detach(link_fd), "detach from the cgroup")


def link_tracepoint(program_fd: int) -> int:
    """Attach a BTF-typed raw tracepoint program to the tracepoint it was loaded for."""
    return check(get_library().bpf_raw_tracepoint_open(None, program_fd), "attach to the tracepoint")


def link_function(program_fd: int) -> int:
    """Attach a program to the kernel function it was loaded for."""
    return check(get_library().bpf_raw_tracepoint_open(None, program_fd), "attach to the function")


def link_iterator(program_fd: int) -> int:
    """A link from which iterators are made."""
    return check(get_library().bpf_link_create(program_fd, 0, BPF_TRACE_ITER, None), "make an iterator link")


def create_iterator(link_fd: int) -> int:
    """An iterator over what the calling thread's network namespace holds at this moment."""
    return check(get_library().bpf_iter_create(link_fd), "make an iterator")


def finish_iterator(fd: int) -> bytes:
    """Walk an iterator to its end, and close it. Returns what its program has written."""
    written = bytearray()
    try:
        while part := os.read(fd, _ITERATOR_READ):
            written += part
    finally:
        os.close(fd)
    return bytes(written)


class TestRun:
    """Runs a raw tracepoint program that is attached to nothing (BPF_PROG_TEST_RUN, since Linux 5.10)."""

    def __init__(self, program_fd: int, context_size: int) -> None:
        """`context_size`: bytes, those of twelve 64-bit numbers at most."""
        self.context = bytearray(context_size)
        """What the program gets."""
        self._fd = program_fd
        self._buffer = (ct.c_char * context_size).from_buffer(self.context)
        self._options = _RunOptions()
        self._options.size = ct.sizeof(_RunOptions)
        self._options.ctx_in = ct.addressof(self._buffer)
        self._options.ctx_size_in = context_size
        self._reference = ct.byref(self._options)
        self._call = get_library().bpf_prog_test_run_opts

    def run(self) -> int:
        """What the program returns: 32 bits, without a sign."""
        if (result := self._call(self._fd, self._reference)) < 0:
            check(result, "run a program")
        return int(self._options.retval)

    def run_each(self, contexts: array[int]) -> Iterator[tuple[int, int]]:
        """Run it on many contexts that lie there one after the other: the number of each for which it
        returned something other than 0, and that."""
        options, call, fd, reference = self._options, self._call, self._fd, self._reference
        size = options.ctx_size_in
        start, words = contexts.buffer_info()
        try:
            for number in range(words * contexts.itemsize // size):
                options.ctx_in = start + number * size
                if (result := call(fd, reference)) < 0:
                    check(result, "run a program")
                if found := options.retval:
                    yield number, found
        finally:
            options.ctx_in = ct.addressof(self._buffer)


class PacketRun:
    """Runs a tc program that is attached to nothing on a packet, as if it had come in over the loopback
    device of the calling thread's network namespace."""

    def __init__(self, program_fd: int, size: int) -> None:
        """`size`: bytes of the packet, with its Ethernet header; less than a page."""
        self.packet = bytearray(size)
        """What the program gets, and what it has made of it."""
        self._fd = program_fd
        self._buffer = (ct.c_char * size).from_buffer(self.packet)
        self._options = _RunOptions()
        self._options.size = ct.sizeof(_RunOptions)
        self._options.data_in = self._options.data_out = ct.addressof(self._buffer)
        self._options.data_size_in = size
        self._reference = ct.byref(self._options)
        self._call = get_library().bpf_prog_test_run_opts

    def run(self, times: int) -> None:
        """Run it so often, on what the run before has made of the packet. Raises KernelError; EINTR if a
        signal came: the packet is as it was then, whatever the program has done elsewhere."""
        self._options.repeat = times
        self._options.data_size_out = len(self.packet)
        if (result := self._call(self._fd, self._reference)) < 0:
            check(result, "run a program")


def _read_program_info(fd: int) -> ProgramInfo:
    """All zero if the descriptor is not of a program."""
    info = ProgramInfo()
    with contextlib.suppress(KernelError):
        read_info(fd, info)
    return info


def read_program_type(fd: int) -> int:
    """enum bpf_prog_type of a program, 0 if the descriptor is not of one."""
    return int(_read_program_info(fd).type)


def read_compiled_size(fd: int) -> int:
    """Bytes of machine code that the kernel has made of a program; 0 if it interprets it."""
    return int(_read_program_info(fd).jited_prog_len)


def read_version() -> str:
    """Of libbpf. Raises SplicerError where it is missing."""
    library = get_library()
    library.libbpf_version_string.restype = ct.c_char_p
    return str(library.libbpf_version_string().decode().removeprefix("v"))


class RingBuffer:
    """Consumer of a BPF_MAP_TYPE_RINGBUF; `handle` gets each record as bytes."""

    def __init__(self, map_fd: int, handle: Callable[[bytes], None]) -> None:
        def receive(_context: object, data: int, size: int) -> int:
            handle(ct.string_at(data, size))
            return 0

        self._callback = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)(receive)
        self._ring = get_library().ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise KernelError(ct.get_errno(), "open the ring buffer")
        self.epoll_fd: int = get_library().ring_buffer__epoll_fd(ct.c_void_p(self._ring))

    def consume(self) -> int:
        """Handle all that is there; returns the number of records."""
        return check(get_library().ring_buffer__consume(ct.c_void_p(self._ring)), "read the ring buffer")

    def close(self) -> None:
        if self._ring:
            get_library().ring_buffer__free(ct.c_void_p(self._ring))
            self._ring = None
