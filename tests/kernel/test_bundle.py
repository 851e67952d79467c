# SPDX-License-Identifier: Apache-2.0
"""`splicer bundle` of a daemon that has something to hide."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import schemas
from support.daemon import Outcome, call
from support.engine import FakeEngine, name_id
from support.host import Host
from support.lab import Lab

NAME, LABEL, SERVICE = "anna-web-1", "annas.secret", "annashop"


@pytest.fixture
def busy(lab: Lab) -> Any:
    """A container with a connection, a mistake in a label of it, and an override."""
    with tempfile.TemporaryDirectory(prefix="splicer-test-engine-") as directory:
        engine = FakeEngine(str(Path(directory) / "engine.sock"))
        try:
            with Host(f"--docker={engine.url}", start=False) as host:
                inside = host.cgroup.child(f"docker-{name_id(7)}.scope")
                server = host.peer(lab, "b", cgroup=inside)
                labels = {"splicer.mode": "annaptive", LABEL: "x", "com.docker.compose.service": SERVICE}
                engine.run(7, name=NAME, labels=labels, pid=server.pid)
                host.start()
                pair = host.connect(host.peer(lab, "a"), server, lab.address("b"))
                pair.pingpong(40)
                assert call("set", NAME, "adaptive", f"--run-dir={host.run_dir}").code == 0
                host.make_hot(pair)
                yield host, pair
        finally:
            engine.stop()


def bundle(host: Host, path: Path, *arguments: str) -> Outcome:
    places = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
    return call("bundle", str(path), *arguments, *places, timeout=90)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The documents, and all of it as one text."""
    with tarfile.open(path) as archive:
        texts = {
            Path(each.name).name: archive.extractfile(each).read().decode()  # type: ignore[union-attr]
            for each in archive
        }
    return {name: json.loads(text) for name, text in texts.items()}, "\n".join(texts.values())


def test_a_daemon_at_work(busy: Any, lab: Lab, tmp_path: Path) -> None:
    host, pair = busy
    done = bundle(host, tmp_path / "whole")
    assert (done.code, done.stderr) == (0, ""), done
    whole, text = read(tmp_path / "whole")
    schemas.check("bundle", whole["manifest.json"])
    for name in ("status", "doctor"):
        schemas.check(name, whole[f"{name}.json"])
    assert whole["policy.json"]["containers"][0]["name"] == NAME
    flow = next(flow for flow in whole["flows.json"] if flow["local"].endswith(f":{pair.client.local[1]}"))
    assert (flow["state"], flow["server"]["container"]) == ("spliced", NAME)
    assert {"started", "spliced", "override"} <= {event["type"] for event in whole["events.json"]}
    pins = {each["pin"]: each for each in whole["loaded.json"]}
    assert pins["programs/verdict"]["prog_type"]
    assert int(pins["maps/pairs"]["max_entries"]) > 0
    missing = {each["name"]: each["missing"] for each in whole["manifest.json"]["files"] if each["missing"]}
    assert list(missing) == ["log.json"], "it was not started by systemd"

    hidden = bundle(host, tmp_path / "hidden", "--anonymous")
    assert hidden.code == 0, hidden
    covered, covered_text = read(tmp_path / "hidden")
    private = (
        "anna",
        lab.address("a"),
        lab.address("b"),
        name_id(7)[:12],
        "peer.py",
        "splicer-test-",
        "python",
    )
    assert all(each in text for each in (NAME, SERVICE, lab.address("b"), "peer.py", "splicer-test-"))
    found = [each for each in private if each in covered_text.replace('"python": "', "")]
    assert not found, f"{found} is in it still"
    # Who is who can still be seen.
    name = covered["policy.json"]["containers"][0]["name"]
    flow = next(f for f in covered["flows.json"] if f["local"].endswith(f":{pair.client.local[1]}"))
    assert (flow["state"], flow["server"]["container"]) == ("spliced", name)
    told = [e for e in covered["events.json"] if e["type"] == "spliced" and e["server"]]
    assert any(event["server"]["container"] == name for event in told)
    assert flow["client"]["pid"] == pair.client.peer.pid


def test_what_a_daemon_left_that_was_killed(lab: Lab, tmp_path: Path) -> None:
    with Host() as host:
        host.daemon.kill()
        done = bundle(host, tmp_path / "x")
        assert done.code == 0, done
        found, _ = read(tmp_path / "x")
        assert found["loaded.json"], "what is loaded still"
        assert "status.json" not in found
        host.unload()
        host.start()
