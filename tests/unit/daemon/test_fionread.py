# SPDX-License-Identifier: Apache-2.0
"""Who answers FIONREAD, by the class of the kernel, the settings, and what the programs answer when tried."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from splicer.daemon.loop import Daemon
from splicer.errors import UNSUPPORTED, SplicerError
from splicer.host.cgroups import Cgroup
from splicer.kernel import generation, probes
from splicer.kernel.libbpf import KernelError
from splicer.kernel.probes import KernelClass
from splicer.logs import Logger
from splicer.policy.config import Settings

CLASSES = {
    "A": KernelClass(counts_redirected=False, counts_tcp=True, accounts_memory=True),
    "B": KernelClass(counts_redirected=True, counts_tcp=False, accounts_memory=True),
    "C": KernelClass(counts_redirected=True, counts_tcp=True, accounts_memory=True),
}
REFUSAL = "the kernel refused the answer4 program (EPERM): Operation not permitted"


class FakeGeneration:
    """Programs that answer, or a note why not."""

    def __init__(self, *, is_answering: bool, taken_over: bool = False, unanswered: str = "") -> None:
        self.is_answering = is_answering
        self.taken_over = taken_over
        self.unanswered = unanswered
        self.maps = {"ends": object()}
        self.done: list[str] = []

    def stop_answering(self, why: str) -> None:
        self.unanswered = why
        self.done.append("stop_answering")

    def drain(self, timeout: float) -> int:
        self.done.append(f"drain {timeout:g}")
        return 0

    def remove(self) -> list[str]:
        self.done.append("remove")
        return []


class FakeLog:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **keys: self.events.append((level, event, keys))


def find_who_answers(
    monkeypatch: pytest.MonkeyPatch,
    loaded: FakeGeneration,
    kernel: str,
    tried: str | Exception = "",
) -> tuple[str | SplicerError, FakeLog]:
    """What comes of it where trying with the programs attached finds the class `tried`, and the log."""

    def find(ends: object = None) -> KernelClass:
        assert ends is loaded.maps["ends"]
        if isinstance(tried, Exception):
            raise tried
        return CLASSES[tried]

    monkeypatch.setattr(probes, "find_class", find)
    log = FakeLog()
    logger: Logger = log  # type: ignore[assignment]
    daemon = Daemon(Settings(), Cgroup("/v2", "/v2", 42), logger)
    daemon._generation = loaded  # type: ignore[assignment]
    plan = generation.LoadPlan("/pins", 64, 2.5)
    try:
        return daemon._find_who_answers(CLASSES[kernel], plan), log
    except SplicerError as error:
        return error, log
    finally:
        daemon._mailbox.close()


@pytest.mark.parametrize("kernel", "AB")
def test_answered(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    loaded = FakeGeneration(is_answering=True)
    found, log = find_who_answers(monkeypatch, loaded, kernel, "C")
    assert found == "splicer"
    assert loaded.done == []
    ((level, event, keys),) = log.events
    assert (level, event, keys["kernel_class"]) == ("info", "fionread_answered", kernel)
    assert "warning" in keys["note"]


def test_class_c_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = FakeGeneration(is_answering=False)
    found, log = find_who_answers(monkeypatch, loaded, "C")
    assert (found, loaded.done, log.events) == ("kernel", [], [])


@pytest.mark.parametrize("why", [REFUSAL, ""])
def test_class_b_goes_without(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    loaded = FakeGeneration(is_answering=False, unanswered=why)
    found, log = find_who_answers(monkeypatch, loaded, "B")
    assert (found, loaded.done) == ("nobody", [])
    ((level, event, keys),) = log.events
    assert (level, event) == ("info", "fionread_not_answered")
    assert keys["why"] == (why or "the settings say fionread = off")


@pytest.mark.parametrize("tried", ["A", "B", KernelError(errno.EPERM, "update of ends")])
@pytest.mark.parametrize("kernel", "AB")
def test_wrong_answers_are_not_given(
    monkeypatch: pytest.MonkeyPatch, kernel: str, tried: str | Exception
) -> None:
    """Programs that load and attach prove nothing. What they answer does."""
    loaded = FakeGeneration(is_answering=True)
    found, _ = find_who_answers(monkeypatch, loaded, kernel, tried)
    assert loaded.done[0] == "stop_answering"
    if kernel == "B":
        assert found == "nobody"
    else:
        assert isinstance(found, SplicerError)
        assert loaded.done[1:] == ["remove"]


@pytest.mark.parametrize(("taken_over", "done"), [(False, ["remove"]), (True, ["drain 2.5", "remove"])])
def test_class_a_is_refused(monkeypatch: pytest.MonkeyPatch, taken_over: bool, done: list[str]) -> None:
    """What a dead daemon left spliced is drained before: its readers are as badly off."""
    loaded = FakeGeneration(is_answering=False, taken_over=taken_over, unanswered=REFUSAL)
    error, _ = find_who_answers(monkeypatch, loaded, "A")
    assert isinstance(error, SplicerError)
    assert error.exit_code == UNSUPPORTED
    assert error.message.endswith(REFUSAL)
    assert loaded.done == done
