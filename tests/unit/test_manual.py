# SPDX-License-Identifier: Apache-2.0
"""The manual pages: nothing that --help says is missing from them. test_package.py has man show them."""

from __future__ import annotations

import argparse
import importlib.util
from types import ModuleType

import pytest
from support.daemon import REPOSITORY

from splicer.cli.main import COMMANDS, make_parser
from splicer.policy.config import VALUE_TYPES, option_of, variable_of


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    specification = importlib.util.spec_from_file_location("manual", REPOSITORY / "packaging/manual.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command(manual: ModuleType, command: str) -> None:
    """Under the command's heading, each with what --help says of it."""
    (child,) = [child for name, _, child in manual.commands_of(make_parser()) if name == command]
    page = manual.write_command_page()
    section = page.split(f"## splicer {command}\n")[1].split("\n## ")[0]
    for action in child._actions:
        if "--help" in action.option_strings or any(
            flag in ("--color", "--debug") for flag in action.option_strings
        ):
            continue
        for word in action.option_strings or [action.metavar or action.dest]:
            assert str(word) in section.replace("\\", ""), word
        if isinstance(action, argparse._StoreAction) and action.help:
            assert " ".join(action.help.split()[:4]) in section.replace("\\", "")


def test_every_command_and_exit_code(manual: ModuleType) -> None:
    page = manual.write_command_page()
    assert [line.split()[-1] for line in page.splitlines() if line.startswith("## splicer ")] == list(
        COMMANDS
    )
    codes = page.split("# EXIT STATUS")[1].split("\n# ")[0]
    assert [line.strip("*") for line in codes.splitlines() if line.startswith("**")] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "130",
    ]


@pytest.mark.parametrize("name", VALUE_TYPES)
def test_every_setting(manual: ModuleType, name: str) -> None:
    """In splicer.toml(5), by option, variable and key."""
    page = manual.write_configuration_page()
    (entry,) = [line for line in page.splitlines() if f"`{variable_of(name)}`," in line and "`" in line]
    assert f"`{name}`" in entry
    assert option_of(name).lstrip("-") in entry or name == "census"


def test_no_link_is_left(manual: ModuleType) -> None:
    """They lead nowhere from a terminal."""
    assert "](" not in manual.write_configuration_page()


def test_tables_are_lists(manual: ModuleType) -> None:
    assert "|---" not in manual.write_configuration_page()
