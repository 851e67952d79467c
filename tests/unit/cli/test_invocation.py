# SPDX-License-Identifier: Apache-2.0
"""Hints that repeat a command: with its arguments, and as root can paste them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from splicer.cli import invocation
from splicer.daemon import control
from splicer.doctor import prerequisites
from splicer.errors import SplicerError

from ..conftest import Invoke


@pytest.fixture
def bin_dirs(tmp_path: Path) -> tuple[Path, Path]:
    """A directory on root's path, and one that is not, each with a splicer."""
    found = []
    for name in ("root", "venv"):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "splicer"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        found.append(tmp_path / name)
    return found[0], found[1]


def test_the_one_on_roots_path(bin_dirs: tuple[Path, Path]) -> None:
    root, _ = bin_dirs
    for called in ("splicer", str(root / "splicer")):
        assert invocation.spell(["flows"], program=called, path=str(root)) == "splicer flows"


def test_one_that_is_elsewhere_is_named_in_full(bin_dirs: tuple[Path, Path]) -> None:
    root, venv = bin_dirs
    own = str(venv / "splicer")
    for path in (str(root), "/nowhere"):  # root's is another one
        assert invocation.spell(["flows"], program=own, path=path) == f"{own} flows"


def test_a_link_on_roots_path_is_as_good(bin_dirs: tuple[Path, Path], tmp_path: Path) -> None:
    _, venv = bin_dirs
    (tmp_path / "links").mkdir()
    os.symlink(venv / "splicer", tmp_path / "links/splicer")
    spelled = invocation.spell(["flows"], program=str(venv / "splicer"), path=str(tmp_path / "links"))
    assert spelled == "splicer flows"


def test_a_source_tree() -> None:
    own = invocation.spell(["flows"], program="/src/splicer/__main__.py", path="/nowhere")
    assert own == f"{sys.executable} -m splicer flows"


def test_arguments_are_kept_and_quoted() -> None:
    argv = ["--debug", "run", "--cgroup", "/sys/fs/cgroup/a b", "--mode=eager"]
    spelled = invocation.spell(argv, program="/x", path="/nowhere")
    assert spelled.endswith("splicer --debug run --cgroup '/sys/fs/cgroup/a b' --mode=eager")


@pytest.mark.parametrize("command", [["run", "--mode", "eager"], ["unload", "--stop-timeout", "1"]])
def test_hints_for_missing_privileges(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, run_dir: str, command: list[str]
) -> None:
    def refuse(name: str) -> None:
        raise prerequisites.refuse_missing(["CAP_NET_ADMIN"], name)

    monkeypatch.setattr(prerequisites, "require_privileges", refuse)
    monkeypatch.setattr(sys, "argv", ["/opt/splicer/__main__.py"])
    outcome = invoke(*command, "--run-dir", run_dir)
    assert outcome.code == 1
    whole = f"{' '.join(command)} --run-dir {run_dir}"
    assert f"sudo {sys.executable} -m splicer {whole}; in a container" in outcome.stderr


def test_hints_of_the_control_socket(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, run_dir: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SplicerError(
            "no permission to use the control socket", hint="run it as root: sudo splicer flows"
        )

    monkeypatch.setattr(control, "request_rows", refuse)
    outcome = invoke("flows", "--port", "80", "--run-dir", run_dir)
    assert outcome.stderr.rstrip().endswith(f"splicer flows --port 80 --run-dir {run_dir}")
    assert "hint: run it as root: sudo " in outcome.stderr


def test_other_hints_are_left_alone() -> None:
    hint = "start it with: sudo splicer running; or sudo splicer doctor"
    assert invocation.repeat_as_root(hint, "run", ["run"]) == hint
