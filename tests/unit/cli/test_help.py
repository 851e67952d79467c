# SPDX-License-Identifier: Apache-2.0
"""Help is what it was: a change of it shows in tests/unit/cli/help/, where somebody sees it.

`WRITE_HELP=1 make unit ARGS="-k test_help_is_stable"` writes it anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splicer.cli.main import COMMANDS

from ..conftest import Invoke

HELP = Path(__file__).with_name("help")


def without_usage(text: str) -> str:
    """Python's versions break these lines in different places."""
    return text[text.index("\n\n") + 2 :]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_stable(invoke: Invoke, command: str) -> None:
    told = without_usage(invoke(*([command] if command else []), "--help").stdout)
    file = HELP / f"{command or 'splicer'}.txt"
    if os.environ.get("WRITE_HELP"):
        file.write_text(told)
    assert file.read_text() == told


def test_nothing_else_is_kept() -> None:
    assert {path.stem for path in HELP.iterdir()} == {"splicer", *COMMANDS}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_colour_is_for_terminals_that_want_it(invoke: Invoke, command: str) -> None:
    """NO_COLOR, and a file: no escape in help, whatever TERM says."""
    arguments = [*([command] if command else []), "--help"]
    for environ in ({"NO_COLOR": "1"}, {"TERM": "xterm-256color"}):
        assert "\x1b" not in invoke(*arguments, environ=environ).stdout
