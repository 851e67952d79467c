# SPDX-License-Identifier: Apache-2.0
"""`splicer doctor` on the real kernel: what it says is what `splicer run` does, and nothing is left of it."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bpf import watching_others
from support.daemon import call, command_line, environment, wait_until
from support.host import Host
from support.tiers import thorough
from support.trees import copy_changed

from splicer.kernel import libbpf, trials
from splicer.kernel.programs import PROGRAMS
from splicer.kernel.scratch import instruction
from splicer.kernel.trials import PROPERTIES, Finding, Property
from splicer.policy.config import Settings

TIMEOUT = 80.0  # seconds; it compiles, and with --live twice
SOL_SOCKET, SO_PRIORITY = 1, 12
_FORBIDDEN = 4  # bpf_probe_read, as an example of what has nothing to do with sockets: no argument is right


def _arguments(host: Host) -> list[str]:
    where = [f"--cgroup={host.cgroup.path}", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]
    return [*where, "--docker=off"]


def ask(host: Host, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of `splicer doctor` about the host."""
    done = call("doctor", "--json", *_arguments(host), *arguments, prefix=prefix, timeout=TIMEOUT)
    assert done.stderr == ""
    return done.code, json.loads(done.stdout)


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in found["checks"]}


def list_scratch(host: Host) -> list[Path]:
    """What --live makes, and takes away again."""
    places = (host.cgroup.path, host.pin_dir.parent, Path(tempfile.gettempdir()))
    return [path for place in places for path in place.glob("splicer-doctor-*")]


def list_kept() -> dict[Path, int]:
    """What starts have compiled and kept where they keep it by default, with the time of its last use."""
    return {path: path.stat().st_mtime_ns for path in Path(Settings().cache_dir).glob("*")}


@pytest.mark.parametrize("wanted", PROPERTIES, ids=lambda each: each.name)
def test_what_is_tried_is_there(wanted: Property) -> None:
    """This kernel has all that splicer cannot do without, as the other tests show."""
    found = wanted.find()
    assert found.answer is True or not wanted.is_needed, found


@pytest.mark.parametrize("event", [select.EPOLLIN, select.EPOLLOUT])
def test_a_poke_that_wakes_nobody(event: int) -> None:
    """An option that has nothing to do with it does not wake who waits: the trial can say no."""
    call = trials._assemble_setsockopt(SOL_SOCKET, SO_PRIORITY, 0)
    found = trials._poke("SO_PRIORITY", call, event, fill=event == select.EPOLLIN)
    assert found.answer is False
    assert "SO_PRIORITY set from an iterator raises no EPOLL" in found.evidence


def test_what_the_verifier_refuses_is_a_no() -> None:
    def attempt() -> Finding:
        return trials._poke("x", instruction(libbpf.CALL, immediate=_FORBIDDEN), select.EPOLLIN, fill=True)

    found = Property("x", "no x", attempt).find()
    assert found.answer is False
    assert found.evidence.startswith("load an iterator over TCP sockets (")


def test_run_refuses_what_doctor_fails(tmp_path: Path) -> None:
    """A poke that wakes nobody: one says it as an error, the other as a check, in the same words."""
    tree = copy_changed(
        tmp_path / "tree",
        "splicer/kernel/trials.py",
        "_SOL_SOCKET, _SO_RCVLOWAT = 1, 18",
        f"_SOL_SOCKET, _SO_RCVLOWAT = {SOL_SOCKET}, {SO_PRIORITY}",
    )
    prefix = ("env", f"PYTHONPATH={tree}")
    with Host(start=False) as host:
        done = call("run", *_arguments(host), prefix=prefix, timeout=TIMEOUT)
        code, found = ask(host, prefix=prefix)
        assert host.bpffs.pins() == []
    poke = by_name(found)["reader_poke"]
    assert done.code == code == 4
    assert done.stderr.splitlines() == [f"splicer: {poke['text']}", f"hint: {poke['mend']}"]
    assert found["verdict"] == "This host cannot run splicer: reader_poke"
    assert {each["name"] for each in found["checks"] if each["state"] == "fail"} == {"reader_poke"}


@thorough("what is made of a refusal the unit tests show, and the poke's shows that both say the same")
def test_a_program_that_is_refused(tmp_path: Path) -> None:
    """It is named, with what the verifier says, and all others are tried all the same."""
    tree = copy_changed(
        tmp_path / "tree", "bpf/types.h", "#define WATCH_PAIRS\t8\n", "#define WATCH_PAIRS\t12\n"
    )
    with Host(start=False) as host:
        code, found = ask(host, prefix=("env", f"PYTHONPATH={tree}"))
    checks = by_name(found)
    assert code == 4
    assert checks["watch"]["text"] == (
        "the kernel refused the watch program (EACCES): invalid bpf_context access off=96 size=8"
    )
    assert {checks[each.name]["state"] for each in PROGRAMS if not each.is_optional} == {"ok", "fail"}
    assert found["verdict"] == "This host cannot run splicer: watch"


def test_live_by_a_daemon_of_its_own() -> None:
    """A connection is spliced, all its bytes are redirected both ways, and then there is nothing left."""
    kept = list_kept()
    with Host(start=False) as host:
        with watching_others() as others:
            code, found = ask(host, "--live")
        assert list_scratch(host) == []
        assert list_kept() == kept
        assert host.bpffs.pins() == []
    checks = by_name(found)
    assert code == 0, found
    assert found["can_run"] is True and found["daemon"] is None
    assert checks["live_start"]["text"] == "by a daemon of its own"
    assert checks["live_bytes"]["text"] == "100000 there and 300000 back, all redirected"
    assert "times as fast" in checks["live_latency"]["text"]
    assert {each["state"] for name, each in checks.items() if name.startswith("live")} == {"ok"}
    # The kernel may still be letting go of what an earlier test had, and other tests run beside these.
    ours = [each for each in found["neighbours"] if each["where"] in ("spliced", "probe")]
    assert not [each for each in ours if ("prog", each["id"]) not in {*host.before, *others}]


def test_beside_a_daemon(host: Host) -> None:
    """It is named, and it is the one that splices. It says the same of the kernel."""
    code, found = ask(host, "--live")
    checks, status = by_name(found), host.daemon.status()
    assert code == 0, found
    assert found["daemon"] == {"pid": status["pid"], "cgroup": str(host.cgroup.path)}
    assert (found["kernel_class"], found["fionread"]) == (status["kernel_class"], status["fionread"])
    assert checks["leftovers"]["state"] == "ok"
    assert checks["live_start"]["text"] == "by a daemon that was here already"
    assert checks["live_bytes"]["state"] == "ok"
    assert list_scratch(host) == []


def test_after_a_crash() -> None:
    """The programs that a dead daemon left are named. They splice all new connections, but for those that
    something is tried on: who is in the cgroup finds the class, too, and takes over."""
    with Host("--mode", "eager") as host:
        host.daemon.kill()
        inside = ("sh", "-c", f'echo $$ > {host.cgroup.path}/cgroup.procs && exec "$@"', "sh")
        code, found = ask(host, prefix=inside)
        checks = by_name(found)
        assert code == 0, found
        assert checks["redirection"]["state"] == "ok"
        assert checks["leftovers"]["state"] == "warn"
        assert str(host.pin_dir) in checks["leftovers"]["text"]
        assert "splicer unload" in checks["leftovers"]["mend"]
        # The next daemon is in that cgroup as well, as every one is that has the root.
        host.prefix = inside
        host.start()
        assert by_name(ask(host)[1])["leftovers"]["state"] == "ok"


@thorough("a further moment of --live")
def test_ended_in_the_middle_of_live() -> None:
    """Whoever ends it finds nothing of its daemon, its cgroup and its directories."""
    with Host(start=False) as host:
        command = command_line("doctor", "--live", *_arguments(host))
        with subprocess.Popen(command, cwd="/", env=environment(), stdout=subprocess.DEVNULL) as doctor:
            attached: Callable[[], bool] = lambda: any(host.pin_dir.parent.glob("*/links/register"))  # noqa: E731
            try:
                wait_until("its daemon has attached", attached, timeout=TIMEOUT)
            finally:
                doctor.send_signal(signal.SIGTERM)
            assert doctor.wait(TIMEOUT) == 128 + signal.SIGTERM
        assert list_scratch(host) == []
        assert host.bpffs.pins() == []


def test_without_privileges() -> None:
    """Nothing is tried; what to do about it is in the first line."""
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all")
    with Host(start=False) as host:
        done = call("doctor", *_arguments(host), prefix=(*prefix, "--inh-caps=-all"), timeout=TIMEOUT)
    assert (done.code, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0] == (
        "Whether this host can run splicer only root can tell: sudo splicer doctor."
    )
