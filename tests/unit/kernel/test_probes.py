# SPDX-License-Identifier: Apache-2.0
"""What is made of the kernel's class: its name, and which kernels `splicer run` refuses."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from splicer.doctor import prerequisites
from splicer.errors import UNSUPPORTED, SplicerError
from splicer.host import cgroups
from splicer.host.cgroups import Cgroup
from splicer.kernel import generation, probes
from splicer.kernel.libbpf import KernelError
from splicer.kernel.probes import KernelClass

from ..conftest import Invoke

CLASSES = {
    "A": KernelClass(counts_redirected=False, counts_tcp=True, accounts_memory=True),
    "B": KernelClass(counts_redirected=True, counts_tcp=False, accounts_memory=True),
    "C": KernelClass(counts_redirected=True, counts_tcp=True, accounts_memory=True),
}
# Where nobody may answer FIONREAD an unread byte may be taken for none; on the others a sender is never held
# back, whoever answers.
UNFIT = [
    (KernelClass(False, True, True), False, "class A", "--fionread auto, or use a kernel that counts them"),
    (KernelClass(False, False, True), False, "class A", "6.6.128"),
    (KernelClass(True, False, False), False, "held back", "newer kernel"),
    (KernelClass(True, False, False), True, "held back", "newer kernel"),
    (KernelClass(True, True, False), False, "held back", "newer kernel"),
    (KernelClass(False, True, False), True, "held back", "newer kernel"),
]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelClass | KernelError], None]:
    """Replace what trying it out on this kernel finds."""

    def replace(found: KernelClass | KernelError) -> None:
        def answer() -> KernelClass:
            if isinstance(found, KernelError):
                raise found
            return found

        monkeypatch.setattr(probes, "find_class", answer)

    return replace


@pytest.mark.parametrize(
    ("asleep", "awake", "marks"),
    [
        ([0b1011, 0b0011], [0b0001] * 8, 0b0010),
        ([0b0010] * 8, [0] * 6 + [0b0010] * 2, 0b0010),  # some have lost their CPU
        ([0b0010] * 8, [0] * 5 + [0b0010] * 3, 0),
        ([0b0110, 0b0100, 0b0110], [0] * 8, 0b0100),  # one that some threads have is no mark
        ([0] * 8, [0] * 8, 0),
        ([1 << 31] * 8, [0] * 8, 1 << 31),
    ],
)
def test_marks_of_who_slept(asleep: list[int], awake: list[int], marks: int) -> None:
    assert probes.choose_marks(asleep, awake) == marks


@pytest.mark.parametrize("name", CLASSES)
def test_names(name: str) -> None:
    assert CLASSES[name].name == name


def test_class_a_whatever_tcp_bytes_do() -> None:
    assert KernelClass(counts_redirected=False, counts_tcp=False, accounts_memory=True).name == "A"


@pytest.mark.parametrize(("name", "may_answer"), [("A", True), *itertools.product("BC", (True, False))])
def test_kernels_that_are_fit(find: Callable[..., None], name: str, may_answer: bool) -> None:
    """Class A is, for the time being, where FIONREAD may be answered: whether it can be turns out later."""
    find(CLASSES[name])
    assert probes.require_class(may_answer=may_answer) is CLASSES[name]


@pytest.mark.parametrize(("found", "may_answer", "told", "hint"), UNFIT)
def test_kernels_that_are_refused(
    find: Callable[..., None], found: KernelClass, may_answer: bool, told: str, hint: str
) -> None:
    find(found)
    with pytest.raises(SplicerError) as caught:
        probes.require_class(may_answer=may_answer)
    assert caught.value.exit_code == UNSUPPORTED
    assert told in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_kernel_that_cannot_redirect(find: Callable[..., None]) -> None:
    find(KernelError(errno.EINVAL, "create a map"))
    with pytest.raises(SplicerError, match="cannot redirect between sockets") as caught:
        probes.require_class(may_answer=True)
    assert caught.value.exit_code == UNSUPPORTED
    assert "CONFIG_NET_SOCK_MSG" in (caught.value.hint or "")


def test_run_ends_with_4_before_anything_is_loaded(
    invoke: Invoke, find: Callable[..., None], run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prerequisites, "require_privileges", lambda command: None)
    monkeypatch.setattr(prerequisites, "require_bcc", lambda: None)
    monkeypatch.setattr(cgroups, "find", lambda requested: Cgroup("/v2", requested, 42))
    monkeypatch.setattr(generation, "take_over_or_load", lambda *arguments: pytest.fail("it went on"))
    find(CLASSES["A"])
    outcome = invoke("run", "--cgroup", "/v2", "--run-dir", run_dir, "--fionread", "off")
    assert outcome.code == UNSUPPORTED == 4
    assert outcome.stdout == ""
    message, hint = outcome.stderr.splitlines()
    assert message.startswith("splicer: on this kernel FIONREAD does not count redirected bytes (class A)")
    assert message.endswith("splicer does not answer it: the settings say fionread = off")
    assert hint.startswith(
        "hint: have splicer answer it: --fionread auto, or use a kernel that counts them: "
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("none [integrity] confidentiality\n", "lockdown forbids that; boot without it"),
        ("[none] integrity confidentiality\n", "where fexit programs may be loaded"),
        (None, "where fexit programs may be loaded"),
    ],
)
def test_the_way_out_of_class_a(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, hint: str
) -> None:
    """Under lockdown, as Secure Boot sets it, there is another one than where the kernel cannot do it."""
    file = tmp_path / "lockdown"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(probes, "_LOCKDOWN", str(file))
    error = probes.refuse_class_a("the kernel refused the answer4 program (EPERM): Operation not permitted")
    assert error.exit_code == UNSUPPORTED
    assert error.message.endswith("answer4 program (EPERM): Operation not permitted")
    assert hint in (error.hint or "")
    assert "or use a kernel that counts them: Linux 6.6.128" in (error.hint or "")
