# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from splicer.daemon.instance import AlreadyRunningError, acquire, find_holder, prepare
from splicer.errors import FAILURE, SplicerError

HOLD = """
import sys
from splicer.daemon.instance import acquire
with acquire(sys.argv[1], "/sys/fs/cgroup/x", purpose=sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run_dir: str, purpose: str = "run") -> subprocess.Popen[str]:
    """A process that holds the lock until its stdin is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, run_dir, purpose],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_the_lock_names_its_holder(run_dir: str) -> None:
    with acquire(run_dir, "/sys/fs/cgroup/x"):
        holder = find_holder(run_dir)
        assert holder is not None
        assert (holder.pid, holder.cgroup, holder.purpose) == (os.getpid(), "/sys/fs/cgroup/x", "run")
        assert (Path(run_dir) / "lock").stat().st_mode & 0o777 == 0o600
    assert find_holder(run_dir) is None
    assert os.listdir(run_dir) == []


def test_a_second_instance_is_refused_and_names_the_first(run_dir: str) -> None:
    with hold(run_dir) as child:
        with pytest.raises(AlreadyRunningError) as caught:
            acquire(run_dir, "/other")
        error = caught.value
        assert error.message == (
            f"already running (pid {child.pid}, cgroup /sys/fs/cgroup/x, run directory {run_dir})"
        )
        assert error.exit_code == FAILURE
        assert error.hint is not None
        assert f"kill {child.pid}" in error.hint
    acquire(run_dir, "/other").release()


def test_unload_is_named_as_such(run_dir: str) -> None:
    with (
        hold(run_dir, "unload") as child,
        pytest.raises(AlreadyRunningError, match="splicer unload is at work") as caught,
    ):
        acquire(run_dir, "/other")
    assert caught.value.holder.pid == child.pid


def test_a_killed_holder_frees_the_lock(run_dir: str) -> None:
    child = hold(run_dir)
    child.kill()
    child.communicate()
    assert (Path(run_dir) / "lock").exists()
    assert find_holder(run_dir) is None
    with acquire(run_dir, "/next"):
        holder = find_holder(run_dir)
        assert holder is not None
        assert holder.pid == os.getpid()


def test_a_new_lock_replaces_a_longer_record(run_dir: str) -> None:
    (Path(run_dir) / "lock").write_text(json.dumps({"pid": 1, "cgroup": "x" * 500}))
    with acquire(run_dir, "/short"):
        holder = find_holder(run_dir)
        assert holder is not None
        assert holder.cgroup == "/short"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00"])
def test_a_holder_that_has_not_said_who_it_is(run_dir: str, content: str) -> None:
    path = Path(run_dir) / "lock"
    path.write_text(content)
    with path.open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunningError, match=r"already running \(pid unknown, run directory"):
            acquire(run_dir, "/x")


def test_whoever_only_looks_does_not_stop_a_start(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(run_dir) / "lock"
    path.touch()
    pauses: list[float] = []
    with path.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                fcntl.flock(looking, fcntl.LOCK_UN)

        monkeypatch.setattr("splicer.daemon.instance.time.sleep", sleep)
        acquire(run_dir, "/x").release()


def test_a_removed_lock_file_is_not_mistaken_for_the_lock(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(run_dir) / "lock"
    flock = fcntl.flock
    removed: list[bool] = []

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with acquire(run_dir, "/x") as lock:
        assert lock._descriptor is not None
        assert os.path.samestat(os.fstat(lock._descriptor), path.stat())


def test_the_run_directory_is_made_private_and_removed_again(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "run"
    with acquire(str(directory), "/x") as lock:
        assert directory.stat().st_mode & 0o777 == 0o700
        lock.release()
        assert not directory.exists()
    assert directory.parent.exists()


def test_a_run_directory_in_use_or_from_elsewhere_stays(tmp_path: Path, run_dir: str) -> None:
    directory = tmp_path / "run"
    with acquire(str(directory), "/x"):
        (directory / "other").touch()
    assert directory.exists()
    acquire(run_dir, "/x").release()
    assert os.path.isdir(run_dir)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_run_directory_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(SplicerError, match="others can write to the run directory") as caught:
        acquire(str(directory), "/x")
    assert caught.value.hint is not None
    assert directory.stat().st_mode & 0o7777 == mode


def test_a_run_directory_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SplicerError, match="the run directory is a file"):
        prepare(str(file))
    with pytest.raises(SplicerError, match="cannot make the run directory"):
        prepare(str(file / "x"))


def test_a_symbolic_link_in_place_of_the_lock_is_not_followed(run_dir: str, tmp_path: Path) -> None:
    (Path(run_dir) / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(SplicerError, match="cannot open the lock file"):
        acquire(run_dir, "/x")
    assert not (tmp_path / "victim").exists()
    assert find_holder(run_dir) is None
