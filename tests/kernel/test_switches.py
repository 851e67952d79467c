# SPDX-License-Identifier: Apache-2.0
"""What an operator switches at run time: `splicer pause`, and `splicer set` by cgroup, process, port,
address."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator

import pytest
from support.daemon import Outcome, call, wait_until
from support.host import Host
from support.lab import Lab
from support.pauses import Stopwatch
from support.players import Pair

FLIP = 4.0  # seconds that a switch may take: the daemon looks for processes once a second
_ports = itertools.count(7600)


@pytest.fixture(scope="module")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    with Host(services="") as made:
        yield made


def switch(host: Host, *arguments: str) -> Outcome:
    """A command that must succeed."""
    done = call(*arguments, f"--run-dir={host.run_dir}")
    assert (done.code, done.stderr) == (0, ""), done
    return done


def first_line(host: Host) -> str:
    return switch(host, "status").stdout.splitlines()[0]


def stays_plain(host: Host, pair: Pair, rounds: int = 6) -> None:
    for _ in range(rounds):
        pair.pingpong(40)
        flow = host.flow(pair)
        assert (flow["state"], flow["reason"]) == ("paired", "policy_off"), flow
    assert host.count_spliced() == 0


def test_paused_until_resumed(lab: Lab) -> None:
    """Everything spliced goes back, old and new connections stay plain, also those of a service that is eager
    or set to be spliced, and a daemon that is killed, or stopped, and started again keeps it so. Resumed, all
    of them are spliced, and not a byte is lost. `status` says so in its first line, and is healthy."""
    with Host(services="") as host:
        port = next(_ports)
        pair = host.hot_pair(lab, port=port)
        switch(host, "set", "--port", str(port), "eager")
        assert "1 spliced connection on the way back" in switch(host, "pause").stdout
        assert switch(host, "pause").stdout.startswith("Paused already")
        host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
        stays_plain(host, pair)
        assert first_line(host).startswith("Paused since ")
        assert switch(host, "status", "--brief").stdout.startswith("Paused since ")
        later = host.pair(lab, port=port)
        stays_plain(host, later)
        for end in ("kill", "stop"):
            getattr(host.daemon, end)()
            host.start()
            assert first_line(host).startswith("Paused since ")
            later.pingpong(40)
            assert host.count_spliced() == 0
        new = host.pair(lab, port=port)
        stays_plain(host, new)
        assert "is spliced again" in switch(host, "resume").stdout
        assert switch(host, "resume").stdout.startswith("Nothing to resume")
        host.make_hot(new)
        assert first_line(host).startswith("Running: ")
        eager = host.pair(lab, port=port)
        assert host.flow(eager)["state"] == "spliced"
        for each in (pair, later, new, eager):
            each.verify()


KINDS = ("cgroup", "process", "client", "port", "address", "pattern", "network", "range")


@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_is_switched_off_and_on(host: Host, lab: Lab, kind: str) -> None:
    """Off drains the living connections of the subject and keeps new ones plain, and touches no other; a
    daemon that is started anew keeps it; unset has them spliced again."""
    port, other_port = next(_ports), next(_ports) + 100
    web = host.cgroup.child(f"web-{kind}")
    client, server = host.peer(lab, "a"), host.peer(lab, "b", cgroup=web)
    name = f"worker-{kind}"
    server.call("rename", name=name)
    client.call("rename", name=f"ask-{kind}")
    pair = host.connect(client, server, lab.address("b"), port=port)
    address = lab.address("b", 6)
    bystander = host.connect(
        host.peer(lab, "a"),
        host.peer(lab, "b"),
        f"::ffff:{lab.address('b')}",
        port=other_port,
        client_family=10,
    )
    if kind in ("address", "network"):
        bystander = host.connect(
            host.peer(lab, "a"), host.peer(lab, "b"), address, port=other_port, client_family=10
        )
    host.make_hot(pair)
    host.make_hot(bystander)
    v4 = lab.address("b")
    subject = {
        "cgroup": ["--cgroup", str(web.path)],
        "process": ["--process", name],
        "client": ["--process", f"ask-{kind}"],
        "pattern": ["--process", f"work*-{kind}"],
        "port": ["--port", str(port)],
        "range": ["--port", f"{port},{port + 1}"],
        "address": ["--address", v4],
        "network": ["--address", "10.77.0.0/16"],
    }[kind]
    said = switch(host, "set", *subject, "off")
    assert said.stdout.endswith(": off from now on\n"), said
    assert switch(host, "set", *subject, "off").stdout.endswith(": off already\n")
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    before = host.flow(bystander)["redirected_messages"]
    bystander.pingpong(20)
    assert host.flow(bystander)["redirected_messages"] == before + 40, "the bystander was touched"
    assert any("splicer unset " in line and subject[0] in line for line in policy_of(host)), policy_of(host)
    host.daemon.kill()
    host.start()
    later = host.connect(client, server, lab.address("b"), port=port)
    for each in (pair, later):
        host.talk_until(each, "paired", "policy_off", timeout=FLIP)
    assert switch(host, "unset", *subject).stdout.endswith(": labels and configuration count again\n")
    assert switch(host, "unset", *subject).stdout.endswith(": nothing was set\n")
    for each in (pair, later):
        host.talk_until(each, "spliced", timeout=2 * FLIP)
    for each in (pair, later, bystander):
        each.verify()


def policy_of(host: Host) -> list[str]:
    return switch(host, "policy").stdout.splitlines()


def test_a_process_that_is_started_later(host: Host, lab: Lab) -> None:
    """An override of a process holds for one that has its name later, and says so when there is none."""
    said = switch(host, "set", "--process", "late-worker", "off").stdout
    assert "no process of that name runs now" in said
    server = host.peer(lab, "b")
    pair = host.connect(host.peer(lab, "a"), server, lab.address("b"))
    host.make_hot(pair)
    server.call("rename", name="late-worker")
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    switch(host, "unset", "--process", "late-worker")
    host.talk_until(pair, "spliced", timeout=2 * FLIP)
    pair.verify()


def test_what_was_set_last_counts_first(host: Host, lab: Lab) -> None:
    """Of two overrides about one end the newer one counts; taken back, the older one does."""
    port = next(_ports)
    pair = host.hot_pair(lab, port=port)
    switch(host, "set", "--address", lab.address("b"), "off")
    host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    switch(host, "set", "--port", str(port), "adaptive")
    host.talk_until(pair, "spliced", timeout=FLIP)
    for _ in range(2):
        said = switch(host, "set", "--address", lab.address("b"), "off").stdout
        host.talk_until(pair, "paired", "policy_off", timeout=FLIP)
    assert "off already" in said
    switch(host, "unset", "--address", lab.address("b"))
    host.talk_until(pair, "spliced", timeout=FLIP)
    switch(host, "unset", "--port", str(port))
    host.talk_until(pair, "spliced", timeout=FLIP)
    pair.verify()


def test_a_reason_that_no_longer_holds_is_not_given(host: Host, lab: Lab) -> None:
    """Of a connection that reads nothing `flows` says policy_off as soon as its port is off, and no longer
    once it is not: the programs look at it with its next read only."""
    port = next(_ports)
    pair = host.pair(lab, port=port)
    pair.pingpong(8)
    assert host.flow(pair)["reason"] == "cold"
    for _ in range(2):
        switch(host, "set", "--port", str(port), "off")
        assert host.flow(pair)["reason"] == "policy_off"
        switch(host, "unset", "--port", str(port))
        assert host.flow(pair)["reason"] == "cold"
    switch(host, "set", "--port", str(port), "off")
    pair.pingpong(8)  # now the programs have decided so
    assert host.flow(pair)["reason"] == "policy_off"
    switch(host, "unset", "--port", str(port))
    assert host.flow(pair)["reason"] == "cold"
    switch(host, "pause")
    assert host.flow(pair)["reason"] == "policy_off"
    switch(host, "resume")
    assert host.flow(pair)["reason"] == "cold"
    host.make_hot(pair)
    pair.verify()


def test_a_daemon_that_was_stopped(host: Host, lab: Lab) -> None:
    """Whoever asks has an answer within two seconds, which says what to do; once it goes on, all is well, and
    what was spliced was so all the time."""
    pair = host.hot_pair(lab)
    host.daemon.send_signal(signal.SIGSTOP)
    try:
        pair.pingpong(20)
        for command in (["status"], ["status", "--brief"], ["flows"], ["policy"], ["explain", "1"]):
            with Stopwatch() as watch:
                done = call(*command, f"--run-dir={host.run_dir}")
            assert watch.seconds < 2.0, (command, watch.seconds)
            assert done.code == 1
            assert f"the daemon is stopped, by a signal or a debugger (pid {host.daemon.pid}," in (
                done.stdout + done.stderr
            )
    finally:
        host.daemon.send_signal(signal.SIGCONT)
    assert switch(host, "status", "--brief").stdout.startswith("Running: ")
    assert host.flow(pair)["state"] == "spliced"
    pair.verify()


def test_after_a_kill_everybody_says_what_is_left(lab: Lab) -> None:
    with Host() as host:
        pair = host.hot_pair(lab)
        host.daemon.kill()
        where = {"SPLICER_PIN_DIR": str(host.pin_dir)}
        for command in (["status"], ["status", "--brief"], ["flows", "--json"], ["explain", "1"], ["pause"]):
            done = call(*command, f"--run-dir={host.run_dir}", **where)
            assert done.code == 3
            assert "programs of an earlier run are still loaded" in done.stdout + done.stderr, command
        done = call("status", "--json", f"--run-dir={host.run_dir}", **where)
        assert json.loads(done.stdout) == {"schema": 1, "running": False, "loaded": True}
        host.start()
        pair.verify()


def test_a_drain_says_how_many(host: Host, lab: Lab) -> None:
    wait_until("the SOCKHASH is empty", lambda: host.count_spliced() == 0)
    assert switch(host, "drain").stdout == "Nothing to drain: no connection is spliced.\n"
    pairs = [host.hot_pair(lab) for _ in range(2)]
    assert switch(host, "drain").stdout == "Draining: 2 spliced connections go back to plain TCP now.\n"
    for pair in pairs:
        pair.verify()


def test_variables_that_nobody_knows_are_in_the_log(lab: Lab) -> None:
    with Host(start=False) as host:
        host.prefix = ("env", "SPLICER_HOTREADS=3", "SPLICER_PORT=tcp://10.0.0.1:80")
        host.start()
        log = host.daemon.log.read_text()
        assert '"SPLICER_HOTREADS"' in log
        assert '"SPLICER_HOT_READS"' in log
        assert "SPLICER_PORT" not in log


def test_a_reload_that_failed_is_seen_until_it_is_mended(host: Host, lab: Lab) -> None:
    """In the first line of `status`, in `--brief`, which stays green, and in the JSON."""
    host.reload("mode = 'sometimes'\n")
    for form in ([], ["--brief"]):
        assert switch(host, "status", *form).stdout.startswith("Running on old settings: ")
    assert "sometimes" in host.daemon.status()["reload"]["failed"]
    host.reload("")
    assert first_line(host).startswith("Running: ")
    assert host.daemon.status()["reload"] == {}


def test_what_rules_are_about_is_counted(host: Host, lab: Lab) -> None:
    """Rules by cgroup, address and port count the connections that they are about."""
    port, web = next(_ports), host.cgroup.child("counted")
    pairs = [
        host.connect(host.peer(lab, "a"), host.peer(lab, "b", cgroup=web), lab.address("b"), port=port)
        for _ in range(2)
    ]
    for pair in pairs:
        pair.pingpong(8)
    tables = [f'cgroup = "{web.path}"', f'cidr = "{lab.address("b")}"', f"ports = {port}", "ports = 1"]
    host.reload("".join(f'[[policy]]\n{table}\nmode = "adaptive"\n' for table in tables))
    wait_until("earlier connections are gone", lambda: len(host.daemon.flows()) == 2)
    rules = host.daemon.command("policy")["rules"]
    assert [rule["connections"] for rule in rules] == [2, 2, 2, 0]
    host.reload("")
