# SPDX-License-Identifier: Apache-2.0
"""A host on which everything is fine, made up; and ways to spoil it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splicer.doctor import kernel, prerequisites
from splicer.doctor.surroundings import Surroundings
from splicer.errors import SplicerError
from splicer.host import cgroups, process
from splicer.host.cgroups import Cgroup
from splicer.kernel import bpffs, libbpf, neighbours, probes, store, trials
from splicer.kernel.probes import KernelClass
from splicer.kernel.store import Rehearsal
from splicer.kernel.trials import Finding
from splicer.model import Neighbourhood
from splicer.policy.config import Settings

ALL = (1 << 41) - 1
CLASSES = {
    "A": KernelClass(counts_redirected=False, counts_tcp=True, accounts_memory=True),
    "B": KernelClass(counts_redirected=True, counts_tcp=False, accounts_memory=True),
    "C": KernelClass(counts_redirected=True, counts_tcp=True, accounts_memory=True),
}


class FakeBtf:
    def close(self) -> None:
        pass


class World:
    """`surroundings` of a root of class C with all that is needed, until a test takes something away."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.patch = monkeypatch.setattr
        self.surroundings = Surroundings(
            Settings(run_dir=str(place / "run"), pin_dir=str(place / "pins"), docker="off"), {}, place, uid=0
        )
        (place / "proc/self").mkdir(parents=True)
        self.write_privileges()
        self.patch(cgroups, "find", lambda requested: Cgroup("/v2", requested, 1))
        self.patch(process, "sees_host_pids", lambda _: True)
        self.patch(bpffs, "find_missing", lambda _: None)
        self.patch(probes, "read_lockdown", lambda: "none")
        self.patch(prerequisites, "require_bcc", lambda: None)
        self.patch(libbpf, "read_version", lambda: "1.1")
        for module in (kernel, probes):
            self.patch(module, "Btf", FakeBtf)
        self.patch(resource, "getrlimit", lambda _: (8 << 20, resource.RLIM_INFINITY))
        self.set_class("C")
        for each in trials.PROPERTIES:
            self.answer(each.name, True)
        self.patch(probes, "find_switch_marks", lambda _: 0x4000)
        self.rehearse(Rehearsal({}))
        self.meet(Neighbourhood())

    def write_privileges(self, effective: int = ALL, uid_map: str = "0 0 4294967295\n") -> None:
        (self.place / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{effective:016x}\n")
        (self.place / "proc/self/uid_map").write_text(uid_map)

    def meet(self, found: Neighbourhood) -> None:
        self.patch(neighbours, "find", lambda *_: found)

    def set_class(self, found: str | KernelClass | OSError) -> None:
        def find_class() -> KernelClass:
            if isinstance(found, OSError):
                raise found
            return CLASSES[found] if isinstance(found, str) else found

        self.patch(probes, "find_class", find_class)

    def change_settings(self, **changes: str) -> None:
        self.surroundings.settings = replace(self.surroundings.settings, **changes)  # type: ignore[arg-type]

    def answer(self, name: str, answer: bool | None) -> None:
        """What trying a property finds."""
        wanted = next(each for each in trials.PROPERTIES if each.name == name)
        object.__setattr__(wanted, "attempt", lambda: Finding(answer, "tried"))

    def rehearse(self, outcome: Rehearsal | SplicerError) -> None:
        """What comes of loading all programs."""

        def rehearse(_: int, *, answer: bool) -> Rehearsal:
            if isinstance(outcome, SplicerError):
                raise outcome
            return outcome if answer else replace(outcome, answered="", unanswered="")

        self.patch(store, "rehearse", rehearse)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    copies = tuple(replace(each) for each in trials.PROPERTIES)
    monkeypatch.setattr(trials, "PROPERTIES", copies)
    return World(tmp_path, monkeypatch)


def raiser(error: Exception) -> Callable[..., None]:
    """A function that raises, whatever it is given."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
