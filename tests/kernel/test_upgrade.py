# SPDX-License-Identifier: Apache-2.0
"""Another build takes over, with traffic that checks itself: the old generation is drained and gone before
the new one is attached, nothing is lost, repeated or reset (promise 4 of HAZARDS.md)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest
from support.bpf import list_attached
from support.daemon import call, wait_until
from support.host import Host
from support.lab import Lab
from support.load import Load
from support.players import Pair
from support.tiers import spread, thorough
from support.trees import copy_changed

from splicer.kernel import libbpf

CHANGED = ("bpf/observe.c", "#define WARM_SEGMENTS\t3", "#define WARM_SEGMENTS\t4")


@pytest.fixture(scope="module")
def other_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree that loads other programs."""
    return copy_changed(tmp_path_factory.mktemp("other-build"), *CHANGED)


def _check_survivors(host: Host, lab: Lab, load: Load, quiet: Pair, waiting: Pair) -> None:
    """Connections of before go on, one with 5000 bytes that wait for its reader, and new ones are spliced."""
    assert waiting.server.recv(5000) == 5000
    waiting.pingpong(20)
    load.finish()
    for pair in (quiet, waiting):
        pair.verify()
    host.check_alive(lab)


def _use(host: Host, tree: Path | None) -> None:
    """Start the next daemons from another tree."""
    host.prefix = ("env", f"PYTHONPATH={tree}") if tree else ()


@pytest.mark.parametrize("ending", spread(["killed", "stopped"], ["killed"], "the easier of the two endings"))
def test_another_build_under_load(lab: Lab, other_build: Path, ending: str) -> None:
    """Upgrade and downgrade: the old generation is drained and gone before the new one is attached, each
    connection goes on as plain TCP, as long as no census finds it, and new ones are spliced by the new
    build."""
    with Host("--stop-timeout", "0.5", "--no-census") as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        waiting = host.hot_pair(lab)
        waiting.client.send(5000, chunk=500)
        for number, tree in enumerate((other_build, None)):
            if ending == "killed":
                host.daemon.kill()
                quiet.pingpong(20)
            else:
                assert host.daemon.stop() == 0
                assert host.list_pins() == []
                assert list_attached(host.cgroup.path) == []
            _use(host, tree)
            host.start()
            log = host.daemon.log.read_text()
            assert log.count('"generation_replaced"') == (number + 1 if ending == "killed" else 0)
            assert log.count('"generation_loaded"') == number + 2
            assert log.count('"generation_taken_over"') == 0
            assert sorted(list_attached(host.cgroup.path)) == ["cgroup_setsockopt", "cgroup_sock_ops"]
            # Whole or not at all: no connection is known with one end only.
            assert host.count_spliced() == 0
            assert host.daemon.flows() == []
            quiet.pingpong(50)
            fresh = host.hot_pair(lab)
            assert host.count_spliced() == 2
            fresh.verify()
            fresh.close()
        _check_survivors(host, lab, load, quiet, waiting)


@thorough("test_census.py stops and starts again; the build is another here")
def test_another_build_finds_the_connections_again(lab: Lab, other_build: Path) -> None:
    """What the old generation had spliced is spliced by the new one, under load."""
    with Host("--stop-timeout", "0.5") as host:
        load = Load(host, lab)
        quiet = host.hot_pair(lab)
        host.daemon.kill()
        _use(host, other_build)
        host.start()
        assert host.daemon.log.read_text().count('"generation_replaced"') == 1
        host.make_hot(quiet)
        load.finish()
        quiet.verify()
        host.check_alive(lab)


@thorough("test_another_build_under_load with connections that come and go")
def test_another_build_is_replaced_while_connections_come_and_go(lab: Lab, other_build: Path) -> None:
    """Connections established in the gap between two generations are whole: known and spliced, or plain."""
    with Host("--stop-timeout", "0.5") as host:
        client, server = host.peer(lab, "a"), host.peer(lab, "b")
        port = server.call("listen", name="door", family=socket.AF_INET, host=lab.address("b"))
        server.begin("serve", listener="door", seconds=60.0)
        where = {"family": socket.AF_INET, "host": lab.address("b"), "port": port}
        client.begin("churn", **where, seconds=5.5, seed=3, together=8, rounds=60)
        time.sleep(0.5)
        for tree in (other_build, None):
            host.daemon.kill()
            _use(host, tree)
            host.start()
        done = client.finish()
        assert (done["wrong"], done["broken"]) == (0, 0)
        assert done["connections"] > 50
        server.tell_to_end()
        server.finish()
        wait_until("no record is left", lambda: not host.daemon.flows())
        wait_until("no end is left", lambda: host.count_spliced() == 0)
        host.check_alive(lab)


def _pin_former_build(host: Host) -> None:
    """Make the pins look like those of a build whose watch was an iterator, with a link of its own, and which
    had not all the programs and maps of today. Where the kernel would refuse the iterator it was, one over
    TCP sockets stands for it."""
    with contextlib.ExitStack() as opened:
        program = libbpf.open_pin(str(host.pin_dir / "programs" / "adopt"))
        opened.callback(os.close, program)
        link = libbpf.link_iterator(program)
        opened.callback(os.close, link)
        (host.pin_dir / "programs" / "watch").unlink()
        libbpf.pin(program, str(host.pin_dir / "programs" / "watch"))
        libbpf.pin(link, str(host.pin_dir / "links" / "watch"))
    for newer in ("programs/enlist", "programs/census", "programs/measure", "maps/muted", "maps/older"):
        (host.pin_dir / newer).unlink()
    build = host.pin_dir / "build"
    build.unlink()
    build.symlink_to("0123456789abcdef")


@pytest.mark.parametrize("how", spread(["start", "unload"], ["start"], "the same code on the other way"))
def test_build_whose_watch_was_an_iterator(lab: Lab, how: str) -> None:
    """It cannot be run any more, and is drained and removed without it, and without what builds have had
    since."""
    with Host("--stop-timeout", "0.5", "--no-census") as host:
        load = Load(host, lab)
        quiet, waiting = host.hot_pair(lab), host.hot_pair(lab)
        waiting.client.send(5000, chunk=500)
        host.daemon.kill()
        _pin_former_build(host)
        if how == "unload":
            done = call(
                "unload", f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}", "--stop-timeout=0.5"
            )
            assert done.code == 0, done
            assert "removed" in done.stdout
            assert host.list_pins() == []
            assert list_attached(host.cgroup.path) == []
            host.daemon.ready_file.unlink()
        host.start()
        log = host.daemon.log.read_text()
        assert log.count('"generation_replaced"') == (1 if how == "start" else 0)
        assert {each.name for each in (host.pin_dir / "links").iterdir()} == host.name_links()
        assert host.count_spliced() == 0
        quiet.pingpong(50)
        _check_survivors(host, lab, load, quiet, waiting)


def test_build_with_other_records(lab: Lab, tmp_path: Path) -> None:
    """Nobody reads the records of the old generation; it is drained all the same, and nobody loses a byte."""
    last = "\tstruct direction dir[2];"
    tree = copy_changed(tmp_path, "bpf/types.h", last, f"\tu64 more[8];\n{last}")
    layout = tree / "splicer" / "kernel" / "layout.py"
    text = layout.read_text()
    assert text.count(" 8B I 4x ") == 1
    layout.write_text(text.replace(" 8B I 4x ", " 8B I 4x 64x "))
    with Host("--stop-timeout", "2", "--no-census", start=False) as host:
        _use(host, tree)
        host.start()
        load = Load(host, lab)
        quiet, waiting = host.hot_pair(lab), host.hot_pair(lab)
        waiting.client.send(5000, chunk=500)
        host.daemon.kill()
        _use(host, None)
        host.start()
        log = host.daemon.log.read_text()
        assert log.count('"generation_replaced"') == 1
        # What waits unread stays where it is, and is counted.
        assert '"unread_connections": 1' in log
        quiet.pingpong(50)
        _check_survivors(host, lab, load, quiet, waiting)


@thorough("one start for each pin that may be missing")
def test_pins_of_a_build_that_did_not_finish(lab: Lab) -> None:
    """What a killed loader left is cleared away: whichever piece is missing."""
    with Host() as host:
        for missing in ("links/register", "programs/watch", "maps/events", "build"):
            host.daemon.kill()
            (host.pin_dir / missing).unlink()
            host.start()
            host.check_alive(lab)
