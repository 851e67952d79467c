# SPDX-License-Identifier: Apache-2.0
"""Each check of `splicer doctor` is made to fail, by taking away what it looks at."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from splicer.containers import engine
from splicer.daemon import instance
from splicer.daemon.instance import Holder, acquire
from splicer.doctor import check, checks, kernel, prerequisites
from splicer.doctor.check import State
from splicer.errors import FAILURE, OK, UNSUPPORTED, SplicerError
from splicer.host import cgroups, process
from splicer.host.cgroups import Cgroup
from splicer.kernel import bpffs, generation, libbpf, probes, scratch, trials
from splicer.kernel.libbpf import KernelError
from splicer.kernel.probes import KernelClass
from splicer.kernel.programs import PROGRAMS, TAP
from splicer.kernel.store import Rehearsal
from splicer.model import Neighbour, Neighbourhood

from .conftest import ALL, World, raiser

REFUSAL = "the kernel refused the {} program (EACCES): unbounded memory access"
Spoil = Callable[[World], None]


@dataclass(frozen=True)
class Case:
    """What is spoilt, the check that shows it, and what it says then."""

    name: str
    spoil: Spoil
    state: State
    text: str
    mend: str = ""


def without(bit: int) -> Spoil:
    return lambda world: world.write_privileges(ALL & ~(1 << bit))


def refuse(name: str) -> Spoil:
    return lambda world: world.rehearse(Rehearsal({name: (REFUSAL.format(name), "run it with --debug")}))


def find_cgroup(identity: int) -> Spoil:
    return lambda world: world.patch(cgroups, "find", lambda requested: Cgroup("/v2", requested, identity))


def limit_memory(world: World) -> None:
    world.patch(resource, "getrlimit", lambda _: (65536, 65536))
    world.patch(resource, "setrlimit", lambda *_: None)
    world.patch(scratch, "create_map", raiser(KernelError(errno.EPERM, "create map probe")))


def leave_pins(world: World) -> None:
    pins = Path(world.surroundings.settings.pin_dir)
    (pins / "programs").mkdir(parents=True)
    (pins / "programs/verdict").touch()


def leave_ends(world: World) -> None:
    place = Path(world.surroundings.settings.pin_dir, "left-1")
    place.mkdir(parents=True)
    (place / "spliced").touch()


def refuse_engine(kind: engine.Kind) -> Spoil:
    def spoil(world: World) -> None:
        world.change_settings(docker="unix:///run/x.sock")
        world.patch(engine, "Engine", raiser(engine.EngineError(kind, "it says no", hint="ask it nicely")))

    return spoil


def unanswered(kernel_class: str, why: str) -> Spoil:
    def spoil(world: World) -> None:
        world.set_class(kernel_class)
        world.rehearse(Rehearsal({}, unanswered=why))

    return spoil


def switched_off(kernel_class: str) -> Spoil:
    def spoil(world: World) -> None:
        world.set_class(kernel_class)
        world.change_settings(fionread="off")

    return spoil


def answered_wrong(world: World) -> None:
    world.set_class("A")
    world.rehearse(Rehearsal({}, answered="B"))


def lose_class(world: World) -> None:
    world.set_class(KernelError(errno.EINVAL, "create map probe"))


def lose_bcc(world: World) -> None:
    world.patch(
        prerequisites, "require_bcc", raiser(SplicerError("python module bcc is missing", hint="apt-get x"))
    )


def lose_bcc_on_class_b(world: World) -> None:
    world.set_class("B")
    lose_bcc(world)


IN_MAP = Neighbour("sk_msg", "cil_redir", 7, "map", "socks", 5)
ON_CGROUP = Neighbour("sock_ops", "metrics", 8, "cgroup", "/v2", 1)

CASES = [
    Case("cap_net_admin", without(12), State.FAIL, "missing: CAP_NET_ADMIN", "sudo splicer run"),
    Case("cap_sys_ptrace", without(19), State.FAIL, "missing: CAP_SYS_PTRACE", "--cap-add SYS_PTRACE"),
    Case("cap_sys_admin", without(21), State.FAIL, "missing: CAP_SYS_ADMIN", "--privileged"),
    Case("cap_net_broadcast", without(11), State.WARN, "a second later", "--cap-add NET_BROADCAST"),
    Case("cap_net_raw", without(13), State.WARN, "conntrack and IPVS may forget", "--cap-add NET_RAW"),
    Case(
        "user_namespace",
        lambda world: world.write_privileges(uid_map="0 1000 1\n"),
        State.FAIL,
        "root of a user namespace is not root of the host",
        "--userns=host",
    ),
    Case(
        "cgroup",
        lambda world: world.patch(cgroups, "find", raiser(SplicerError("no such cgroup (/x)", hint="find"))),
        State.FAIL,
        "no such cgroup (/x)",
        "find",
    ),
    Case("cgroup_root", find_cgroup(42), State.WARN, "this container's", cgroups.HINT_HOST_ROOT),
    Case(
        "pids",
        lambda world: world.patch(process, "sees_host_pids", lambda _: False),
        State.WARN,
        "this container's processes only",
        process.HINT_HOST_PIDS,
    ),
    Case(
        "bpffs",
        lambda world: world.patch(bpffs, "find_missing", raiser(SplicerError("not on one", hint="mount"))),
        State.FAIL,
        "not on one",
        "mount",
    ),
    Case(
        "lockdown",
        lambda world: world.patch(probes, "read_lockdown", lambda: "integrity"),
        State.WARN,
        "integrity: splicer may not answer FIONREAD",
        "Secure Boot off",
    ),
    Case(
        "lockdown",
        lambda world: world.patch(probes, "read_lockdown", lambda: "confidentiality"),
        State.WARN,
        "nor read the kernel's memory",
        "Secure Boot off",
    ),
    Case(
        "libbpf",
        lambda world: world.patch(
            libbpf, "read_version", raiser(SplicerError("libbpf is not installed", hint="apt-get"))
        ),
        State.FAIL,
        "libbpf is not installed",
        "apt-get",
    ),
    Case("bcc", lose_bcc, State.FAIL, "python module bcc is missing", "apt-get x"),
    Case(
        "btf",
        lambda world: world.patch(kernel, "Btf", raiser(SplicerError("the kernel has no BTF", hint="use"))),
        State.FAIL,
        "the kernel has no BTF",
        "use",
    ),
    Case("memlock", limit_memory, State.WARN, "the limit is 64 KiB", "ulimit -l unlimited"),
    Case(
        "redirection",
        lambda world: world.set_class(KernelError(errno.EINVAL, "create map probe")),
        State.FAIL,
        "this kernel cannot redirect between sockets (create map probe: Invalid argument)",
        "CONFIG_NET_SOCK_MSG",
    ),
    Case(
        "redirection",
        lambda world: world.set_class(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
        State.UNKNOWN,
        "could not be found out: Connection refused",
    ),
    Case(
        "redirection",
        lambda world: world.set_class(KernelClass(True, True, accounts_memory=False)),
        State.FAIL,
        "does not charge redirected bytes to the receiver",
        "use a newer kernel",
    ),
    *(
        Case(
            each.name,
            lambda world, name=each.name: world.answer(name, False),  # type: ignore[misc]
            State.FAIL if each.is_needed else State.WARN,
            f"{each.lacks}: tried" if each.is_needed else f"{each.otherwise} (tried)",
            each.hint,
        )
        for each in trials.PROPERTIES
    ),
    *(
        Case(
            each.name,
            lambda world, name=each.name: world.answer(name, None),  # type: ignore[misc]
            State.UNKNOWN,
            "tried",
        )
        for each in trials.PROPERTIES
    ),
    Case(
        "sleepers",
        lambda world: world.patch(
            probes, "find_switch_marks", raiser(KernelError(errno.ENODATA, "tell who slept"))
        ),
        State.WARN,
        "blocking readers stay plain TCP",
    ),
    Case(
        "compiler",
        lambda world: world.rehearse(SplicerError("the BPF programs do not compile: x")),
        State.FAIL,
        "the BPF programs do not compile: x",
    ),
    Case("compiler", lose_bcc, State.UNKNOWN, "it takes bcc"),
    *(
        Case(
            each.name,
            refuse(each.name),
            State.WARN if each.is_optional else State.FAIL,
            REFUSAL.format(each.name),
            "run it with --debug",
        )
        for each in (*PROGRAMS, TAP)
    ),
    Case("verdict", lose_bcc, State.UNKNOWN, "not tried"),
    Case("fionread", switched_off("A"), State.FAIL, "nginx and others would hang", "have splicer answer it"),
    Case("fionread", switched_off("B"), State.WARN, "class B, not answered: the settings say", "--fionread"),
    Case("fionread", unanswered("B", "EPERM"), State.WARN, "class B, not answered: EPERM", "fexit"),
    Case("fionread", unanswered("A", "EPERM"), State.FAIL, "splicer does not answer it: EPERM", "fexit"),
    Case("fionread", answered_wrong, State.FAIL, "it is still of class B when splicer answers", "fexit"),
    Case("fionread", lose_bcc_on_class_b, State.UNKNOWN, "it takes bcc"),
    Case("fionread", lose_class, State.UNKNOWN, "see redirection"),
    Case("kernel_log", lose_class, State.UNKNOWN, "see fionread"),
    Case("kernel_log", lose_bcc_on_class_b, State.UNKNOWN, "see fionread"),
    Case("leftovers", leave_pins, State.WARN, "programs of a daemon that is gone", "splicer unload"),
    Case("leftovers", leave_ends, State.WARN, "that are still open", "splicer unload"),
    Case("neighbours", lambda world: world.meet(Neighbourhood((IN_MAP,))), State.WARN, "keeps these plain"),
    Case(
        "neighbours",
        lambda world: world.meet(Neighbourhood((), ("BPF maps: Operation not permitted",))),
        State.UNKNOWN,
        "BPF maps: Operation not permitted",
    ),
    Case("docker", refuse_engine("refused"), State.WARN, "it says no", "ask it nicely"),
    Case("docker", refuse_engine("lost"), State.WARN, "it says no", "ask it nicely"),
]
# These say what is there, and nothing about it is wrong.
NEVER_WRONG = {"daemon", "kernel_log"}


def look(world: World) -> dict[str, check.Result]:
    return {each.name: each for each in check.examine(checks.list_checks(), world.surroundings)}


def judge(world: World, results: dict[str, check.Result]) -> check.Verdict:
    return check.judge(results.values(), world.surroundings)


def test_all_is_well(world: World) -> None:
    results = look(world)
    assert {each.outcome.state for each in results.values()} == {State.OK}
    verdict = judge(world, results)
    assert (verdict.words, verdict.exit_code) == ("This host can run splicer: FIONREAD class C", OK)
    assert (verdict.can_run, verdict.kernel_class, verdict.fionread) == (True, "C", "kernel")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.state}")
def test_what_is_spoilt_is_shown(world: World, case: Case) -> None:
    """In that check, with a way to mend it, and in the verdict, if it is something that is needed."""
    case.spoil(world)
    results = look(world)
    seen = results[case.name]
    assert seen.outcome.state is case.state, seen.outcome
    assert case.text in seen.outcome.text
    assert case.mend in seen.outcome.mend
    verdict = judge(world, results)
    assert len(verdict.words) < 80
    states = {each.outcome.state for each in results.values() if each.is_needed}
    if State.FAIL in states:
        assert (verdict.can_run, verdict.exit_code) == (False, UNSUPPORTED)
    elif State.UNKNOWN in states:
        assert (verdict.can_run, verdict.exit_code) == (None, FAILURE)
    else:
        assert (verdict.can_run, verdict.exit_code) == (True, OK)
    assert (case.state is State.FAIL) <= (verdict.can_run is False)


def test_each_check_is_made_to_fail() -> None:
    names = [each.name for each in checks.list_checks()]
    assert len(set(names)) == len(names)
    assert {case.name for case in CASES if case.state in (State.FAIL, State.WARN)} == set(names) - NEVER_WRONG


def test_a_warning_each_is_counted(world: World) -> None:
    world.answer("jit", False)
    leave_pins(world)
    verdict = judge(world, look(world))
    assert verdict.words == "This host can run splicer: FIONREAD class C (2 warnings)"


@pytest.mark.parametrize("name", "AB")
def test_fionread_answered(world: World, name: str) -> None:
    world.set_class(name)
    world.rehearse(Rehearsal({}, answered="C"))
    results = look(world)
    assert results["fionread"].outcome.text == f"class {name}, answered by splicer"
    assert "bpf_probe_write_user" in results["kernel_log"].outcome.text
    verdict = judge(world, results)
    assert verdict.words == f"This host can run splicer: FIONREAD class {name}, answered"
    assert verdict.fionread == "splicer"


def test_fionread_not_answered(world: World) -> None:
    unanswered("B", "EPERM")(world)
    verdict = judge(world, look(world))
    assert verdict.words == "This host can run splicer: FIONREAD class B, not answered (1 warning)"
    assert verdict.fionread == "nobody"


def test_the_programs_are_loaded_once(world: World) -> None:
    """It takes seconds, whether it works or not."""
    count = []

    def rehearse(_: int, *, answer: bool) -> Rehearsal:
        count.append(answer)
        raise SplicerError("the BPF programs do not compile: x")

    world.patch(kernel.trials, "PROPERTIES", ())
    world.patch(check, "AS_ROOT", "x")
    from splicer.kernel import store

    world.patch(store, "rehearse", rehearse)
    look(world)
    assert count == [False]


def test_neighbours_are_named(world: World) -> None:
    world.meet(Neighbourhood((ON_CGROUP,)))
    seen = look(world)["neighbours"].outcome
    assert (seen.state, seen.more) == (State.OK, ("sock_ops: metrics, id 8, cgroup /v2",))
    assert world.surroundings.list_neighbours() == (ON_CGROUP,)


class TestWithoutPrivileges:
    @pytest.fixture(autouse=True)
    def nobody(self, world: World) -> None:
        world.write_privileges(0)
        world.surroundings.uid = 1000

    def test_the_verdict_names_the_way(self, world: World) -> None:
        results = look(world)
        verdict = judge(world, results)
        assert (verdict.can_run, verdict.exit_code) == (None, FAILURE)
        assert verdict.words == ("Whether this host can run splicer only root can tell: sudo splicer doctor")
        assert verdict.kernel_class == verdict.fionread == ""
        assert results["cap_sys_admin"].outcome == check.unknown("not held by this user", check.AS_ROOT)

    def test_nothing_is_tried(self, world: World) -> None:
        world.patch(probes, "find_class", raiser(AssertionError("tried")))
        for each in trials.PROPERTIES:
            if each.privileged:
                object.__setattr__(each, "attempt", raiser(AssertionError("tried")))
        world.rehearse(SplicerError("tried"))
        results = look(world)
        unknown = [each for each in results.values() if each.outcome.text.startswith("not tried")]
        assert len(unknown) > 15
        assert {each.outcome.mend for each in unknown} == {check.AS_ROOT}
        assert results["netns_cookie"].outcome.state is State.OK

    @pytest.mark.skipif(os.geteuid() != 0, reason="makes a directory of root's")
    def test_pins_that_may_not_be_looked_at(self, world: World) -> None:
        world.patch(os, "listdir", raiser(PermissionError(errno.EACCES, "Permission denied")))
        assert look(world)["leftovers"].outcome.state is State.UNKNOWN

    def test_an_engine_that_may_not_be_asked(self, world: World) -> None:
        refuse_engine("refused")(world)
        assert look(world)["docker"].outcome == check.unknown("it says no", check.AS_ROOT)


class TestDaemon:
    def test_one_that_runs_is_named(self, world: World) -> None:
        holder = Holder(4711, "/v2", "/run/splicer", "run")
        world.patch(instance, "find_holder", lambda _: holder)
        assert look(world)["daemon"].outcome == check.ok(
            "running: pid 4711, cgroup /v2, run directory /run/splicer"
        )

    def test_its_lock_is_looked_at(self, world: World) -> None:
        with acquire(world.surroundings.settings.run_dir, "/v2"):
            assert f"pid {os.getpid()}" in look(world)["daemon"].outcome.text

    def test_its_pins_are_no_leftovers(self, world: World) -> None:
        leave_pins(world)
        lock = generation._lock(world.surroundings.settings.pin_dir)
        try:
            assert look(world)["leftovers"].outcome.state is State.OK
        finally:
            os.close(lock)
        assert look(world)["leftovers"].outcome.state is State.WARN


def test_no_engine_is_no_harm(world: World) -> None:
    world.change_settings(docker="auto")
    world.patch(engine, "SOCKETS", ("unix:///nowhere/a.sock", "unix:///nowhere/b.sock"))
    assert look(world)["docker"].outcome.state is State.OK
