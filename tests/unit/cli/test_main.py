# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help, usage errors, colours, exit codes, --debug."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import splicer
from splicer import __version__
from splicer.cli import main as cli
from splicer.cli import version
from splicer.errors import SplicerError
from splicer.model import REASONS
from splicer.policy.config import VALUE_TYPES, option_of

from ..conftest import Invoke, Terminal

ROOT = Path(splicer.__file__).resolve().parents[1]


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help(invoke: Invoke, command: str | None) -> None:
    outcome = invoke(*([command] if command else []), "--help")
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert "examples:" in outcome.stdout
    too_wide = [line for line in outcome.stdout.splitlines() if len(line) > 80]
    assert not too_wide


def test_help_names_every_command(invoke: Invoke) -> None:
    text = invoke("--help").stdout
    for name, summary in cli.COMMANDS.items():
        assert name in text
        assert summary.split()[0] in text


@pytest.mark.parametrize(
    "arguments", [["run", "--print-config"], ["version"], ["--debug", "version"], ["--help"]]
)
def test_other_commands_are_not_loaded(arguments: list[str]) -> None:
    source = (
        "import sys\n"
        "from splicer.cli.main import COMMANDS, main\n"
        f"code = main({arguments!r}, environ={{}})\n"
        "print(*(name for name in COMMANDS if f'splicer.cli.{name}' in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert child.stderr.split() == [word for word in arguments if word in cli.COMMANDS]


def test_flows_help_explains_every_reason(invoke: Invoke) -> None:
    text = " ".join(invoke("flows", "--help").stdout.split())
    for name, explanation in REASONS.items():
        assert f" {name} {explanation}" in text


def test_run_help_names_every_option_of_the_contract(invoke: Invoke) -> None:
    text = invoke("run", "--help").stdout
    settings = [option_of(name) for name in VALUE_TYPES]
    for option in [*settings, "--config", "--print-config", "--color"]:
        assert f" {option} " in text or f"[{option}]" in text


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"splicer {__version__}\n"
    assert invoke("version").stdout.startswith(f"splicer {__version__} (Python ")
    document = invoke("version", "--json").json()
    assert document["schema"] == 1
    assert document["version"] == __version__


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ([], "which command?", "splicer --help"),
        (["bogus"], "invalid choice: 'bogus'", "splicer --help"),
        (["run", "--bogus"], "unrecognized arguments: --bogus", "splicer --help"),
        (["run", "--mode"], "--mode: expected one argument", "splicer run --help"),
        (["run", "--mod", "off"], "unrecognized arguments", "splicer --help"),
        (["run", "--mode", "fast"], 'bad value for --mode: "fast"', "adaptive or eager"),
        (["run", "--mode", "off"], 'bad value for --mode: "off"', "--default off"),
        (["run", "--default", "maybe"], 'bad value for --default: "maybe"', "on or off"),
        (["run", "--docker", "/x"], 'bad value for --docker: "/x"', "unix:///"),
        (["status", "--brief", "--json"], "not allowed with argument", "splicer status --help"),
        (["set"], "required: MODE", "splicer set --help"),
        (["set", "web"], "unknown mode (web)", "adaptive, eager, off; such as: splicer set web off"),
        (["set", "web", "on"], "unknown mode (on)", "adaptive, eager, off"),
        (["set", "off"], "which container?", "splicer set web off"),
        (["set", "off", "--port", "80", "--process", "x"], "and not --process and --port", "--address"),
        (["set", "--port", "80", "on"], "unknown mode (on)", "adaptive, eager, off"),
        (["set", "--port", "http", "off"], 'bad value for port: "http"', "8000-8010"),
        (["set", "--address", "10.0.0.1/8", "off"], 'bad value for address: "10.0.0.1/8"', "10.0.0.0/8"),
        (["set", "--cgroup", "..", "off"], 'bad value for cgroup: ".."', "system.slice"),
        (["unset"], "which container?", "splicer unset web"),
        (["unset", "web", "--port", "80"], "one subject at a time", "--cgroup"),
        (["flows", "--limit", "many"], 'bad value for --limit: "many"', "whole number"),
        (["flows", "--sort", "size"], "--sort: invalid choice", "splicer flows --help"),
        (["status", "--timeout", "0"], 'bad value for --timeout: "0"', "seconds"),
        (["flows", "--state", "x"], "--state: invalid choice", "splicer flows --help"),
        (["flows", "--port", "0"], "bad value for --port: 0", "1 to 65535"),
        (["flows", "--port", "http"], "bad value for --port: http", "1 to 65535"),
        (["completion"], "required: shell", "splicer completion --help"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'", "splicer completion --help"),
        (["--color", "blue", "version"], "--color: invalid choice", "splicer --help"),
        (["unload", "--stop-timeout", "soon"], "bad value for --stop-timeout", "seconds"),
    ],
)
def test_usage_errors(invoke: Invoke, arguments: list[str], message: str, hint: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    first, second = outcome.stderr.splitlines()
    assert first.startswith("splicer: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second


def test_what_a_terminal_could_choke_on_is_disarmed(invoke: Invoke) -> None:
    outcome = invoke("status", "--run-dir", "/x/\x1b[2J")
    assert outcome.code == 2
    assert "\x1b" not in outcome.stderr


def test_errors_are_painted_on_a_terminal_only() -> None:
    painted, plain = Terminal(), Terminal()
    assert cli.main(["bogus"], environ={}, stdout=io.StringIO(), stderr=painted) == 2
    assert painted.getvalue().startswith("\x1b[31msplicer:\x1b[0m ")
    assert cli.main(["bogus"], environ={"NO_COLOR": "1"}, stdout=io.StringIO(), stderr=plain) == 2
    assert plain.getvalue().startswith("splicer: ")


@pytest.mark.parametrize("order", [["--color", "always", "status"], ["status", "--color", "always"]])
def test_common_options_stand_in_both_places(invoke: Invoke, order: list[str], run_dir: str) -> None:
    outcome = invoke(*order, "--run-dir", run_dir, environ={"NO_COLOR": "1"})
    assert outcome.code == 3
    assert "\x1b[31msplicer:\x1b[0m not running" in outcome.stderr


class TestFailures:
    def fail(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def execute(arguments: object, context: object) -> int:
            raise error

        monkeypatch.setattr(version, "execute", execute)

    def test_an_expected_one_is_two_lines(self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail(monkeypatch, SplicerError("no luck (x)", hint="try y", exit_code=4))
        outcome = invoke("version")
        assert outcome.code == 4
        assert outcome.stderr == "splicer: no luck (x)\nhint: try y\n"

    @pytest.mark.parametrize("how", ["before", "after", "environment"])
    def test_debug_adds_the_traceback(
        self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        self.fail(monkeypatch, SplicerError("no luck"))
        if how == "environment":
            outcome = invoke("version", environ={"SPLICER_DEBUG": "1"})
        else:
            outcome = invoke(*(["--debug", "version"] if how == "before" else ["version", "--debug"]))
        assert "Traceback" in outcome.stderr
        assert outcome.stderr.endswith("splicer: no luck\n")

    @pytest.mark.parametrize("code", [2, 3, 4])
    def test_debug_adds_none_to_what_was_expected(
        self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """What the command line or this host lacks is no bug: a traceback above it would say so."""
        self.fail(monkeypatch, SplicerError("no luck (x)", hint="try y", exit_code=code))
        outcome = invoke("--debug", "version")
        assert (outcome.code, outcome.stderr) == (code, "splicer: no luck (x)\nhint: try y\n")

    def test_an_unexpected_one(self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail(monkeypatch, ValueError("boom"))
        outcome = invoke("version")
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[0] == "splicer: internal error (ValueError: boom)"
        assert "--debug" in outcome.stderr.splitlines()[1]
        assert "Traceback" in invoke("version", "--debug").stderr

    @pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0)])
    def test_nothing_is_said_to_who_has_seen_enough(
        self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
    ) -> None:
        self.fail(monkeypatch, error)
        outcome = invoke("version")
        assert (outcome.code, outcome.stderr) == (code, "")


def test_as_a_module() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "splicer", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert child.returncode == 2
    assert child.stderr.startswith("splicer: ")


def test_a_closed_pipe_leaves_no_noise() -> None:
    child = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m splicer completion bash | true; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout == "0\n"
    assert child.stderr == ""


@pytest.mark.parametrize("command", [["status"], ["flows"], ["pause"], ["run", "--print-config"]])
def test_unknown_variables_are_said(invoke: Invoke, run_dir: str, command: list[str]) -> None:
    outcome = invoke(*command, "--run-dir", run_dir, environ={"SPLICER_MOED": "x", "SPLICER_PORT": "tcp://1"})
    said = "splicer: unknown variable SPLICER_MOED is ignored; did you mean SPLICER_MODE?"
    assert outcome.stderr.splitlines()[0] == said
    assert "SPLICER_PORT" not in outcome.stderr
