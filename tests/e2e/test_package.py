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

pytestmark = thorough("a system is installed and booted for it; what is installed has its tests elsewhere")

HERE = Path(__file__).parent
TALKING = "/run/talking"


def _build(directory: Path, *version: str) -> Path:
    command = [str(REPOSITORY / "scripts/deb.sh"), str(directory), *version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("package"))


@pytest.fixture
def installed(package: Path) -> Iterator[Machine]:
    """Installed on the smallest Debian 13, which has started since."""
    with machine("trixie") as made:
        _bring(made, package)
        made.install(f"/root/{package.name}")
        made.boot()
        yield made


def _bring(made: Machine, file: Path) -> None:
    shutil.copy(file, made.root / "root" / file.name)


def _is_spliced(made: Machine) -> bool:
    flows: list[dict[str, Any]] = json.loads(made.call("splicer", "flows", "--json"))["flows"]
    return [flow["state"] for flow in flows if ":7700" in flow["remote"]] == ["spliced"]


def _property(made: Machine, name: str) -> str:
    return made.call("systemctl", "show", "--property", name, "--value", "splicer").strip()


def test_wheel_and_source_archive(tmp_path: Path) -> None:
    """Both are built, the wheel from what is in the archive, and the command in it works."""
    tree = tmp_path / "tree"
    tree.mkdir()
    files = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, check=True)
    copy = ["xargs", "-0", "cp", "--parents", "-t", str(tree)]
    subprocess.run(copy, input=files.stdout, cwd=REPOSITORY, check=True)
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


def test_life_of_a_package(installed: Machine, tmp_path: Path) -> None:
    """Installed, it runs with the hardening of its unit. A connection is spliced, and not a byte of it is
    lost by an upgrade or a SIGKILL, after which it is spliced again. Removed, it leaves nothing."""
    made = installed
    assert _property(made, "ActiveState") == "active", made.attempt("journalctl", "-u", "splicer").stdout
    assert _property(made, "MemoryDenyWriteExecute") == "yes"
    made.call("splicer", "status", "--brief")
    for page in ("splicer", "splicer.toml"):
        assert "EXIT" in made.call("man", page)

    _bring(made, HERE / "talker.py")
    talk = made.start("python3", "-I", "/root/talker.py", TALKING)
    try:
        wait_until("it is spliced", lambda: _is_spliced(made), timeout=30)

        newer = _build(tmp_path, "9.0.0")
        _bring(made, newer)
        before = _property(made, "MainPID")
        made.install(f"/root/{newer.name}")
        assert _property(made, "MainPID") not in (before, "0")
        assert made.call("dpkg-query", "-W", "-f", "${Version}", "splicer") == "9.0.0"
        wait_until("it is spliced again", lambda: _is_spliced(made), timeout=30)

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

        programs = _programs(made)
        assert programs
        made.remove("splicer")
        assert talk.poll() is None
    finally:
        (Path(f"/proc/{made.pid}/root") / TALKING.lstrip("/")).unlink(missing_ok=True)
        said, _ = talk.communicate(timeout=30)
    assert talk.returncode == 0, said
    assert int(said.split()[0]) > 0
    assert not _programs(made) & programs
    assert "splicer" not in made.call("ls", "/sys/fs/bpf").split()
    left = ("usr/bin/splicer", "usr/lib/python3/dist-packages/splicer", "var/cache/splicer")
    assert [path for path in left if (made.root / path).exists()] == []
    assert made.attempt("systemctl", "cat", "splicer").returncode != 0


def _programs(made: Machine) -> set[int]:
    """Ids of what is attached to the machine's cgroups at splicer's hooks; systemd has others."""
    command = ["bpftool", "--json", "cgroup", "tree", str(made.cgroup)]
    tree = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    programs = [program for each in tree for program in each["programs"]]
    return {each["id"] for each in programs if "sock" in each["attach_type"]}
