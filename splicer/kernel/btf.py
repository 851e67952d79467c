# SPDX-License-Identifier: Apache-2.0
"""Where fields are in the running kernel's structures, from its BTF.

The programs are compiled on the machine they run on, with these offsets as macros: CO-RE by recompilation.
"""

from __future__ import annotations

import ctypes as ct
import os
from dataclasses import dataclass

from splicer.errors import UNSUPPORTED, SplicerError
from splicer.kernel.libbpf import get_library

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _FUNC, _TYPE_TAG = 8, 9, 10, 12, 18


class _Type(ct.Structure):
    """struct btf_type; members follow it in memory."""

    _fields_ = [("name_off", ct.c_uint32), ("info", ct.c_uint32), ("size_or_type", ct.c_uint32)]


class _Member(ct.Structure):
    _fields_ = [("name_off", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32)]


class _Enumerator(ct.Structure):
    _fields_ = [("name_off", ct.c_uint32), ("value", ct.c_int32)]


@dataclass(frozen=True)
class Place:
    """A field: byte offset from the start of the outermost structure, and the mask of a bit field within its
    byte (0 for a whole field)."""

    offset: int
    mask: int = 0


class Btf:
    """The running kernel's type information. Raises SplicerError (exit code 4) where there is none."""

    def __init__(self) -> None:
        if not os.path.exists("/sys/kernel/btf/vmlinux"):
            raise SplicerError(
                "the kernel has no BTF type information (/sys/kernel/btf/vmlinux)",
                hint="use a kernel built with CONFIG_DEBUG_INFO_BTF, as distribution kernels are",
                exit_code=UNSUPPORTED,
            )
        library = get_library()
        library.btf__type_by_id.restype = ct.c_void_p
        library.btf__name_by_offset.restype = ct.c_char_p
        self._btf = ct.c_void_p(library.btf__load_vmlinux_btf())
        if not self._btf.value or self._btf.value > (1 << 64) - 4096:
            raise SplicerError(
                "cannot read the kernel's BTF type information (/sys/kernel/btf/vmlinux)",
                hint="use a kernel built with CONFIG_DEBUG_INFO_BTF, as distribution kernels are",
                exit_code=UNSUPPORTED,
            )

    def close(self) -> None:
        get_library().btf__free(self._btf)

    def _type(self, type_id: int) -> tuple[_Type, int]:
        address = get_library().btf__type_by_id(self._btf, ct.c_uint32(type_id))
        return _Type.from_address(address), address

    def _name(self, offset: int) -> str:
        return (get_library().btf__name_by_offset(self._btf, ct.c_uint32(offset)) or b"").decode()

    def find(self, name: str, kind: int) -> int:
        """Type id, or -1."""
        found: int = get_library().btf__find_by_name_kind(self._btf, name.encode(), ct.c_uint32(kind))
        return found if found > 0 else -1

    def find_tracepoint(self, name: str) -> int:
        """Id to give to a BTF-typed raw tracepoint program, or -1."""
        return self.find(f"btf_trace_{name}", _TYPEDEF)

    def find_iterator(self, target: str) -> int:
        """Id to give to an iterator program, or -1."""
        return self.find_function(f"bpf_iter_{target}")

    def find_function(self, name: str) -> int:
        """Id of a kernel function, or -1."""
        return self.find(name, _FUNC)

    def count_parameters(self, function_id: int) -> int:
        """How many a kernel function has, given by its id."""
        function, _ = self._type(function_id)
        prototype, _ = self._type(function.size_or_type)
        return int(prototype.info & 0xFFFF)

    def find_structure(self, name: str) -> int:
        """Id of a structure, or -1."""
        return self.find(name, _STRUCT)

    def _strip(self, type_id: int) -> int:
        while True:
            t, _ = self._type(type_id)
            if (t.info >> 24) & 0x1F not in (_TYPEDEF, _VOLATILE, _CONST, _TYPE_TAG):
                return type_id
            type_id = t.size_or_type

    def _search(self, type_id: int, field: str) -> tuple[int, int, int] | None:
        """(bit offset, bit size or 0, type id) of a field, looking into anonymous members."""
        t, address = self._type(type_id)
        kind = (t.info >> 24) & 0x1F
        if kind not in (_STRUCT, _UNION):
            return None
        bit_fields = t.info >> 31
        for i in range(t.info & 0xFFFF):
            member = _Member.from_address(address + ct.sizeof(_Type) + i * ct.sizeof(_Member))
            start = member.offset & 0xFFFFFF if bit_fields else member.offset
            bits = member.offset >> 24 if bit_fields else 0
            name = self._name(member.name_off)
            if name == field:
                return start, bits, member.type
            if not name:
                inner = self._search(self._strip(member.type), field)
                if inner:
                    return start + inner[0], inner[1], inner[2]
        return None

    def locate(self, path: str) -> Place | None:
        """Place of `structure.field.field`, or None if this kernel does not have it."""
        structure, *fields = path.split(".")
        type_id = self.find(structure, _STRUCT)
        if type_id < 0:
            return None
        offset, bits = 0, 0
        for field in fields:
            found = self._search(self._strip(type_id), field)
            if found is None:
                return None
            offset, bits, type_id = offset + found[0], found[1], found[2]
        if bits:
            return Place(offset // 8, ((1 << bits) - 1) << (offset % 8))
        return Place(offset // 8)

    def find_enumerator(self, enum: str, name: str) -> int | None:
        """Value of a named constant of `enum`, or None."""
        type_id = self.find(enum, _ENUM)
        if type_id < 0:
            return None
        t, address = self._type(type_id)
        for i in range(t.info & 0xFFFF):
            item = _Enumerator.from_address(address + ct.sizeof(_Type) + i * ct.sizeof(_Enumerator))
            if self._name(item.name_off) == name:
                return int(item.value)
        return None
