# SPDX-License-Identifier: Apache-2.0
"""The manifests, by the tools that read them. That they agree with the code: tests/unit/test_manifests.py."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bpf import list_attached
from support.daemon import REPOSITORY, wait_until
from support.docker import Engine
from support.images import SPLICER
from support.stack import Stack
from support.tiers import thorough

EXAMPLES = REPOSITORY / "examples"
# systemd's own measure, from 0 to 10; promised in examples/systemd/README.md.
EXPOSURE_LIMIT = 3.0


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with programs that exist here: the file is all that is judged."""
    text = (EXAMPLES / "systemd/splicer.service").read_text()
    copy = tmp_path / "splicer.service"
    copy.write_text(re.sub(r"^(ExecStart)=\S+", r"\1=/bin/true", text, flags=re.M))
    return copy


def test_systemd_accepts_the_unit(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    # Units that this one is ordered after may be missing; what is wrong with it itself bears its name.
    complaints = [line for line in done.stderr.splitlines() if "splicer.service" in line]
    assert complaints == []


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for splicer.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE_LIMIT


def test_compose_reads_the_file(engine: Engine) -> None:
    stack = Stack(engine)
    assert set(stack.compose("--profile", "demo", "config", "--services").split()) == {
        *("splicer", "web", "proxy", "load")
    }


@pytest.fixture
def swarm(engine: Engine) -> Iterator[Engine]:
    """A swarm of one; live-restore and swarm exclude each other."""
    engine.stop_service()
    engine.start_service(live_restore=False)
    try:
        engine.docker("swarm", "init", "--advertise-addr=127.0.0.1", "--listen-addr=127.0.0.1:2377")
        yield engine
        engine.docker("swarm", "leave", "--force")
    finally:
        engine.stop_service()
        engine.start_service()


@thorough("another way to start the image that test_sidecar.py starts")
def test_swarm_runs_the_stack(swarm: Engine, tmp_path: Path) -> None:
    service = "splicer_splicer"
    file = EXAMPLES / "swarm/stack.yml"
    image = re.search(r"image: (\S+)", file.read_text())[1]
    swarm.docker("tag", SPLICER, image)
    # Tests attach to nothing but their own cgroup.
    override = tmp_path / "override.yml"
    environment = f"      SPLICER_CGROUP: {swarm.cgroup.path}\n"
    override.write_text(f'version: "3.9"\nservices:\n  splicer:\n    environment:\n{environment}')
    files = ["--compose-file", str(file), "--compose-file", str(override)]
    swarm.docker("stack", "deploy", "--resolve-image=never", *files, "splicer")

    def find() -> str:
        found = swarm.docker("ps", "--quiet", "--filter", f"label=com.docker.swarm.service.name={service}")
        return found.strip()

    container = wait_until("a task", find, timeout=30, pause=0.2)
    wait_until(
        "the task is healthy",
        lambda: swarm.inspect(container)["State"]["Health"]["Status"] == "healthy",
        timeout=45,
        pause=0.5,
    )
    assert list_attached(swarm.cgroup.path)
    status = swarm.docker("exec", container, "splicer", "status", "--json")
    assert '"state": "connected"' in status or '"state":"connected"' in status
    assert not os.path.exists("/run/splicer/control.sock")
    swarm.docker("stack", "rm", "splicer")
    wait_until("it has stopped", lambda: not find(), timeout=30, pause=0.5)
    assert not list_attached(swarm.cgroup.path)
