# SPDX-License-Identifier: Apache-2.0
"""`splicer doctor` as people and programs read it; what it finds is made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from splicer.cli import doctor
from splicer.doctor import check, checks, live
from splicer.doctor.check import Check, Outcome, Result, State, Verdict
from splicer.doctor.surroundings import Surroundings
from splicer.errors import FAILURE, OK, UNSUPPORTED, USAGE, SplicerError
from splicer.model import Neighbour
from splicer.text import Palette

from ..conftest import Invoke

LONG = "the kernel refused the watch program (EACCES): " + "invalid bpf_context access " * 4
HINT = "run again with --debug for the verifier's log, which says rather more than fits into this line"
NEIGHBOUR = Neighbour("sock_ops", "metrics", 8, "cgroup", "/v2", 1)
GOOD = Check("good", lambda _: check.ok("it is there, and it is called " + "x" * 60))
BAD = Check("bad", lambda _: check.fail(LONG, HINT))
POOR = Check("poor", lambda _: check.warn("it is slow", "sysctl -w x=1"), is_needed=False)
DARK = Check("dark", lambda _: check.unknown("who knows"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried here."""
    monkeypatch.setattr(Surroundings, "find_class", lambda _: "B")
    monkeypatch.setattr(Surroundings, "find_who_answers", lambda _: "nobody")
    monkeypatch.setattr(Surroundings, "why_not_tried", "")
    monkeypatch.setattr(Surroundings, "daemon", None)
    monkeypatch.setattr(Surroundings, "list_neighbours", lambda _: (NEIGHBOUR,))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    yield lambda *chosen: monkeypatch.setattr(checks, "list_checks", lambda: chosen)


@pytest.mark.parametrize(
    ("chosen", "code", "first"),
    [
        ((GOOD,), OK, "This host can run splicer: FIONREAD class B, not answered."),
        ((GOOD, POOR), OK, "This host can run splicer: FIONREAD class B, not answered (1 warning)."),
        ((GOOD, BAD, DARK), UNSUPPORTED, "This host cannot run splicer: bad."),
        ((DARK, POOR), FAILURE, "Whether this host can run splicer is not known: dark."),
    ],
)
def test_the_first_line_and_the_exit_code(
    invoke: Invoke, use: object, chosen: Iterable[Check], code: int, first: str
) -> None:
    use(*chosen)  # type: ignore[operator]
    outcome = invoke("doctor")
    assert outcome.code == code
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines()[:2] == [first, ""]
    given = invoke("doctor", "--json")
    assert given.code == code
    assert given.json()["verdict"] + "." == first


def test_a_line_each_in_80_columns(invoke: Invoke, use: object) -> None:
    """What is well is cut to its line. What is not is said in full, and how to mend it."""
    use(GOOD, BAD, POOR)  # type: ignore[operator]
    lines = invoke("doctor").stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert [line.split()[:2] for line in lines[2:] if not line.startswith(" ")] == [
        ["ok", "good"],
        ["fail", "bad"],
        ["warn", "poor"],
    ]
    said = " ".join(" ".join(lines).split())
    assert LONG.strip() in said
    assert f"mend: {HINT}" in said
    assert "mend: sysctl -w x=1" in said


def test_json(invoke: Invoke, use: object) -> None:
    use(GOOD, BAD)  # type: ignore[operator]
    given = invoke("doctor", "--json").json()
    assert given["schema"] == 1
    assert (given["can_run"], given["kernel_class"], given["fionread"]) == (False, "B", "nobody")
    assert given["daemon"] is None
    assert given["neighbours"] == [NEIGHBOUR.to_json()]
    assert given["checks"][1] == {
        "name": "bad",
        "needed": True,
        "state": "fail",
        "text": LONG,
        "mend": HINT,
        "more": [],
    }


def test_what_is_found_one_by_one_has_an_end(invoke: Invoke, use: object) -> None:
    found = Outcome(State.OK, "others", "", tuple(f"number {number}" for number in range(13)))
    use(Check("neighbours", lambda _: found))  # type: ignore[operator]
    lines = invoke("doctor").stdout.splitlines()
    assert [line.strip() for line in lines[-2:]] == ["number 9", "and 3 more: splicer doctor --json"]
    assert len(invoke("doctor", "--json").json()["checks"][0]["more"]) == 13


def test_what_steers_a_terminal_does_not_get_through(invoke: Invoke, use: object) -> None:
    use(Check("x", lambda _: check.warn("a\x1b[31mb", "c\x07d")))  # type: ignore[operator]
    assert "\x1b" not in invoke("doctor").stdout.replace("\n", "")


def test_colour() -> None:
    results = [Result("x", True, Outcome(State.FAIL, "no"))]
    lines = doctor.render(results, Verdict(False, "This host cannot: x", 4), Palette(True))
    assert lines[0] == "\x1b[31mThis host cannot\x1b[0m: x."
    assert lines[2].startswith("\x1b[31mfail   \x1b[0m x")


class TestLive:
    def test_it_fails_and_the_host_could(
        self, invoke: Invoke, use: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(GOOD)  # type: ignore[operator]
        failed = [Result("live_start", True, check.ok("x")), Result("live_splice", True, check.fail("plain"))]
        monkeypatch.setattr(live, "examine", lambda *_: failed)
        outcome = invoke("doctor", "--live")
        assert outcome.code == FAILURE
        first = outcome.stdout.splitlines()[0]
        assert first == "This host should run splicer, but live_splice failed."

    def test_it_is_slow_and_that_is_no_failure(
        self, invoke: Invoke, use: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        use(GOOD)  # type: ignore[operator]
        slow = live._compare_times(10.0, 20.0)
        monkeypatch.setattr(live, "examine", lambda *_: [Result("live_latency", False, slow)])
        outcome = invoke("doctor", "--live")
        assert outcome.code == OK
        assert "plain 10.0 us, spliced 20.0 us: 0.50 times as fast" in outcome.stdout

    @pytest.mark.parametrize("chosen", [BAD, DARK])
    def test_where_it_cannot_run_it_is_not_tried(
        self, invoke: Invoke, use: object, monkeypatch: pytest.MonkeyPatch, chosen: Check
    ) -> None:
        use(chosen)  # type: ignore[operator]
        monkeypatch.setattr(live, "_Talker", lambda *_: pytest.fail("tried"))
        outcome = invoke("doctor", "--live")
        assert "not tried, for the reasons above" in outcome.stdout
        assert outcome.code == (UNSUPPORTED if chosen is BAD else FAILURE)

    def test_bytes_that_took_the_other_way(self) -> None:
        measured = {"there": 100, "back": 300, "through_tcp": 0}
        assert live._compare_bytes(measured, 400).state is State.OK
        missing = live._compare_bytes(measured, 300)
        assert (missing.state, missing.text) == (State.FAIL, "300 of 400 bytes were redirected")
        astray = live._compare_bytes(measured | {"through_tcp": 100}, 400)
        assert (astray.state, astray.text) == (State.FAIL, "100 of 400 bytes went through TCP")


def test_a_mistake_in_the_configuration(invoke: Invoke) -> None:
    outcome = invoke("doctor", "--fionread", "sometimes")
    assert outcome.code == USAGE
    assert "fionread" in outcome.stderr


def test_without_bcc_docker_and_libbpf() -> None:
    """Nothing but the standard library can be imported: there is an answer, and no traceback."""
    source = (
        "import sys\n"
        "sys.path[:] = [entry for entry in sys.path if '-packages' not in entry]\n"
        "from splicer.kernel import libbpf\n"
        "libbpf.ctypes.util.find_library = lambda _: None\n"
        "library = libbpf.ct.CDLL\n"
        "def find(name, **keys):\n"
        "    if name and 'bpf' in name: raise OSError('gone')\n"
        "    return library(name, **keys)\n"
        "libbpf.ct.CDLL = find\n"
        "from splicer.cli.main import main\n"
        "docker = ['--docker', 'tcp://127.0.0.1:9']\n"
        "sys.exit(main(['doctor', '--run-dir', '/nonexistent', *docker], environ={}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=Path(doctor.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (FAILURE, UNSUPPORTED)
    assert "python module bcc is missing" in done.stdout
    assert "libbpf is not installed" in done.stdout


def test_an_error_of_a_check_is_a_failure_in_its_words() -> None:
    def refuse(_: Surroundings) -> Outcome:
        raise SplicerError("this kernel has no x", hint="another one", exit_code=UNSUPPORTED)

    def stumble(_: Surroundings) -> Outcome:
        raise AttributeError("no bpf_map_create")

    bug = Check("x", stumble).look(Surroundings(None))  # type: ignore[arg-type]
    assert (bug.state, bug.mend) == (State.UNKNOWN, "report it")
    assert "AttributeError: no bpf_map_create" in bug.text
    needed, other = Check("x", refuse), Check("x", refuse, is_needed=False)
    assert needed.look(Surroundings(None)) == check.fail("this kernel has no x", "another one")  # type: ignore[arg-type]
    assert other.look(Surroundings(None)).state is State.WARN  # type: ignore[arg-type]
