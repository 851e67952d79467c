# SPDX-License-Identifier: Apache-2.0
"""What is made of a trial: yes, no or don't know, and whether `splicer run` refuses the kernel by it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splicer.errors import UNSUPPORTED, SplicerError
from splicer.host import namespaces
from splicer.kernel import trials
from splicer.kernel.libbpf import ENOTSUPP, KernelError
from splicer.kernel.scratch import RefusedError
from splicer.kernel.trials import PROPERTIES, Finding, Property

LOG = """\
0: (85) call bpf_setsockopt#49
program of this type cannot use helper bpf_setsockopt#49
processed 1 insns"""


def found(answer: bool | None, evidence: str = "it was tried") -> Callable[[], Finding]:
    return lambda: Finding(answer, evidence)


def raised(error: Exception) -> Callable[[], Finding]:
    def attempt() -> Finding:
        raise error

    return attempt


WANTED = Property("x", "this kernel has no x", found(True))


@pytest.mark.parametrize(
    ("error", "answer", "evidence"),
    [
        (RefusedError(errno.EINVAL, "a tc program", LOG), False, "cannot use helper bpf_setsockopt#49"),
        (RefusedError(errno.EPERM, "a tc program", ""), False, "load a tc program: Operation not permitted"),
        (RefusedError(errno.ENOMEM, "a tc program", ""), None, "Cannot allocate memory"),
        (KernelError(errno.EINVAL, "create map x"), False, "create map x: Invalid argument"),
        (KernelError(ENOTSUPP, "run a program"), False, "run a program"),
        (KernelError(errno.ENOMEM, "create map x"), None, "Cannot allocate memory"),
        (KernelError(errno.EPERM, "create map x"), None, "Operation not permitted"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), None, "Connection timed out"),
        (TimeoutError("timed out"), None, "timed out"),
        (SplicerError("who knows"), None, "who knows"),
    ],
)
def test_what_a_failure_says_of_the_kernel(error: Exception, answer: bool | None, evidence: str) -> None:
    """A refusal is the kernel's word. That there is no memory, or no loopback device, says nothing of it."""
    seen = replace(WANTED, attempt=raised(error)).find()
    assert seen.answer is answer
    assert evidence in seen.evidence


def test_what_a_trial_takes_may_be_a_reason_to_refuse() -> None:
    refusal = SplicerError("the kernel has no BTF type information", exit_code=UNSUPPORTED)
    with pytest.raises(SplicerError) as caught:
        trials.require(replace(WANTED, attempt=raised(refusal)))
    assert caught.value is refusal


def test_what_is_needed_and_missing_is_refused() -> None:
    with pytest.raises(SplicerError) as caught:
        trials.require(replace(WANTED, attempt=found(False, "errno 5"), hint="another one"))
    assert caught.value.message == "this kernel has no x: errno 5"
    assert (caught.value.hint, caught.value.exit_code) == ("another one", UNSUPPORTED)


def test_nothing_is_said_twice() -> None:
    with pytest.raises(SplicerError) as caught:
        trials.require(replace(WANTED, attempt=found(False, WANTED.lacks)))
    assert caught.value.message == WANTED.lacks


def test_what_is_not_needed_is_not() -> None:
    wanted = replace(WANTED, attempt=found(False, "errno 5"), is_needed=False, otherwise="it is slow")
    assert trials.require(wanted) == Finding(False, "it is slow (errno 5)")


@pytest.mark.parametrize("answer", [True, None])
def test_yes_and_dont_know_are_no_refusal(answer: bool | None) -> None:
    assert trials.require(replace(WANTED, attempt=found(answer))).answer is answer


def test_each_property_says_what_its_absence_means() -> None:
    assert len({each.name for each in PROPERTIES}) == len(PROPERTIES)
    for each in PROPERTIES:
        assert each.is_needed != bool(each.otherwise), each.name
        assert each.hint and each.lacks, each.name


@pytest.mark.parametrize(("text", "answer"), [("1\n", False), ("0\n", True), (None, True)])
def test_a_kernel_for_real_time(tmp_path: Path, text: str | None, answer: bool) -> None:
    file = tmp_path / "realtime"
    if text is not None:
        file.write_text(text)
    seen = trials.try_preemption(str(file))
    assert seen.answer is answer
    assert str(file) in seen.evidence


def test_a_kernel_without_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = SplicerError("this kernel has no network namespace cookies (SO_NETNS_COOKIE)")
    monkeypatch.setattr(namespaces, "read_own_cookie", raised(refusal))
    assert trials.try_namespace_cookie() == Finding(False, refusal.message)
