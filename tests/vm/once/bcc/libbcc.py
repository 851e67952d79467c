# SPDX-License-Identifier: Apache-2.0
"""A module as it was recorded, with maps of its own."""

from __future__ import annotations

import base64
import ctypes as ct
import os
import struct
from typing import Any

import maps


class Module:
    """Closes its maps when it goes, as bcc's does."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        types = {name: maps.load_types(base64.b64decode(data)) for name, data in recorded["types"].items()}
        try:
            self.fds = {each["name"]: maps.create(each, types) for each in recorded["maps"]}
        finally:
            for fd in types.values():
                os.close(fd)
        self.code = {
            name: ct.create_string_buffer(self._link(bytes.fromhex(code)), len(code) // 2)
            for name, code in recorded["functions"].items()
        }

    def _link(self, code: bytes) -> bytes:
        """The instructions with the numbers of maps made their descriptors."""
        fds = list(self.fds.values())
        linked = bytearray(code)
        for place in maps.find_references(code):
            (number,) = struct.unpack_from("=i", code, place)
            struct.pack_into("=i", linked, place, fds[number])
        return bytes(linked)

    def __del__(self) -> None:
        for fd in getattr(self, "fds", {}).values():
            os.close(fd)


class _Library:
    @staticmethod
    def bpf_function_start(module: Module, name: bytes) -> int:
        return ct.addressof(module.code[name.decode()])

    @staticmethod
    def bpf_function_size(module: Module, name: bytes) -> int:
        return len(module.code[name.decode()])

    @staticmethod
    def bpf_num_tables(module: Module) -> int:
        return len(module.fds)

    @staticmethod
    def bpf_table_name(module: Module, number: int) -> bytes:
        return list(module.fds)[number].encode()

    @staticmethod
    def bpf_table_fd(module: Module, name: bytes) -> int:
        return module.fds[name.decode()]


lib = _Library()
