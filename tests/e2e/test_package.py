# SPDX-License-Identifier: Apache-2.0
"""The Debian package on a machine of its own, under a real systemd: installed, used, upgraded, removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import REPOSITORY, wait_until
from support.machine import Machine, machine
from support.tiers import thorough
from support.trees import clone_commit, copy_tracked, list_commits_before

pytestmark = thorough("a system is installed and booted for it; what is installed has its tests elsewhere")

# Before this commit, and older than any package of this tree.
OLDER = "0.0.1"
TRIED = 3  # commits


def _build(tree: Path, directory: Path, *version: str) -> Path:
    command = [str(tree / "scripts/deb.sh"), str(directory), *version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(REPOSITORY, tmp_path_factory.mktemp("package"))


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The package of the previous commit, or of one before it should that one not build. In a clone that has
    none it is this commit's own, by another version."""
    commits = list_commits_before(TRIED)
    problem = ""
    for commit in commits:
        tree = clone_commit(commit, tmp_path / commit)
        try:
            return _build(tree, tmp_path, OLDER)
        except AssertionError as error:
            problem = str(error)
    assert not commits, f"none of the last {TRIED} commits builds: {problem}"
    return _build(REPOSITORY, tmp_path, OLDER)


@pytest.fixture
def installed(older: Path) -> Iterator[Machine]:
    """The older package, installed on the smallest Debian 13, which has started since."""
    with machine("trixie") as made:
        made.install(made.bring(older))
        made.boot()
        yield made


def _is_spliced(made: Machine) -> bool:
    flows: list[dict[str, Any]] = json.loads(made.call("splicer", "flows", "--json"))["flows"]
    return [flow["state"] for flow in flows if ":7700" in flow["remote"]] == ["spliced"]


def _version(made: Machine) -> str:
    return made.call("dpkg-query", "-W", "-f", "${Version}", "splicer")


def _property(made: Machine, name: str) -> str:
    return made.call("systemctl", "show", "--property", name, "--value", "splicer").strip()


def test_wheel_and_source_archive(tmp_path: Path) -> None:
    """Both are built, the wheel from what is in the archive, and the command in it works."""
    tree = copy_tracked(tmp_path / "tree")
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = ((tmp_path / "dist").glob(f"*.{kind}") for kind in ("whl", "tar.gz"))
    programs = {path.name for path in (REPOSITORY / "bpf").glob("*.[ch]")}
    with tarfile.open(source) as archive:
        sources = archive.getnames()
    for names in (zipfile.ZipFile(wheel).namelist(), sources):
        assert programs <= {Path(name).name for name in names}
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    command = [sys.executable, "-P", "-m", "splicer", "version"]
    said = subprocess.run(
        command, env={"PYTHONPATH": str(unpacked)}, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("splicer ")


def test_lintian_finds_no_error(package: Path) -> None:
    assert shutil.which("lintian"), "lintian is missing: make setup-e2e installs it"
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _purge(made: Machine) -> None:
    """Nothing is left of it."""
    programs = made.programs()
    assert programs
    made.remove("splicer")
    assert not made.programs() & programs
    assert made.pins() == {}
    left = ("usr/bin/splicer", "usr/lib/python3/dist-packages/splicer", "var/cache/splicer")
    found = [path for name in left for path in (made.root / name, *(made.root / name).rglob("*"))]
    assert [str(path.relative_to(made.root)) for path in found if path.exists()] == []
    assert made.attempt("systemctl", "cat", "splicer").returncode != 0


def test_life_of_a_package(installed: Machine, package: Path) -> None:
    """Installed, it runs with the hardening of its unit. A connection is spliced, and not a byte of it is
    lost by an upgrade from the previous commit or a SIGKILL, after which it is spliced again. Removed, it
    leaves nothing, and can be installed again."""
    made = installed
    assert _property(made, "ActiveState") == "active", made.attempt("journalctl", "-u", "splicer").stdout
    assert _version(made) == OLDER
    with made.talking():
        wait_until("it is spliced", lambda: _is_spliced(made), timeout=30)

        before = _property(made, "MainPID")
        made.install(made.bring(package))
        assert _property(made, "MainPID") not in (before, "0")
        assert f"splicer_{_version(made)}_all.deb" == package.name
        wait_until("it is spliced again", lambda: _is_spliced(made), timeout=30)
        assert _property(made, "MemoryDenyWriteExecute") == "yes"
        made.call("splicer", "status", "--brief")
        for page in ("splicer", "splicer.toml"):
            assert "EXIT" in made.call("man", page)

        before = _property(made, "MainPID")
        made.call("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "splicer")
        wait_until(
            "systemd has restarted it",
            lambda: (
                _property(made, "MainPID") not in (before, "0") and _property(made, "ActiveState") == "active"
            ),
            timeout=30,
        )
        assert _is_spliced(made)

        _purge(made)
        made.install(made.bring(package))
        wait_until("it is spliced from a first installation", lambda: _is_spliced(made), timeout=30)
        _purge(made)
    if not list_commits_before(1):
        pytest.skip("all of it was right, but this clone has one commit: the upgrade was from itself")
