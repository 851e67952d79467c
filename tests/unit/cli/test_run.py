# SPDX-License-Identifier: Apache-2.0
"""`splicer run` up to the daemon: what is checked, in which order, and what is handed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from splicer.daemon.instance import acquire, find_holder
from splicer.doctor import prerequisites
from splicer.errors import FAILURE, UNSUPPORTED, SplicerError
from splicer.host import cgroups
from splicer.host.cgroups import Cgroup
from splicer.logs import Logger
from splicer.policy.config import Settings

from ..conftest import Invoke

ALL = (1 << 41) - 1
ENOUGH = 1 << 12 | 1 << 19 | 1 << 21

Proc = Callable[..., Path]


class FakeDaemon:
    """Stands in for the daemon and remembers what it was given."""

    made: list[tuple[Settings, Cgroup]]
    reread: Callable[[], Settings]
    require_compiler: Callable[[], None]
    code = 0

    def __init__(
        self,
        settings: Settings,
        cgroup: Cgroup,
        log: Logger,
        *,
        reread: Callable[[], Settings],
        require_compiler: Callable[[], None],
    ) -> None:
        self.made.append((settings, cgroup))
        type(self).reread = staticmethod(reread)
        type(self).require_compiler = staticmethod(require_compiler)
        self.settings = settings
        log.info("daemon_made")

    def run(self) -> int:
        holder = find_holder(self.settings.run_dir)
        assert holder is not None
        assert holder.pid == os.getpid()
        return self.code


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> type[FakeDaemon]:
    """A host on which everything is fine, and a daemon that does nothing."""
    module = types.ModuleType("splicer.daemon.loop")
    FakeDaemon.made = []
    FakeDaemon.code = 0
    vars(module)["Daemon"] = FakeDaemon
    monkeypatch.setitem(sys.modules, "splicer.daemon.loop", module)
    monkeypatch.setattr(prerequisites, "require_privileges", lambda command: None)
    monkeypatch.setattr(prerequisites, "require_bcc", lambda: None)
    monkeypatch.setattr(cgroups, "find", lambda requested: Cgroup("/v2", requested, 42))
    return FakeDaemon


def test_the_daemon_gets_settings_and_cgroup(invoke: Invoke, daemon: type[FakeDaemon], run_dir: str) -> None:
    daemon.code = 7
    outcome = invoke("run", "--cgroup", "/v2", "--mode", "eager", "--run-dir", run_dir, "--debug")
    assert outcome.code == 7
    assert outcome.stdout == ""
    ((settings, cgroup),) = daemon.made
    assert settings == Settings(cgroup="/v2", mode="eager", run_dir=run_dir, debug=True)
    assert cgroup == Cgroup("/v2", "/v2", 42)
    assert [json.loads(line)["event"] for line in outcome.stderr.splitlines()] == ["daemon_made"]
    assert find_holder(run_dir) is None


def test_debug_before_the_command_reaches_the_daemon(
    invoke: Invoke, daemon: type[FakeDaemon], run_dir: str
) -> None:
    assert invoke("--debug", "run", "--cgroup", "/v2", "--run-dir", run_dir).code == 0
    assert daemon.made[0][0].debug is True


def test_the_daemon_can_read_the_settings_again(
    invoke: Invoke, daemon: type[FakeDaemon], run_dir: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("default = 'on'\nhot_reads = 3\n")
    assert invoke("run", "--run-dir", run_dir, "--config", str(file), "--hot-reads", "5").code == 0
    assert daemon.reread() == daemon.made[0][0]
    file.write_text("default = 'off'\n[[policy]]\nports = 80\nmode = 'eager'\n")
    fresh = daemon.reread()
    assert (fresh.default, fresh.hot_reads, len(fresh.policies)) == ("off", 5, 1)
    file.write_text("default = 'of'\n")
    with pytest.raises(SplicerError, match="default in"):
        daemon.reread()


@pytest.mark.usefixtures("daemon")
def test_a_substituted_cgroup_is_said(invoke: Invoke, run_dir: str) -> None:
    outcome = invoke("run", "--run-dir", run_dir)
    event = json.loads(outcome.stderr.splitlines()[0])
    assert event["event"] == "cgroup_substituted"
    assert (event["requested"], event["taken"]) == ("/sys/fs/cgroup", "/v2")


@pytest.mark.usefixtures("daemon")
def test_a_second_instance(invoke: Invoke, run_dir: str) -> None:
    with acquire(run_dir, "/sys/fs/cgroup/first"):
        outcome = invoke("run", "--run-dir", run_dir)
    assert outcome.code == FAILURE
    assert outcome.stderr.splitlines()[0] == (
        f"splicer: already running (pid {os.getpid()}, cgroup /sys/fs/cgroup/first, run directory {run_dir})"
    )


def test_print_config_needs_nothing(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[[policy]]\nports = 80\nmode = 'eager'\n")
    outcome = invoke("run", "--print-config", "--config", str(file), environ={"SPLICER_DEFAULT": "off"})
    assert outcome.code == 0
    assert 'default = "off"  # SPLICER_DEFAULT' in outcome.stdout
    assert f"[[policy]]  # {file}\nports = 80\n" in outcome.stdout


def test_the_order_of_the_checks(
    invoke: Invoke, daemon: type[FakeDaemon], run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(prerequisites, "require_privileges", lambda command: steps.append("privileges"))
    monkeypatch.setattr(prerequisites, "require_bcc", lambda: steps.append("bcc"))

    def find(requested: str) -> Cgroup:
        steps.append("cgroup")
        return Cgroup("/v2", requested, 1)

    monkeypatch.setattr(cgroups, "find", find)
    with acquire(run_dir, "/x"):
        assert invoke("run", "--mode", "x", "--run-dir", run_dir).code == 2
        assert steps == []
        assert invoke("run", "--run-dir", run_dir).code == 1
    assert steps == ["privileges", "cgroup"]
    assert daemon.made == []
    # Where nothing has to be compiled nobody asks for bcc, which costs a second.
    assert invoke("run", "--run-dir", run_dir).code == 0
    assert steps[2:] == ["privileges", "cgroup"]
    daemon.require_compiler()
    assert steps[4:] == ["bcc"]


class TestPrivileges:
    @pytest.mark.parametrize("effective", [ALL, ENOUGH])
    def test_enough(self, proc: Proc, effective: int) -> None:
        prerequisites.require_privileges("run", proc=proc(effective))

    @pytest.mark.parametrize(
        ("effective", "missing"),
        [
            (0, "CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN"),
            (1 << 21, "CAP_NET_ADMIN, CAP_SYS_PTRACE"),
            (1 << 12 | 1 << 39, "CAP_SYS_PTRACE, CAP_SYS_ADMIN"),
            (0xA80425FB, "CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN"),  # root in a Docker container
        ],
    )
    def test_missing(self, proc: Proc, effective: int, missing: str) -> None:
        with pytest.raises(SplicerError) as caught:
            prerequisites.require_privileges("run", proc=proc(effective))
        assert caught.value.message == f"not enough privileges (missing: {missing})"
        assert caught.value.exit_code == FAILURE
        assert "sudo splicer run" in str(caught.value.hint)

    def test_root_of_a_user_namespace(self, proc: Proc) -> None:
        with pytest.raises(SplicerError, match="user namespace") as caught:
            prerequisites.require_privileges("unload", proc=proc(ALL, "0 1000 1\n"))
        assert "splicer unload" in str(caught.value.hint)

    def test_a_kernel_without_user_namespaces(self, proc: Proc) -> None:
        directory = proc(ALL)
        (directory / "uid_map").unlink()
        prerequisites.require_privileges("run", proc=directory)

    def test_no_proc(self, tmp_path: Path) -> None:
        with pytest.raises(SplicerError, match="cannot read this process's privileges"):
            prerequisites.require_privileges("run", proc=tmp_path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can drop capabilities")
    def test_root_without_capabilities(self, run_dir: str) -> None:
        """For real: a child that is root by name only."""
        child = subprocess.run(
            [
                *("setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"),
                *(sys.executable, "-m", "splicer", "run", "--run-dir", run_dir),
            ],
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 1
        assert "not enough privileges (missing: CAP_NET_ADMIN)" in child.stderr
        assert os.listdir(run_dir) == []


class TestBcc:
    @pytest.fixture(autouse=True)
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Only the standard library and a directory of our own can be imported from."""
        library = [entry for entry in sys.path if "-packages" not in entry]
        monkeypatch.setattr(sys, "path", [str(tmp_path), *library])
        monkeypatch.delitem(sys.modules, "bcc", raising=False)
        return tmp_path

    def write(self, path: Path, source: str) -> None:
        (path / "bcc").mkdir()
        (path / "bcc" / "__init__.py").write_text(source)

    def refuse(self) -> SplicerError:
        with pytest.raises(SplicerError) as caught:
            prerequisites.require_bcc()
        assert caught.value.exit_code == UNSUPPORTED
        assert "bcc" not in sys.modules
        return caught.value

    def test_present(self, path: Path) -> None:
        self.write(path, "print('hello')\nclass BPF: pass\n")
        prerequisites.require_bcc()
        assert "bcc" not in sys.modules

    def test_missing(self) -> None:
        error = self.refuse()
        assert error.message == "python module bcc is missing"
        assert "python3-bpfcc" in str(error.hint)
        assert "make setup" in str(error.hint)

    def test_crystals(self, path: Path) -> None:
        self.write(path, "class Lattice: pass\n")
        error = self.refuse()
        assert "is not BPF's bcc" in error.message
        assert "crystal" in error.message
        assert str(path / "bcc" / "__init__.py") in error.message
        assert "pip uninstall bcc" in str(error.hint)

    def test_a_directory_of_that_name(self, path: Path) -> None:
        (path / "bcc").mkdir()
        assert "is not BPF's bcc (a directory)" in self.refuse().message

    def test_broken(self, path: Path) -> None:
        self.write(path, "raise OSError('libbcc.so.0: cannot open shared object file')\n")
        error = self.refuse()
        assert "cannot be imported (OSError: libbcc.so.0" in error.message
        assert "--reinstall python3-bpfcc" in str(error.hint)

    def test_crashing(self, path: Path) -> None:
        self.write(path, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
        assert "cannot be imported" in self.refuse().message
