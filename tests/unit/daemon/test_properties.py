# SPDX-License-Identifier: Apache-2.0
"""What the daemon does about what the kernel lacks: it ends before anything is loaded, or says so."""

from __future__ import annotations

import pytest

from splicer.daemon.loop import Daemon
from splicer.errors import UNSUPPORTED, SplicerError
from splicer.host.cgroups import Cgroup
from splicer.kernel import generation, probes, trials
from splicer.kernel.probes import KernelClass
from splicer.kernel.trials import Finding, Property
from splicer.policy.config import Settings

from ..conftest import Log

NO, DONT_KNOW = Finding(False, "tried"), Finding(None, "no memory")


def make(*found: tuple[Finding, bool]) -> tuple[Property, ...]:
    return tuple(
        Property(f"p{number}", "no such thing", lambda finding=finding: finding, needed)  # type: ignore[misc]
        for number, (finding, needed) in enumerate(found)
    )


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch, log: Log) -> Daemon:
    monkeypatch.setattr(probes, "find_class", lambda: KernelClass(True, True, True))
    monkeypatch.setattr(generation, "take_over_or_load", lambda *_: pytest.fail("it went on"))
    return Daemon(Settings(), Cgroup("/v2", "/v2", 42), log)  # type: ignore[arg-type]


def test_what_is_needed_ends_it(monkeypatch: pytest.MonkeyPatch, daemon: Daemon) -> None:
    monkeypatch.setattr(trials, "PROPERTIES", make((NO, True)))
    with pytest.raises(SplicerError, match="no such thing: tried") as caught:
        daemon.run()
    assert caught.value.exit_code == UNSUPPORTED


def test_what_is_not_is_logged(monkeypatch: pytest.MonkeyPatch, daemon: Daemon, log: Log) -> None:
    monkeypatch.setattr(trials, "PROPERTIES", make((NO, False), (DONT_KNOW, True)))
    daemon._require_properties()
    assert log.events == [
        ("info", "property_missing", {"property": "p0", "evidence": "tried"}),
        ("warning", "property_not_known", {"property": "p1", "evidence": "no memory"}),
    ]
