# SPDX-License-Identifier: Apache-2.0
"""`splicer bundle` without a daemon, and where it cannot be written."""

from __future__ import annotations

import gzip
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support import schemas

from splicer.cli import bundle
from splicer.doctor import evidence

from ..conftest import Invoke


@pytest.fixture(autouse=True)
def _no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and are tested elsewhere."""
    monkeypatch.setattr(
        bundle, "_examine", lambda settings, context: {"checks": [{"text": "/home/anna is odd"}]}
    )


def read(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        return {
            Path(each.name).name: json.loads(archive.extractfile(each).read())  # type: ignore[union-attr]
            for each in archive
        }


@pytest.fixture
def call(invoke: Invoke, run_dir: str, tmp_path: Path) -> Any:
    return lambda *arguments: invoke(
        "bundle", *arguments, "--run-dir", run_dir, "--pin-dir", str(tmp_path / "no")
    )


def test_without_a_daemon(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    done = call(str(path))
    assert done.code == 0, done
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read(path)
    assert set(found) >= {"manifest.json", "version.json", "kernel.json", "doctor.json"}
    manifest = found.pop("manifest.json")
    schemas.check("bundle", manifest)
    missing = {each["name"]: each["missing"] for each in manifest["files"] if each["missing"]}
    assert missing["status.json"].startswith("not running")
    assert missing["loaded.json"] == "nothing is loaded"
    assert {each["name"] for each in manifest["files"]} == set(bundle.PRIVATE) == set(found) | set(missing)
    assert "missing: not running" in done.stdout
    assert os.listdir(tmp_path) == ["x.tar.gz"]


def test_mode_whatever_the_umask(call: Any, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert call(str(tmp_path / "x")).code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_nothing_is_overwritten_unless_it_is_asked_for(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    done = call(str(path))
    assert done.code == 1
    assert "--force" in done.stderr
    assert path.read_text() == "mine"
    assert call(str(path), "--force").code == 0
    assert "manifest.json" in read(path)


def test_somebody_makes_one_meanwhile(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    monkeypatch.setattr(bundle, "_examine", lambda *_: path.write_text("mine") and {})
    assert call(str(path)).code == 1
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_is_replaced_and_not_followed(call: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    path = tmp_path / "x"
    path.symlink_to(other)
    assert call(str(path)).code == 1
    assert call(str(path), "--force").code == 0
    assert other.read_text() == "mine"
    assert not path.is_symlink()


@pytest.mark.parametrize("place", ["nowhere/x", "."])
def test_where_nothing_can_be_written(call: Any, tmp_path: Path, place: str) -> None:
    done = call(str(tmp_path / place), "--force")
    assert done.code == 1
    assert done.stderr.startswith("splicer: cannot write")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_nothing(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "describe", lambda *_: 1 / 0)
    assert call(str(tmp_path / "x")).code == 1
    assert list(tmp_path.iterdir()) == []


def test_anonymous(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    done = call(str(path), "--anonymous", "--json")
    assert done.code == 0
    assert done.json()["anonymous"] is True
    assert all(each["private"] == [] for each in done.json()["files"])
    assert b"anna" not in gzip.decompress(path.read_bytes())
    assert str(tmp_path) not in done.stdout


def test_which_service(tmp_path: Path) -> None:
    for pid, line, unit in (
        (1, "0::/system.slice/splicer.service", "splicer.service"),
        (2, "0::/system.slice/docker-abc.scope", ""),
        (3, "0::/user.slice/user-0.slice/user@0.service/app.slice/x.scope", ""),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(line + "\n")
        assert evidence.find_unit(pid, str(tmp_path)) == unit
    assert evidence.find_unit(4, str(tmp_path)) == ""


def test_the_log_as_json() -> None:
    lines = ['{"event": "ready"}', "Traceback", "3", '{"event": "stopped"}']
    assert evidence.parse_log(lines) == ([{"event": "ready"}, {"event": "stopped"}], 2)


def test_options_of_the_kernel(tmp_path: Path) -> None:
    assert evidence.read_config(str(tmp_path)) == {}
    (tmp_path / "proc").mkdir()
    text = b'CONFIG_BPF=y\nCONFIG_HZ=250\nCONFIG_LSM="a,b"\n# CONFIG_TLS is not set\n'
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(text))
    found = evidence.read_config(str(tmp_path))
    assert (found["BPF"], found["HZ"], found["LSM"], found["TLS"]) == ("y", "250", "a,b", "n")
