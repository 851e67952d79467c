# SPDX-License-Identifier: Apache-2.0
"""Compile with the real bcc and print what came out: {"functions": {name: hex}, "maps": [], "types": {}}.

Reads {"text", "cflags"} from stdin. Where an instruction names a map, it has the map's number in the list.
"""

from __future__ import annotations

import base64
import ctypes as ct
import json
import struct
import sys
from pathlib import Path

from bcc import BPF
from bcc.libbcc import lib

# Behind the real one, so that `bcc` beside this file is not found.
sys.path.append(str(Path(__file__).parent))

import maps


def main() -> None:
    lib.bpf_num_tables.restype = ct.c_size_t
    lib.bpf_num_tables.argtypes = [ct.c_void_p]
    lib.bpf_table_name.restype = ct.c_char_p
    lib.bpf_table_name.argtypes = [ct.c_void_p, ct.c_size_t]
    request = json.load(sys.stdin)
    module = BPF(text=request["text"], cflags=request["cflags"]).module
    names = [lib.bpf_table_name(module, each) for each in range(lib.bpf_num_tables(module))]
    fds = [lib.bpf_table_fd(module, name) for name in names]
    recorded = [maps.read(name.decode(), fd) for name, fd in zip(names, fds, strict=True)]
    functions = {}
    for number in range(lib.bpf_num_functions(module)):
        name = lib.bpf_function_name(module, number)
        code = bytearray(
            ct.string_at(lib.bpf_function_start(module, name), lib.bpf_function_size(module, name))
        )
        for place in maps.find_references(bytes(code)):
            struct.pack_into("=i", code, place, fds.index(struct.unpack_from("=i", code, place)[0]))
        functions[name.decode()] = code.hex()
    types = {each["types"]: "" for each in recorded if each["types"]}
    for number in types:
        types[number] = base64.b64encode(maps.read_types(number)).decode()
    print(json.dumps({"functions": functions, "maps": recorded, "types": types}))


main()
