# SPDX-License-Identifier: Apache-2.0
"""What the loader does before it needs a kernel."""

from __future__ import annotations

import re

from splicer import compiler


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


def test_every_map_of_the_programs_is_pinned() -> None:
    maps = (compiler.find_sources() / "maps.h").read_text()
    pattern = (
        r"^BPF_(?:F_TABLE\(.*?, (\w+), \w+, \w+\);|TABLE\(.*?, (\w+), \w+\);"
        r"|(?:SOCKHASH|SK_STORAGE|LPM_TRIE|RINGBUF_OUTPUT)\((\w+),)"
    )
    declared = re.findall(pattern, maps, re.M)
    assert sorted(name for names in declared for name in names if name) == sorted(compiler.MAPS)


def test_a_refusal_is_one_line_with_the_verifiers_reason() -> None:
    log = (
        "0: R1=ctx() R10=fp0\n6: (79) r1 = *(u64 *)(r6 +184)\nR1 type=sock_or_null expected=sock_common\n"
        "processed 12 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0\n"
    )
    assert (
        compiler.explain_refusal("register", 13, log)
        == "the kernel refused the register program: R1 type=sock_or_null expected=sock_common"
    )


def test_a_refusal_without_a_log_says_what_the_kernel_said() -> None:
    assert compiler.explain_refusal("observe", 1, "") == (
        "the kernel refused the observe program: Operation not permitted"
    )
