# SPDX-License-Identifier: Apache-2.0
"""Starting, stopping, crashing, taking over and refusing, mostly with traffic going on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support.daemon import (
    START_TIMEOUT,
    STOP_TIMEOUT,
    Daemon,
    Outcome,
    call,
    command_line,
    environment,
    wait_until,
)
from support.host import Host
from support.lab import Lab
from support.load import Load
from support.pauses import Stopwatch
from support.players import End, Pair
from support.tiers import spread, thorough

FAILURE, USAGE, NOT_RUNNING, UNSUPPORTED = 1, 2, 3, 4
UNPRIVILEGED = {
    "nobody": ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    "root-without-capabilities": ("setpriv", "--bounding-set=-all", "--inh-caps=-all"),
    "root-of-a-user-namespace": ("unshare", "--user", "--map-root-user"),
}


def _refusal(outcome: Outcome, code: int) -> tuple[str, str]:
    """The message and the hint of a failed command, which must be all that it says."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert len(lines) == 2, outcome.stderr
    assert lines[0].startswith("splicer: ")
    assert lines[1].startswith("hint: ")
    return lines[0], lines[1]


def _run(host: Host, *arguments: str, prefix: tuple[str, ...] = (), **changes: str) -> Outcome:
    """A `splicer run` that is expected to refuse; later options win over the host's own."""
    own = [f"--cgroup={host.cgroup.path}", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]
    return call("run", *own, *arguments, prefix=prefix, **changes)


# stopping


@pytest.mark.parametrize(
    "number", spread([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM], "one handler for both")
)
def test_stop_under_load(lab: Lab, number: int) -> None:
    """A signal under load: exit code 0 within seconds, no byte lost, nothing left while traffic goes on."""
    with Host() as host:
        load = Load(host, lab)
        time.sleep(0.5)
        assert host.daemon.totals()["redirected_messages"] > 0
        with Stopwatch() as watch:
            assert host.daemon.stop(number) == 0
        assert watch.seconds < 5.0
        host.check_clean()
        load.finish()


def test_stop_while_a_reader_does_not_read(lab: Lab) -> None:
    """Unread redirected bytes do not keep the daemon beyond its timeout, and are all there afterwards."""
    with Host("--stop-timeout", "1") as host:
        pair = host.hot_pair(lab)
        pair.client.send(50_000, chunk=500)
        assert pair.server.fionread() > 0
        with Stopwatch() as watch:
            assert host.daemon.stop() == 0
        assert watch.seconds < 4.0
        assert host.list_pins() == []
        pair.client.send(20_000, chunk=500)
        assert pair.server.recv(70_000) == 70_000
        pair.pingpong(50)
        pair.verify()


def test_second_signal_does_not_wait(lab: Lab) -> None:
    """A second signal ends the waiting for connections at once; the state left is clean all the same."""
    with Host("--stop-timeout", "30") as host:
        pair = host.hot_pair(lab)
        pair.client.send(5_000, chunk=500)
        host.daemon.send_signal(signal.SIGTERM)
        wait_until("it has heard", lambda: '"SIGTERM"' in host.daemon.log.read_text())
        time.sleep(0.5)
        assert host.daemon.alive, "it did not wait for the reader"
        host.daemon.send_signal(signal.SIGTERM)
        with Stopwatch() as watch:
            assert host.daemon.wait() == 0
        assert watch.seconds < 3.0
        assert host.list_pins() == []
        assert not (host.run_dir / "control.sock").exists()
        assert pair.server.recv(5_000) == 5_000
        pair.pingpong(10)
        pair.verify()


@pytest.mark.parametrize("delay", spread([0.05, 0.2, 0.4, 0.6], [0.2, 0.6], "further moments"))
def test_stop_while_starting(delay: float) -> None:
    """A signal at any moment of the start leaves a clean state."""
    with Host(start=False) as host:
        own = [f"--cgroup={host.cgroup.path}", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]
        process = subprocess.Popen(
            command_line("run", *own), cwd="/", env=environment(), stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_TIMEOUT + STOP_TIMEOUT)
        finally:
            process.kill()
        host.check_clean()


def test_signals_at_any_moment(lab: Lab) -> None:
    """Signals that come while it writes its log, reads its configuration or sweeps are obeyed afterwards, and
    none of them stops it where it is."""
    with Host() as host:
        for number in range(1500):
            host.daemon.send_signal(signal.SIGHUP)
            time.sleep(0.0001 * (number % 13))

        def is_obeyed() -> bool:
            # Many signals that meet a daemon to whom the machine gives no time are one.
            host.daemon.send_signal(signal.SIGHUP)
            return host.count_reloads() > 10

        wait_until("the configuration was read", is_obeyed)
        host.check_alive(lab)
        assert host.daemon.stop() == 0
        assert '"name": "SIGTERM"' in host.daemon.log.read_text()


@thorough("test_stop_under_load again and again; the soak does it too")
def test_stopped_and_started_again_under_load(lab: Lab) -> None:
    """Traffic survives several lives of the daemon, and the last one splices as the first did."""
    with Host() as host:
        load = Load(host, lab)
        for _ in range(3):
            time.sleep(0.3)
            assert host.daemon.stop() == 0
            host.start()
        load.finish()
        pair = host.hot_pair(lab)
        pair.verify()


# crashing


def test_killed_under_load_and_taken_over(lab: Lab) -> None:
    """SIGKILL loses nothing: splices go on without a daemon, and the next start takes them over."""
    with Host() as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        before = host.flow(quiet)
        time.sleep(0.3)
        host.daemon.kill()
        quiet.pingpong(100)
        assert host.count_spliced() >= 2
        host.start()
        flow = host.wait_flow(quiet, "spliced")
        assert flow["redirected_messages"] - before["redirected_messages"] == 200
        assert flow["age_seconds"] > before["age_seconds"]
        quiet.pingpong(100)
        after = host.flow(quiet)
        assert after["redirected_messages"] - flow["redirected_messages"] == 200
        load.finish()
        quiet.verify()
        assert host.daemon.totals()["redirected_messages"] >= after["redirected_messages"]
        fresh = host.hot_pair(lab)
        fresh.verify()
        host.stop_peers()
        host.stop()


def test_taken_over_pairs_can_be_drained(lab: Lab) -> None:
    """A daemon that took over drains what an earlier one has spliced, when it is told to stop."""
    with Host() as host:
        pair = host.hot_pair(lab)
        host.daemon.kill()
        host.start()
        pair.client.send(3000)
        assert pair.server.recv(3000) == 3000
        assert host.daemon.stop() == 0
        host.check_clean()
        pair.pingpong(20)
        pair.verify()


def test_new_settings_replace_what_was_left(lab: Lab) -> None:
    """A start with another capacity drains what a killed daemon left, and loads anew."""
    with Host() as host:
        pair = host.hot_pair(lab)
        host.daemon.kill()
        host.start("--max-connections", "1000")
        pair.pingpong(100)
        pair.verify()
        fresh = host.hot_pair(lab)
        fresh.verify()


def test_unload_after_a_crash_under_load(lab: Lab) -> None:
    """`splicer unload` takes out everything a dead daemon left, under load, without losing a byte; a second
    one finds nothing to do."""
    with Host() as host:
        load = Load(host, lab)
        host.daemon.kill()
        places = ("--run-dir", str(host.run_dir), "--pin-dir", str(host.pin_dir))
        done = call("unload", *places)
        assert done.code == 0, done
        assert done.stdout
        assert host.list_pins() == []
        assert not (host.run_dir / "control.sock").exists()
        load.finish()
        host.daemon.ready_file.unlink(missing_ok=True)
        host.check_clean()
        again = call("unload", *places)
        assert (again.code, again.stdout.strip()) == (0, "Nothing to unload.")


# refusing


def test_second_instance(lab: Lab) -> None:
    """A second instance refuses and names the first, which is not disturbed; `unload` refuses too."""
    with Host() as host:
        pair = host.hot_pair(lab)
        message, hint = _refusal(_run(host), FAILURE)
        assert message.startswith(f"splicer: already running (pid {host.daemon.pid}, ")
        assert str(host.cgroup.path) in message
        assert str(host.run_dir) in message
        assert str(host.daemon.pid) in hint
        places = ("--run-dir", str(host.run_dir), "--pin-dir", str(host.pin_dir))
        message, _ = _refusal(call("unload", *places), FAILURE)
        assert f"pid {host.daemon.pid}" in message
        assert host.wait_flow(pair, "spliced")
        pair.pingpong(20)
        pair.verify()


def test_second_instance_with_the_same_pins(lab: Lab) -> None:
    """A run directory of its own does not let a second instance take the pins of a living one."""
    with Host() as host:
        pair = host.hot_pair(lab)
        other = host.directory / "other"
        message, _ = _refusal(_run(host, f"--run-dir={other}"), FAILURE)
        assert str(host.pin_dir) in message or f"pid {host.daemon.pid}" in message
        _refusal(call("unload", f"--run-dir={other}", f"--pin-dir={host.pin_dir}"), FAILURE)
        assert host.wait_flow(pair, "spliced")
        pair.pingpong(20)
        pair.verify()


def test_beside_another_one(lab: Lab) -> None:
    """Two instances with everything of their own on one cgroup: connections work, both stop cleanly."""
    with Host() as host:
        other = Daemon(host.cgroup.path, host.directory / "other", host.bpffs.path / "other")
        try:
            pair = host.pair(lab)
            # Each may have put one end in first; then both go back, and one of them tries again sooner.

            def states() -> list[str]:
                pair.pingpong(40)
                return sorted(flow["state"] for daemon in (host.daemon, other) for flow in daemon.flows())

            wait_until("one has it", lambda: states() == ["paired", "spliced"], timeout=10.0)
            pair.verify()
            assert other.stop() == 0
        finally:
            other.kill()
        pair.pingpong(100)
        pair.verify()


CGROUPS = {
    "missing": "/sys/fs/cgroup/no/such/group",
    "no-cgroup": "/tmp",
    "file": "/etc/passwd",
    "beside": "/proc/self",
}


@pytest.mark.parametrize("wrong", CGROUPS)
def test_wrong_cgroup(wrong: str) -> None:
    """A path that is no cgroup v2 directory is refused in one line with a hint."""
    with Host(start=False) as host:
        message, _ = _refusal(_run(host, f"--cgroup={CGROUPS[wrong]}"), FAILURE)
        assert CGROUPS[wrong] in message


def test_cgroup_of_version_1(tmp_path: Path) -> None:
    """A cgroup v1 directory is refused as what it is."""
    mounted = tmp_path / "v1"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "cgroup", "-o", "none,name=splicer-test", "none", str(mounted)], check=False
    )
    if done.returncode:
        pytest.skip("this kernel has no cgroup v1")
    try:
        with Host(start=False) as host:
            message, _ = _refusal(_run(host, f"--cgroup={mounted}"), FAILURE)
            assert "v1" in message
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("who", UNPRIVILEGED)
@pytest.mark.parametrize("verb", ["run", "unload"])
def test_no_privileges(who: str, verb: str) -> None:
    """Without the privileges to load programs: one line, a hint, exit code 1."""
    with Host(start=False) as host:
        host.directory.chmod(0o777)
        places = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
        cgroup = (f"--cgroup={host.cgroup.path}",) if verb == "run" else ()
        message, hint = _refusal(call(verb, *cgroup, *places, prefix=UNPRIVILEGED[who]), FAILURE)
        assert "privileges" in message
        assert f"splicer {verb}" in hint


MODULES = {
    "missing": "raise ModuleNotFoundError(\"No module named 'bcc'\", name='bcc')",
    "crystals": "class Lattice: pass",
    "broken": "raise OSError('libbcc.so.0: cannot open shared object file')",
}


@pytest.mark.parametrize("module", MODULES)
def test_wrong_bcc(module: str, tmp_path: Path) -> None:
    """No bcc, PyPI's bcc (about crystal lattices) or a broken one: exit code 4 and the command that helps."""
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text(MODULES[module] + "\n")
    path = f"{tmp_path}:{environment()['PYTHONPATH']}"
    with Host(start=False) as host:
        message, hint = _refusal(_run(host, "--cache-dir=off", PYTHONPATH=path), UNSUPPORTED)
        assert "bcc" in message
        assert "python3-bpfcc" in hint


def test_kernel_without_type_information() -> None:
    """A kernel that does not tell its structures (no BTF) is not supported: exit code 4."""
    script = 'mount --bind /dev/null /sys/kernel/btf/vmlinux && exec "$@"'
    with Host(start=False) as host:
        message, _ = _refusal(
            _run(host, prefix=("unshare", "--mount", "sh", "-c", script, "sh")), UNSUPPORTED
        )
        assert "BTF" in message


def test_pin_dir_elsewhere() -> None:
    """A pin directory that is not on a bpffs is refused with the command that mounts one."""
    with Host(start=False) as host:
        message, hint = _refusal(_run(host, f"--pin-dir={host.directory}/pins"), FAILURE)
        assert str(host.directory / "pins") in message
        assert "mount -t bpf" in hint
        assert not (host.directory / "pins").exists()


@pytest.mark.parametrize(
    "wrong", ["--mode=fast", "--max-connections=3", "--blocking=maybe", "--hot-reads=0", "--nonsense"]
)
def test_usage(wrong: str) -> None:
    """Bad values and unknown options are exit code 2, and nothing is started."""
    with Host(start=False) as host:
        outcome = _run(host, wrong)
        assert outcome.code == USAGE
        assert outcome.stderr.startswith("splicer: ")
        assert "Traceback" not in outcome.stderr


def test_nobody_runs() -> None:
    """The nouns without a daemon: exit code 3 and a hint; JSON says so on stdout."""
    with Host(start=False) as host:
        place = f"--run-dir={host.run_dir}"
        for noun in ("status", "flows"):
            _, hint = _refusal(call(noun, place), NOT_RUNNING)
            assert "splicer run" in hint
        outcome = call("status", "--json", place)
        assert outcome.code == NOT_RUNNING
        assert json.loads(outcome.stdout) == {"schema": 1, "running": False, "loaded": False}


def test_nouns_after_a_crash() -> None:
    """A socket that a killed daemon left behind is no daemon: exit code 3."""
    with Host() as host:
        host.daemon.kill()
        _refusal(call("flows", f"--run-dir={host.run_dir}"), NOT_RUNNING)
        host.start()


# running


def test_run_directory_is_private() -> None:
    """The run directory and the control socket are root's alone, and gone afterwards."""
    with Host() as host:
        assert stat.S_IMODE(host.run_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((host.run_dir / "control.sock").stat().st_mode) == 0o600
        denied = call("status", f"--run-dir={host.run_dir}", prefix=UNPRIVILEGED["nobody"])
        assert denied.code in (FAILURE, NOT_RUNNING)
        assert denied.stdout == ""
        host.stop()
        assert not host.run_dir.exists()


def test_listener_and_connection_older_than_the_daemon(lab: Lab) -> None:
    """A listener older than the daemon is no obstacle, and a connection older than it is like any other."""
    with Host(start=False) as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        address = lab.address("b")
        port = server.call("listen", name="early", family=socket.AF_INET, host=address)
        pairs = []
        for name in ("older", "younger"):
            if name == "younger":
                host.start()
            ends = client.call("connect", conn=name, family=socket.AF_INET, host=address, port=port)
            server.call("accept", listener="early", conn=name)
            local, remote = (tuple(each) for each in ends)
            pairs.append(Pair(End(client, name, local, remote), End(server, name, remote, local), name))
        for pair in pairs:
            host.make_hot(pair)
        assert host.count_spliced() == 4
        for pair in pairs:
            pair.verify()


def test_daemon_keeps_no_compiler() -> None:
    """LLVM is only ever mapped into a child: the daemon itself stays small."""
    with Host() as host:
        maps = Path(f"/proc/{host.daemon.pid}/maps").read_text()
        assert "libbcc" not in maps
        assert "LLVM" not in maps
        resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{host.daemon.pid}/status").read_text())
        assert resident is not None
        assert int(resident[1]) < 60_000


def test_idle_daemon_is_idle(lab: Lab) -> None:
    """With spliced connections that say nothing the daemon takes next to no CPU time."""
    with Host() as host:
        host.hot_pair(lab)
        wait_until("it is settled", lambda: host.daemon.status()["connections"]["spliced"] == 1)
        time.sleep(0.3)
        started = _cpu_seconds(host.daemon.pid)
        time.sleep(2.0)
        assert _cpu_seconds(host.daemon.pid) - started <= 0.1


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
