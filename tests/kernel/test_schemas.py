# SPDX-License-Identifier: Apache-2.0
"""The JSON of each command is what docs/schemas/ says, of a daemon that has something to tell."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from support import schemas
from support.daemon import call
from support.engine import FakeEngine, name_id
from support.host import Host
from support.lab import Lab

from splicer.cli.main import COMMANDS

# What has no --json: one that runs, one that prints what it removes, one that writes what others have sent,
# and one that prints a script.
WITHOUT = {"run", "unload", "tap", "completion"}
# What prints an object for each thing that it has to tell.
LINES = {"events", "top"}


def test_every_command_that_has_json_has_a_schema() -> None:
    assert set(schemas.COMMANDS) == set(COMMANDS) - WITHOUT


def test_all_of_them(lab: Lab, tmp_path: Path) -> None:
    """Each noun and each verb, with containers, rules, overrides, mistakes in labels, a failed reload, and
    connections of all kinds; and while it is paused."""
    with tempfile.TemporaryDirectory(prefix="splicer-test-engine-") as directory:
        engine = FakeEngine(str(Path(directory) / "engine.sock"))
        try:
            _walk(lab, engine)
        finally:
            engine.stop()


def _walk(lab: Lab, engine: FakeEngine) -> None:
    with Host(f"--docker={engine.url}", start=False) as host:
        inside = host.cgroup.child(f"docker-{name_id(7)}.scope")
        server = host.peer(lab, "b", cgroup=inside)
        labels = {"splicer.mode": "adaptve", "splicer.prots": "80", "com.docker.compose.service": "web"}
        engine.run(7, name="shop-web-1", labels=labels, pid=server.pid)
        host.start()
        pairs = [
            host.connect(host.peer(lab, "a"), server, lab.address("b")),
            host.pair(lab),
            host.hot_pair(lab),
        ]
        pairs[0].pingpong(40)
        outside = host.connect(host.peer(lab, "a"), host.peer(lab, "b", inside=False), lab.address("b"))
        host.reload("mode = 'sometimes'\n")

        def check(*arguments: str, code: int = 0) -> None:
            place = [] if arguments[0] == "version" else [f"--run-dir={host.run_dir}"]
            done = call(*arguments, "--json", *place, SPLICER_PIN_DIR=str(host.pin_dir), timeout=60)
            assert done.code == code, done
            lines = done.stdout.splitlines()
            assert len(lines) == 1 or arguments[0] in LINES, "one object on one line"
            for line in lines:
                schemas.check(arguments[0], json.loads(line))

        asked = [
            ("set", "web", "eager"),
            ("set", "--port", "1", "off"),
            ("set", "--process", "nobody", "off"),
            ("policy",),
            ("policy", "web"),
            ("status",),
            ("flows",),
            ("flows", "--sort", "bytes", "--limit", "1"),
            ("advise",),
            ("explain", "web"),
            ("explain", str(pairs[2].client.peer.pid)),
            ("explain", str(outside.client.peer.pid)),
            ("explain", "192.0.2.1:1", "192.0.2.2:2"),
            ("drain",),
            ("pause",),
            ("pause",),
            ("status",),
            ("policy",),
            ("explain", "web"),
            ("resume",),
            ("unset", "web"),
            ("unset", "--port", "1"),
            ("events",),
            ("top", "-n", "1"),
            ("top", "-n", "1", "--connections"),
            ("version",),
        ]
        for arguments in asked:
            check(*arguments)
        host.reload("")
        check("status")
        host.daemon.kill()
        check("status", code=3)
        host.start()
        for pair in pairs:
            pair.verify()


def test_the_doctors(lab: Lab) -> None:
    done = call("doctor", "--json", timeout=60)
    assert done.code in (0, 1, 4), done
    schemas.check("doctor", json.loads(done.stdout))


@pytest.mark.parametrize("loaded", [True, False])
def test_without_a_daemon(loaded: bool) -> None:
    schemas.check("status", {"schema": 1, "running": False, "loaded": loaded})
