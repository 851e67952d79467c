# SPDX-License-Identifier: Apache-2.0
"""Who may do what: pins, control socket and run directory are root's, names and labels of others cannot
steer a terminal or a log, and the daemon needs each of the capabilities it asks for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpf import list_attached
from support.daemon import Outcome, call, wait_until
from support.engine import FakeEngine
from support.host import Host

from splicer.doctor.prerequisites import CAPABILITIES

FAILURE, NOT_RUNNING = 1, 3
NOBODY_ID = 65534
NOBODY = ("setpriv", f"--reuid={NOBODY_ID}", f"--regid={NOBODY_ID}", "--clear-groups")
ESCAPES = "\x1b]0;owned\x07\x1b[31m\x9b2J\x08\x7f"
LINES = '\n{"event": "forged", "level": "info"}\r\n2026-01-01 [info] forged\u2028\u202e'
LARGE = 1 << 20
DECENT = 2000  # characters of a line


def _start(host: Host, *arguments: str, prefix: tuple[str, ...] = ()) -> Outcome:
    """A `splicer run` that is expected to refuse."""
    own = [f"--cgroup={host.cgroup.path}", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}"]
    return call("run", *own, "--docker=off", *arguments, prefix=prefix)


def _check_refusal(host: Host, outcome: Outcome, *parts: str) -> None:
    """Refused in one or two lines that name what is wrong, and nothing is left in the kernel."""
    assert outcome.code == FAILURE, outcome
    assert outcome.stdout == ""
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith("{")]
    assert 1 <= len(lines) <= 2, outcome.stderr
    assert lines[0].startswith("splicer: ")
    for part in parts:
        assert part in outcome.stderr
    assert host.bpffs.pins() == []


# pins


def test_pins_belong_to_root_alone(host: Host) -> None:
    """Directories and pins have no permissions for anybody else, and nobody else can open one."""
    host.directory.chmod(0o755)
    host.bpffs.path.chmod(0o755)
    paths = [host.pin_dir, *host.pin_dir.rglob("*")]
    assert len(paths) > 20
    for path in paths:
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (0, 0), path
        if not stat.S_ISLNK(status.st_mode):
            assert stat.S_IMODE(status.st_mode) & 0o077 == 0, f"{path}: {status.st_mode:o}"
    for command in (
        ("bpftool", "map", "dump", "pinned", str(host.pin_dir / "maps" / "pairs")),
        ("bpftool", "link", "detach", "pinned", str(host.pin_dir / "links" / "register")),
        ("ls", str(host.pin_dir)),
    ):
        done = subprocess.run([*NOBODY, *command], capture_output=True, text=True, check=False)
        assert done.returncode != 0, done.stdout
    assert "cgroup_sock_ops" in list_attached(host.cgroup.path)


# the control socket


def test_another_user_at_the_control_socket(host: Host) -> None:
    """Even where the modes were loosened, nobody but root is answered, and what they ask for is not done."""
    path, place = host.run_dir / "control.sock", f"--run-dir={host.run_dir}"
    drains = host.daemon.log.read_text().count('"draining"')
    host.directory.chmod(0o755)
    host.run_dir.chmod(0o755)
    path.chmod(0o666)
    try:
        for command in (("status",), ("flows", "--json"), ("drain",), ("set", "c1", "off")):
            outcome = call(*command, place, prefix=NOBODY)
            assert outcome.code == FAILURE, outcome
            assert outcome.stdout == ""
            assert "only root" in outcome.stderr or "privileges" in outcome.stderr, outcome.stderr
    finally:
        path.chmod(0o600)
        host.run_dir.chmod(0o700)
    log = host.daemon.log.read_text()
    assert '"control_peer_refused"' in log
    assert f'"uid": {NOBODY_ID}' in log
    assert log.count('"draining"') == drains
    assert host.daemon.status()["healthy"]


# the run directory


def _as_link(path: Path, target: Path) -> None:
    target.write_text("precious\n")
    path.symlink_to(target)


def _as_file(path: Path, target: Path) -> None:
    target.write_text("precious\n")
    path.write_text("precious\n")


def _as_dangling_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


PLANTED = {"link": _as_link, "file": _as_file, "dangling-link": _as_dangling_link}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", ["control.sock", "lock"])
def test_something_in_the_place_of_its_files(planted: str, name: str) -> None:
    """What was put where the control socket or the lock belong is neither followed nor overwritten."""
    with Host(start=False) as host:
        host.run_dir.mkdir(mode=0o700)
        target, path = host.directory / "target", host.run_dir / name
        PLANTED[planted](path, target)
        if (planted, name) == ("file", "lock"):
            # A file that a crashed daemon left looks like that: it is taken, and goes with the daemon.
            host.start()
            host.stop()
            assert not path.exists()
            return
        _check_refusal(host, _start(host), str(path))
        if planted == "dangling-link":
            assert not target.exists()
        else:
            assert target.read_text() == "precious\n"
        assert path.is_symlink() == (planted != "file")
        path.unlink()


@pytest.mark.parametrize("kind", ["owned", "writable", "linked", "sticky"])
def test_run_directory_of_somebody_else(kind: str) -> None:
    """A run directory that another user owns or can write to is refused, by name, and left alone."""
    with Host(start=False) as host:
        place = host.directory / "theirs" if kind == "linked" else host.run_dir
        place.mkdir(mode=0o700)
        if kind == "linked":
            host.run_dir.symlink_to(place)
        if kind in ("owned", "linked"):
            os.chown(place, NOBODY_ID, NOBODY_ID)
        else:
            place.chmod(0o1777 if kind == "sticky" else 0o777)
        _check_refusal(host, _start(host), "others can write to the run directory", str(host.run_dir))
        assert list(place.iterdir()) == []
        if kind == "linked":
            host.run_dir.unlink()


def test_ready_file_does_not_follow_links() -> None:
    """Somebody who can write where the ready file goes cannot have root write elsewhere."""
    with Host(start=False) as host:
        target = host.directory / "target"
        target.write_text("precious\n")
        for pid in range(os.getpid(), os.getpid() + 4000):
            (host.directory / f"run.ready.{pid}").symlink_to(target)
        host.start()
        assert target.read_text() == "precious\n"
        assert host.daemon.ready_file.read_text().strip() == str(host.daemon.pid)
        host.stop()


# names and labels


HOSTILE_LABELS: dict[str, dict[str, str]] = {
    "escapes": {"splicer.mode": ESCAPES},
    "lines": {"splicer.enable": LINES},
    "large": {"splicer.ports": "9" * LARGE},
    "large-label": {"splicer." + "x" * LARGE: "1"},
    "label": {f"splicer.{ESCAPES}": "1", f"splicer.{LINES}": "1"},
    "compose": {
        "com.docker.compose.project": ESCAPES,
        "com.docker.compose.service": LINES,
        "splicer.mode": "?",
    },
}


@pytest.fixture(scope="module", params=["json", "console"])
def hostile_host(request: pytest.FixtureRequest, _prerequisites: None) -> Iterator[Host]:
    """A host whose engine has a container for each of these."""
    with tempfile.TemporaryDirectory() as directory:
        engine = FakeEngine(f"{directory}/engine.sock")
        for number, (name, labels) in enumerate(HOSTILE_LABELS.items()):
            engine.run(number, name=name, labels=labels)
        with Host(f"--docker={engine.url}", f"--log-format={request.param}") as host:
            wait_until(
                "they are known",
                lambda: host.daemon.status()["docker"]["containers"] == len(HOSTILE_LABELS),
            )
            yield host
        engine.stop()


def _check_steers_nothing(text: str) -> None:
    """No control character but the newline, none that reorders or breaks lines, and no line that starts with
    what a container said."""
    bad = {char for char in text if not char.isprintable() and char != "\n"}
    assert not bad, f"unescaped: {sorted(bad)!r}"
    starts = ('{"event": "forged"', "2026-01-01")
    assert not any(line.lstrip().startswith(starts) for line in text.splitlines())


def test_hostile_labels_in_the_log(hostile_host: Host) -> None:
    """Whatever a container's labels hold: no raw byte of it is in the log, which stays of a decent size."""

    def read_log() -> str:
        return hostile_host.daemon.log.read_text(errors="surrogateescape")

    complaints = len(HOSTILE_LABELS)
    wait_until("all are complained of", lambda: read_log().count("bad_label") >= complaints)
    log = read_log()
    _check_steers_nothing(log)
    if log.startswith("{"):
        assert all(json.loads(line)["event"] != "forged" for line in log.splitlines())
    longest = max(map(len, log.splitlines()))
    assert longest < DECENT, f"a line of {longest} characters"


NOUNS = [("status",), ("status", "--brief"), ("flows",), ("policy",), ("advise",)]
NOUNS += [("policy", name) for name in HOSTILE_LABELS]


def test_hostile_labels_in_tables(hostile_host: Host) -> None:
    """No raw byte of it reaches a terminal, and it does not fill one."""
    place = f"--run-dir={hostile_host.run_dir}"
    too_long = []
    for noun in NOUNS:
        output = call(*noun, place)
        assert output.code in (0, FAILURE), output.stderr[:500]
        _check_steers_nothing(output.stdout + output.stderr)
        if max(map(len, output.stdout.splitlines())) > DECENT:
            too_long.append(noun)
    assert not too_long, f"lines of more than {DECENT} characters: {too_long}"


def test_hostile_labels_in_json(hostile_host: Host) -> None:
    """The container is left alone and reported as it is; JSON is one document all the same."""
    place = f"--run-dir={hostile_host.run_dir}"
    status = json.loads(call("status", "--json", place).stdout)
    assert {each["container"] for each in status["problems"]} == set(HOSTILE_LABELS)
    containers = json.loads(call("policy", "--json", place).stdout)["containers"]
    modes = {each["name"]: each["mode"] for each in containers}
    # Unknown labels change nothing, bad values switch off.
    adaptive = {"large-label", "label"}
    assert modes == {name: "adaptive" if name in adaptive else "off" for name in HOSTILE_LABELS}


# privileges


@pytest.mark.parametrize("missing", CAPABILITIES)
@pytest.mark.parametrize("verb", ["run", "unload"])
def test_each_capability_is_asked_for(missing: str, verb: str) -> None:
    """Without any one of them there is a message that names it, before anything has been touched."""
    kept = [f"+{name.removeprefix('CAP_').lower()}" for name in CAPABILITIES if name != missing]
    prefix = ("setpriv", f"--bounding-set={','.join(['-all', *kept])}", "--inh-caps=-all")
    with Host(start=False) as host:
        if verb == "run":
            outcome = _start(host, prefix=prefix)
        else:
            places = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
            outcome = call("unload", *places, prefix=prefix)
        _check_refusal(host, outcome, "privileges", missing)
        assert all(name == missing or name not in outcome.stderr.splitlines()[0] for name in CAPABILITIES)
        assert not host.run_dir.exists()
