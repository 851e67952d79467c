# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from splicer.cli import main as cli
from splicer.cli.completion import SHELLS, describe

from ..conftest import Invoke


def complete(script: str, words: list[str], cwd: Path) -> set[str]:
    """What bash offers for the last of `words`."""
    driver = f"""
{script}
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
compopt() {{ :; }}  # works only while the line editor is completing
_splicer
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    child = subprocess.run(
        ["bash", "--norc", "-c", driver, "bash", *words], cwd=cwd, capture_output=True, text=True, check=True
    )
    assert child.stderr == ""
    return set(child.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["splicer", "fl"], {"flows"}),
        (["splicer", ""], set(cli.COMMANDS) | {"--help", "-h", "--version", "--color", "--debug"}),
        (["splicer", "--color", "a"], {"auto", "always"}),
        (["splicer", "--color", "always", "st"], {"status"}),
        (["splicer", "run", "--mo"], {"--mode"}),
        (["splicer", "run", "--mode", ""], {"adaptive", "eager"}),
        (["splicer", "run", "--default", ""], {"on", "off"}),
        (["splicer", "run", "--docker", "a"], {"auto"}),
        (["splicer", "run", "--fionread", ""], {"auto", "off"}),
        (["splicer", "set", "web", "e"], {"eager"}),
        (["splicer", "policy", "web"], set()),
        (["splicer", "flows", "--container", ""], set()),
        (["splicer", "status", "--b"], {"--brief"}),
        (["splicer", "run", "--blocking", "r"], {"refuse"}),
        (["splicer", "run", "--log-format", "j"], {"json"}),
        (["splicer", "run", "--max-connections", ""], set()),
        (["splicer", "run", "--cgroup", ""], {"directory"}),
        (["splicer", "bench", "ma"], {"matrix"}),
        (["splicer", "bench", "--mode", ""], {"adaptive", "eager"}),
        (["splicer", "bench", "--ht"], {"--html"}),
        (["splicer", "bench", "--html", ""], {"directory", "file.toml"}),
        # What is there for who was used to it only.
        (["splicer", "bench", "--ref"], set()),
        (["splicer", "run", "--config", ""], {"directory", "file.toml"}),
        (["splicer", "flows", "--state", ""], {"paired", "spliced", "draining"}),
        (["splicer", "completion", ""], {*SHELLS, "-h", "--help", "--color", "--debug"}),
    ],
)
def test_bash(invoke: Invoke, tmp_path: Path, words: list[str], offered: set[str]) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file.toml").touch()
    assert complete(invoke("completion", "bash").stdout, words, tmp_path) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_command_is_there(invoke: Invoke, shell: str) -> None:
    script = invoke("completion", shell).stdout
    for command in describe(cli.make_parser()):
        assert command.name in script
        for flag in command.flags:
            assert (flag.lstrip("-") if shell == "fish" else flag) in script


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_shell_can_parse_it(invoke: Invoke, tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    script = tmp_path / "script"
    script.write_text(invoke("completion", shell).stdout)
    subprocess.run([program, "-n", str(script)], check=True)
