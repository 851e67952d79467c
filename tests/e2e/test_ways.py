# SPDX-License-Identifier: Apache-2.0
"""From nothing to a spliced connection and back, by the commands of the documents, each on a Debian of its
own. What becomes of the package later is in test_package.py, and the way of compose in test_demo.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bpf import list_objects
from support.daemon import wait_until
from support.documents import read_document
from support.machine import Machine, machine
from support.terminal import Terminal, on_terminal
from support.tiers import thorough
from support.trees import clone

pytestmark = [
    thorough("a system is installed and booted for each; what they run has its tests elsewhere"),
    pytest.mark.timeout(900),
]

# bcc with LLVM, and what pip has to fetch.
INSTALLED_WITHIN = 600.0  # seconds
SUITES = ("trixie", "bookworm")


@pytest.fixture(params=SUITES)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """The smallest Debian, booted, with this tree in /root/splicer, a way to the packages, and sudo."""
    with machine(request.param) as made:
        made.install("sudo")
        # Nobody is there to answer.
        (made.root / "etc/apt/apt.conf.d/98yes").write_text('APT::Get::Assume-Yes "true";\n')
        made.boot()
        made.connect()
        made.bring(clone(tmp_path / "splicer"))
        yield made


def told(document: str, command: str) -> str:
    """The command, which the document must tell its reader to type, as it is typed in the tree."""
    assert command in [piece.text for piece in read_document(document).commands], f"{document}: {command}"
    return f"cd /root/splicer && {command}"


def do(made: Machine, document: str, command: str, timeout: float = 60.0) -> str:
    return made.call("sh", "-c", told(document, command), timeout=timeout)


@contextmanager
def running(made: Machine, document: str, command: str) -> Iterator[Terminal]:
    """The command on a terminal, from when splicer is ready. It must have ended at the end."""
    with on_terminal(made.inside("sh", "-c", told(document, command))) as terminal:

        def is_ready() -> bool:
            terminal.read()
            assert terminal.process.poll() is None, terminal.shown.decode()
            return b"start_seconds" in terminal.shown

        wait_until("splicer is ready", is_ready, timeout=INSTALLED_WITHIN)
        yield terminal
        assert terminal.process.poll() is not None


def wait_spliced(made: Machine, flows: str) -> None:
    """Until `splicer flows`, as the document has it, shows the connection of Machine.talking()."""
    wait_until("it is spliced", lambda: is_spliced(made.call("sh", "-c", flows)), timeout=30)


def is_spliced(table: str) -> bool:
    return any(":7700 " in line and " spliced " in line for line in table.splitlines())


def held(made: Machine) -> set[tuple[str, int]]:
    """What splicer has pinned in the machine."""
    found: set[tuple[str, int]] = set().union(*made.pins().values())
    assert {kind for kind, _ in found} == {"prog", "map", "link"}
    return found


def assert_nothing_left(made: Machine, loaded: set[tuple[str, int]]) -> None:
    """Neither in the kernel nor in the file systems that are gone with a boot."""
    assert made.pins() == {}
    assert made.programs() == set()
    assert made.attempt("ls", "/run/splicer").returncode != 0
    wait_until("the kernel has let go of all of it", lambda: not loaded & list_objects().keys())


def assert_no_file(made: Machine) -> None:
    """Of splicer, but for the clone."""
    assert (
        made.call("find", "/", "-xdev", "-path", "/root", "-prune", "-o", "-name", "*splicer*", "-print")
        == ""
    )


def test_make_run(fresh: Machine) -> None:
    """README's two commands. The first one installs all that is missing but make, and Ctrl-C ends it. The
    second time it needs no way out, and SIGTERM ends it. The connection is the same throughout."""
    made = fresh
    made.install("make")
    flows = told("README.md", "sudo .venv/bin/splicer flows")
    with running(made, "README.md", "sudo make run") as terminal:
        assert b"setup: installing " in terminal.shown
        with made.talking():
            wait_spliced(made, flows)
            loaded = held(made)
            terminal.press("\x03")
            assert terminal.end(timeout=30) == 130
            assert b"drained" in terminal.shown and b"***" not in terminal.shown
            assert_nothing_left(made, loaded)
            installed = made.call("dpkg-query", "--show")

            made.disconnect()
            with running(made, "README.md", "sudo make run") as terminal:
                assert b"setup:" not in terminal.shown
                wait_spliced(made, flows)
                loaded = held(made)
                status = made.call("/root/splicer/.venv/bin/splicer", "status", "--json")
                made.call("sh", "-c", f"kill {json.loads(status)['pid']}")
                assert terminal.end(timeout=30) == 0
            assert_nothing_left(made, loaded)
            assert made.call("dpkg-query", "--show") == installed


def test_pipx(fresh: Machine) -> None:
    """Installed by pipx with Debian's bcc, and gone when it is uninstalled."""
    made = fresh
    page = "docs/operations.md"
    environment = "sudo PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/usr/local/bin pipx"
    assert made.attempt("sh", "-c", "command -v pipx splicer").returncode != 0
    do(made, page, "sudo apt-get install pipx python3-bpfcc", timeout=INSTALLED_WITHIN)
    do(made, page, f"{environment} install --system-site-packages .", timeout=INSTALLED_WITHIN)
    do(made, page, "sudo splicer doctor")
    with running(made, page, "sudo splicer run") as terminal:
        with made.talking():
            wait_spliced(made, "sudo splicer flows")
            loaded = held(made)
            terminal.press("\x03")
            assert terminal.end(timeout=30) == 0
            assert_nothing_left(made, loaded)
    newer = 'sed -i \'/^_*version_* = /s/"[^"]*"/"9.0.0"/\' pyproject.toml splicer/__init__.py'
    made.call("sh", "-c", f"cd /root/splicer && {newer}")
    do(made, page, f"{environment} install --force --system-site-packages .", timeout=INSTALLED_WITHIN)
    assert made.call("splicer", "version").startswith("splicer 9.0.0")
    do(made, page, f"{environment} uninstall splicer")
    do(made, page, "sudo rm -r /var/cache/splicer")
    assert_no_file(made)


def test_package(fresh: Machine) -> None:
    """Built where it is installed, whose versions of Debian's tools it has to do with."""
    made = fresh
    page = "examples/systemd/README.md"
    made.install("git", "make", "ca-certificates")
    do(made, page, "sudo make deb", timeout=INSTALLED_WITHIN)
    do(made, page, "sudo apt install ./dist/splicer_*.deb", timeout=INSTALLED_WITHIN)
    with made.talking():
        wait_spliced(made, "sudo splicer flows")
        assert "Running" in do(made, page, "sudo splicer status")
        loaded = held(made)
        made.call("sudo", "apt", "purge", "splicer")
        assert_nothing_left(made, loaded)
    assert_no_file(made)


def test_systemd_without_a_package(fresh: Machine) -> None:
    """An environment in /opt, and the unit of the examples as it is."""
    made = fresh
    page = "examples/systemd/README.md"
    do(made, page, "sudo apt-get install python3-venv python3-bpfcc", timeout=INSTALLED_WITHIN)
    for command in (
        "sudo python3 -m venv --system-site-packages /opt/splicer",
        "sudo /opt/splicer/bin/pip install .",
        "sudo cp examples/systemd/splicer.service /etc/systemd/system/",
        "sudo systemctl daemon-reload",
        "sudo systemctl enable --now splicer",
    ):
        do(made, page, command, timeout=INSTALLED_WITHIN)
    with made.talking():
        wait_spliced(made, "sudo /opt/splicer/bin/splicer flows")
        assert "Running" in do(made, page, "sudo /opt/splicer/bin/splicer status")
        loaded = held(made)
        made.call("sudo", "systemctl", "disable", "--now", "splicer")
        made.call("sudo", "systemctl", "clean", "--what=all", "splicer")
        assert_nothing_left(made, loaded)
    made.call("rm", "-r", "/opt/splicer", "/etc/systemd/system/splicer.service")
    assert_no_file(made)
