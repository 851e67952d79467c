# SPDX-License-Identifier: Apache-2.0
"""What the checks look at, found out once for all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from splicer.daemon import instance
from splicer.daemon.instance import Holder
from splicer.doctor import prerequisites
from splicer.errors import SplicerError
from splicer.host import cgroups
from splicer.host.cgroups import Cgroup
from splicer.kernel import answer, neighbours, probes, store
from splicer.kernel.probes import KernelClass
from splicer.kernel.store import Rehearsal
from splicer.model import Neighbour, Neighbourhood
from splicer.policy.config import Settings


@dataclass
class Surroundings:
    """The settings that a daemon would have, the environment, and where /proc and /sys are.

    What is found out on demand is kept. If it raises it is tried again, and raises again.
    """

    settings: Settings
    environ: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path("/")
    uid: int = field(default_factory=os.geteuid)
    _why_not_rehearsed: SplicerError | None = None

    @cached_property
    def capabilities(self) -> int:
        """Effective ones, a bit for each. Raises SplicerError."""
        return prerequisites.read_effective_capabilities(self.root / "proc/self/status")

    @cached_property
    def missing_capabilities(self) -> list[str]:
        """Of those that are needed. Raises SplicerError."""
        return prerequisites.find_missing(self.capabilities, prerequisites.CAPABILITIES)

    @cached_property
    def why_not_tried(self) -> str:
        """Why nothing can be tried on the kernel; empty if it can."""
        try:
            missing = self.missing_capabilities
        except SplicerError as error:
            return error.message
        if missing:
            return "not enough privileges"
        if prerequisites.in_user_namespace(self.root / "proc/self/uid_map"):
            return "this is a user namespace"
        return ""

    @cached_property
    def cgroup(self) -> Cgroup:
        """That of the settings. Raises SplicerError."""
        return cgroups.find(self.settings.cgroup)

    @cached_property
    def kernel(self) -> KernelClass:
        """As it is by itself. Raises SplicerError where splicer could not keep its promises, whoever answers
        FIONREAD."""
        return probes.require_class(may_answer=True)

    @cached_property
    def why_no_bcc(self) -> SplicerError | None:
        """What is wrong with bcc; None if nothing is."""
        try:
            prerequisites.require_bcc()
        except SplicerError as error:
            return error
        return None

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """All programs, loaded as by `splicer run`. Raises SplicerError."""
        if self._why_not_rehearsed is not None:
            raise self._why_not_rehearsed
        try:
            if self.why_no_bcc is not None:
                raise self.why_no_bcc
            return store.rehearse(self.settings.max_connections, answer=self._wants_answer())
        except SplicerError as error:
            self._why_not_rehearsed = error  # it takes seconds, and would end in the same way
            raise

    def _wants_answer(self) -> bool:
        try:
            return self.settings.fionread == "auto" and self.kernel.name != "C"
        except (SplicerError, OSError):
            return False

    @cached_property
    def daemon(self) -> Holder | None:
        """Who holds the lock of the run directory."""
        return instance.find_holder(self.settings.run_dir)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        """Who else uses BPF at the same hooks. Raises SplicerError where there is no cgroup."""
        return neighbours.find(self.cgroup, self.settings.pin_dir)

    def list_neighbours(self) -> tuple[Neighbour, ...]:
        """Those that were found; none where they may not be looked for."""
        try:
            return () if self.why_not_tried else self.neighbourhood.neighbours
        except (SplicerError, OSError):
            return ()

    def find_why_unanswered(self) -> str:
        """Why splicer would not answer FIONREAD here; empty if it would. Not for class C. Raises
        SplicerError."""
        if self.settings.fionread != "auto":
            return probes.SWITCHED_OFF
        return self.rehearsal.unanswered or answer.judge(self.rehearsal.answered)

    def find_class(self) -> str:
        """The kernel's class; empty where it is not known."""
        if self.why_not_tried:
            return ""
        try:
            return self.kernel.name
        except (SplicerError, OSError):
            return ""

    def find_who_answers(self) -> str:
        """Who sees to FIONREAD's answer: see class Status. Empty where it is not known."""
        if not (name := self.find_class()):
            return ""
        try:
            return "kernel" if name == "C" else "nobody" if self.find_why_unanswered() else "splicer"
        except (SplicerError, OSError):
            return ""
