# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from splicer import errors
from splicer.errors import SplicerError


def test_lines_are_message_and_hint() -> None:
    error = SplicerError("no such cgroup (/x)", hint="ls /x")
    assert error.lines() == ["splicer: no such cgroup (/x)", "hint: ls /x"]
    assert error.exit_code == errors.FAILURE
    assert str(error) == "no such cgroup (/x)"


def test_no_hint_no_line() -> None:
    assert SplicerError("x").lines() == ["splicer: x"]


def test_exit_codes_are_the_documented_ones() -> None:
    codes = (
        errors.OK,
        errors.FAILURE,
        errors.USAGE,
        errors.NOT_RUNNING,
        errors.UNSUPPORTED,
        errors.INTERRUPTED,
    )
    assert codes == (0, 1, 2, 3, 4, 130)
