# SPDX-License-Identifier: Apache-2.0
"""What the loader does before it needs a kernel."""

from __future__ import annotations

import re
import struct

from splicer.kernel import compiler
from splicer.kernel.programs import MAPS, TAP_MAPS


def test_errors_of_the_compiler_name_the_file_they_are_in() -> None:
    text = compiler.join_sources(compiler.find_sources())
    assert re.findall(r'^#line 1 "bpf/(.*)"$', text, re.M) == list(compiler.SOURCES)


def test_every_offset_the_programs_use_is_looked_up_and_none_else() -> None:
    text = compiler.join_sources(compiler.find_sources())
    types = r"(?:[us](?:8|16|32|64), )?"
    fields = set(re.findall(rf"(?:FIELD|PROBE)\([^;]*?, {types}([a-z][a-z0-9_]+)[ +)]", text))
    fields |= set(re.findall(r"OFF_([a-z_0-9]+)", text))
    known = {*compiler.FIELDS, *compiler.OPTIONAL_FIELDS}
    assert {name for name in fields if name.startswith(("sock_", "tcp_sock_", "sk_psock_"))} <= known
    for name in known:
        assert name in text, f"{name} is looked up and not used"


def test_every_map_of_the_programs_is_pinned_or_the_taps() -> None:
    maps = (compiler.find_sources() / "maps.h").read_text()
    pattern = (
        r"^BPF_(?:F_TABLE\(.*?, (\w+), \w+, \w+\);|TABLE\(.*?, (\w+), [\w +]+\);"
        r"|(?:SOCKHASH|SK_STORAGE|PROG_ARRAY|LPM_TRIE|RINGBUF_OUTPUT)\((\w+),)"
    )
    declared = re.findall(pattern, maps, re.M)
    assert sorted(name for names in declared for name in names if name) == sorted((*MAPS, *TAP_MAPS))


def test_only_calls_of_the_cast_become_calls_of_the_kernels() -> None:
    """The number may stand in any other instruction, too, as in the halves of one that loads 64 bits."""
    marked = struct.pack("=BBhi", 0x85, 0, 0, compiler.RDONLY_CAST)
    others = b"".join(
        struct.pack("=BBhi", *each)
        for each in (
            (0x85, 0, 0, 71),  # a helper
            (0x18, 1, 0, compiler.RDONLY_CAST),
            (0, 0, 0, compiler.RDONLY_CAST),
            (0xB7, 1, 0, compiler.RDONLY_CAST),
        )
    )
    linked = struct.pack("=BBhi", 0x85, 0x20, 0, 4711)
    assert compiler.link_cast(others + marked + others + marked, 4711) == others + linked + others + linked
