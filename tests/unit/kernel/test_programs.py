# SPDX-License-Identifier: Apache-2.0
"""What it means when the kernel refuses a program: which one, which errno, and what to do."""

from __future__ import annotations

import errno

import pytest

from splicer.errors import UNSUPPORTED
from splicer.kernel.programs import PROGRAMS, LoadError, Program, explain_refusal

BY_NAME = {program.name: program for program in PROGRAMS}
# What the verifier says whatever comes of it.
STATISTICS = (
    "func#0 @0\n"
    "verification time 23 usec\n"
    "stack depth 0\n"
    "processed 12 insns (limit 1000000) max_states_per_insn 0 total_states 1 peak_states 1 mark_read 0\n"
)


def explain(name: str, number: int, log: str = "") -> LoadError:
    return explain_refusal(BY_NAME[name], number, log)


def test_the_verifiers_reason_in_one_line() -> None:
    log = "0: R1=ctx() R10=fp0\n6: (79) r1 = *(u64 *)(r6 +184)\nR1 type=sock_or_null expected=sock_common\n"
    error = explain("register", errno.EACCES, log + STATISTICS)
    assert error.message == (
        "the kernel refused the register program (EACCES): R1 type=sock_or_null expected=sock_common"
    )
    assert error.hint == "run again with --debug for the verifier's log"
    assert error.log == log + STATISTICS


@pytest.mark.parametrize("log", ["", STATISTICS], ids=["no-log", "statistics"])
def test_eperm_of_a_verifier_that_has_no_objection(log: str) -> None:
    """A kernel that forbids this kind of program: the log, to which one would be sent, says nothing of it."""
    error = explain("watch", errno.EPERM, log)
    assert error.message == "the kernel refused the watch program (EPERM): Operation not permitted"
    assert "forbids this kind of program (raw tracepoint program)" in (error.hint or "")
    assert "security policy" in (error.hint or "")
    assert "--debug" not in (error.hint or "")


def test_a_kind_of_program_that_the_kernel_does_not_have() -> None:
    error = explain("guard", errno.EINVAL)
    assert error.message == "the kernel refused the guard program (EINVAL): Invalid argument"
    assert "lacks something of this kind of program (setsockopt program)" in (error.hint or "")
    assert "splicer needs Linux" in (error.hint or "")


def test_an_errno_that_user_space_has_no_name_for() -> None:
    error = explain("adopt", 524)
    assert error.message == "the kernel refused the adopt program (ENOTSUPP): Operation is not supported"


def test_no_memory() -> None:
    error = explain("verdict", errno.ENOMEM)
    assert "(ENOMEM)" in error.message
    assert "memory" in (error.hint or "")


@pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])
@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.E2BIG, errno.ENOMEM, 524])
def test_each_has_a_hint_and_the_exit_code_for_this_host(program: Program, number: int) -> None:
    error = explain_refusal(program, number, "")
    assert f"the {program.name} program (E" in error.message
    assert error.hint
    assert error.exit_code == UNSUPPORTED
