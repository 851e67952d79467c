# SPDX-License-Identifier: Apache-2.0
"""Maps and their types as bpf(2) knows them: read, and created again."""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Iterator
from typing import Any

_BPF = 321  # the system call, on x86-64
_MAP_CREATE, _GET_INFO, _BTF_LOAD, _BTF_BY_ID = 0, 15, 18, 19
_LD_IMM64, _MAP_FD, _MAP_VALUE = 0x18, 1, 2
_syscall = ct.CDLL(None, use_errno=True).syscall


def _bpf(command: int, attributes: bytes) -> int:
    room = ct.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    result: int = _syscall(_BPF, command, room, 128)
    if result < 0:
        raise OSError(ct.get_errno(), f"bpf({command}): {os.strerror(ct.get_errno())}")
    return result


def _read_info(fd: int, info: ct.Array[ct.c_char]) -> None:
    _bpf(_GET_INFO, struct.pack("=IIQ", fd, len(info), ct.addressof(info)))


def read(name: str, fd: int) -> dict[str, Any]:
    """What `create` needs (struct bpf_map_info in include/uapi/linux/bpf.h)."""
    info = ct.create_string_buffer(88)
    _read_info(fd, info)
    kind, _, key, value, entries, flags = struct.unpack_from("=6I", info)
    types, key_type, value_type = struct.unpack_from("=3I", info, 64)
    return {
        "name": name,
        "shape": [kind, key, value, entries, flags],
        "types": str(types) if types else "",
        "key_type": key_type,
        "value_type": value_type,
    }


def create(recorded: dict[str, Any], types: dict[str, int]) -> int:
    """Its descriptor. `types`: descriptors of BTF, by the names that they were recorded under."""
    attributes = struct.pack(
        "=5IiI16sIi2I",
        *recorded["shape"],
        0,
        0,
        recorded["name"].encode()[:15],
        0,
        types.get(recorded["types"], 0),
        recorded["key_type"],
        recorded["value_type"],
    )
    return _bpf(_MAP_CREATE, attributes)


def read_types(number: str) -> bytes:
    """The BTF with this id."""
    fd = _bpf(_BTF_BY_ID, struct.pack("=I", int(number)))
    try:
        size = 1 << 20
        data = ct.create_string_buffer(size)
        # btf, btf_size, id, name, name_len, kernel_btf
        info = ct.create_string_buffer(struct.pack("=QIIQII", ct.addressof(data), size, 0, 0, 0, 0), 32)
        _read_info(fd, info)
        return data.raw[: struct.unpack_from("=I", info, 8)[0]]
    finally:
        os.close(fd)


def load_types(data: bytes) -> int:
    room = ct.create_string_buffer(data, len(data))
    return _bpf(_BTF_LOAD, struct.pack("=QQII", ct.addressof(room), 0, len(data), 0))


def find_references(code: bytes) -> Iterator[int]:
    """Where, in bytes, instructions name a map."""
    place = 0
    while place < len(code):
        wide = code[place] == _LD_IMM64
        if wide and code[place + 1] >> 4 in (_MAP_FD, _MAP_VALUE):
            yield place + 4
        place += 16 if wide else 8
