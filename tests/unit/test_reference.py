# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ list is what the code has: settings, labels, commands, events, exit codes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from splicer import errors
from splicer.cli.main import COMMANDS, make_parser
from splicer.doctor.check import State
from splicer.doctor.checks import list_checks
from splicer.policy import config, labels, rules
from splicer.policy.config import VALUE_TYPES, Settings, option_of, variable_of

TOP = Path(__file__).resolve().parents[2]
DOCS = TOP / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text()
POLICY = (DOCS / "policy.md").read_text()
OPERATIONS = (DOCS / "operations.md").read_text()


def _rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the table that has `heading` as its first line, without that line."""
    lines = document.splitlines()
    start = lines.index(heading) + 2
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def _names(rows: list[list[str]]) -> set[str]:
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def _settings() -> dict[str, list[str]]:
    rows = _rows(CONFIGURATION, "| option | variable | TOML key | default | meaning |")
    return {row[2].strip("`"): row for row in rows}


def test_every_setting_is_listed() -> None:
    listed = _settings()
    assert listed.pop("[[policy]]")[:2] == ["", ""]
    assert listed.keys() == VALUE_TYPES.keys()
    for name, (option, variable, *_) in listed.items():
        assert option.strip("`").split()[0] == option_of(name)
        assert variable == f"`{variable_of(name)}`"
        # Says so itself when it does not know the option, or whether it takes a value.
        assert make_parser().parse_args(["run", *option.strip("`").split()]).command == "run"


def test_defaults_are_those_of_the_code() -> None:
    for name, row in _settings().items():
        if name == "[[policy]]":
            continue
        value = getattr(Settings(), name)
        shown = "none" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
        assert row[3] == (shown.lower() if isinstance(value, bool) else shown), name


def test_ranges_are_those_of_the_code() -> None:
    for name, row in _settings().items():
        accepted = "" if name == "[[policy]]" else VALUE_TYPES[name].accepted
        if found := re.search(r"from (\d+) to (\d+)", accepted):
            assert f"{found[1]} to {found[2]}" in row[4], name


def test_what_a_reload_applies_is_said() -> None:
    live = [f"`{name}`" for name in config.RELOADABLE if name != "policies"]
    assert f"- {', '.join(live)} and the `[[policy]]` tables apply at once" in CONFIGURATION


def test_every_exit_code_is_listed() -> None:
    codes = {int(row[0]) for row in _rows(CONFIGURATION, "| code | meaning |")}
    assert codes == {
        errors.OK,
        errors.FAILURE,
        errors.USAGE,
        errors.NOT_RUNNING,
        errors.UNSUPPORTED,
        errors.INTERRUPTED,
    }


def test_every_label_is_listed() -> None:
    rows = _rows(POLICY, "| label | values | meaning |")
    assert _names(rows) == {labels.ENABLE, labels.MODE, labels.PORTS}
    values = {row[0].strip("`"): row[1] for row in rows}
    assert values[labels.MODE] == ", ".join(f"`{mode}`" for mode in rules.CONTAINER_MODES)
    assert f"at most {labels.MOST_PORTS} ports" in values[labels.PORTS]


def test_every_key_of_a_table_is_listed() -> None:
    rows = _rows(POLICY, "| key | about |")
    assert _names(rows) == set(rules.VALUE_TYPES)
    about = {row[0].strip("`"): row[1] for row in rows}
    assert f"at most {rules.PORTS_PER_RULE}." in about["ports"]


def test_the_example_is_valid(tmp_path: Path) -> None:
    for document in (CONFIGURATION, POLICY):
        for number, text in enumerate(re.findall(r"^```toml\n(.*?)^```$", document, re.M | re.S)):
            file = tmp_path / f"{number}.toml"
            file.write_text(text)
            assert config.load_file(str(file))


def test_every_mode_is_listed() -> None:
    assert _names(_rows(POLICY, "| mode | meaning |")) == set(rules.CONTAINER_MODES)


def test_every_command_is_listed() -> None:
    named = " ".join(_names(_rows(OPERATIONS, "| command | what it does |"))).replace(",", "").split()
    assert set(named) - {"splicer"} == set(COMMANDS)


def test_every_check_is_listed() -> None:
    document = (DOCS / "doctor.md").read_text()
    rows = _rows(document, "| check | what is looked at | without it |")
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(listed) == sorted(check.name for check in list_checks())
    source = (TOP / "splicer/doctor/live.py").read_text()
    live = _names(_rows(document, "| check | what is looked at |"))
    assert live == set(re.findall(r'"(live(?:_[a-z]+)?)"', source))


def test_the_states_and_exit_codes_of_a_check_are_listed() -> None:
    document = (DOCS / "doctor.md").read_text()
    assert _names(_rows(document, "| state | meaning |")) == {state.value for state in State}
    codes = {int(row[0]) for row in _rows(document, "| exit code | meaning |")}
    assert codes == {errors.OK, errors.FAILURE, errors.USAGE, errors.UNSUPPORTED}


def test_events_that_are_listed_are_logged() -> None:
    source = "".join(path.read_text() for path in (TOP / "splicer").rglob("*.py"))
    for event in _names(_rows(OPERATIONS, "| event | meaning |")):
        assert re.search(rf'log\.(warning|error)\(\s*"{event}"', source), event


@pytest.mark.parametrize("path", [TOP / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.name)
def test_commands_that_are_shown_are_valid(path: Path) -> None:
    """Each `splicer` in a block of commands, up to a pipe, a redirection or the next command."""
    blocks = re.findall(r"^```console\n(.*?)^```$", path.read_text(), re.M | re.S)
    for line in "\n".join(blocks).splitlines():
        for call in re.findall(r"(?:^\$.*?[\s(\"'/]|&& )splicer ((?:[^|>&)#']|'[^']*')*)", line):
            assert make_parser().parse_args(shlex.split(call)).command in COMMANDS, line
