# SPDX-License-Identifier: Apache-2.0
"""`splicer top` shows what really spliced connections carry, on real terminals."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import schemas
from support.daemon import call, command_line, environment, wait_until
from support.host import Host
from support.lab import Lab
from support.players import Pair
from support.terminal import on_terminal


@contextmanager
def talking(pair: Pair) -> Iterator[None]:
    """It ping-pongs all the time. Nobody else may use it meanwhile."""
    over = threading.Event()

    def talk() -> None:
        while not over.is_set():
            pair.pingpong(20)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def look(host: Host, *arguments: str) -> dict[str, Any]:
    """The last one of some looks."""
    done = call("top", "--json", *arguments, f"--run-dir={host.run_dir}")
    assert (done.code, done.stderr) == (0, ""), done
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    for each in looks:
        schemas.check("top", each)
    return dict(looks[-1])


def test_a_spliced_pair_and_a_plain_one(host: Host, lab: Lab) -> None:
    """Each is where it belongs, as much as it is, and nothing is counted twice."""
    spliced, plain = host.hot_pair(lab), host.pair(lab, blocking=(True, True))
    host.talk_until(plain, "paired", "blocking_reader")
    with talking(spliced):
        answer = wait_until(
            "it is seen",
            lambda: (found := look(host, "--connections", "-n", "1"))["connections"] and found,
            15.0,
        )
    (row,) = answer["connections"]
    assert (row["state"], row["local"]) == ("spliced", host.flow(spliced)["local"])
    assert row["client"]["pid"] == spliced.client.peer.pid
    assert row["redirected_messages_per_second"] > 0
    # Messages of 64 bytes.
    assert row["redirected_bytes_per_second"] == pytest.approx(
        64 * row["redirected_messages_per_second"], 0.01
    )
    assert row["plain_bytes_per_second"] == 0
    with talking(plain):
        answer = wait_until(
            "it is seen",
            lambda: (
                (found := look(host, "--connections", "-n", "2", "--interval", "0.5"))["connections"]
                and found
            ),
            15.0,
        )
    last = answer["connections"][0]
    assert last["reason"] == "blocking_reader"
    assert last["plain_bytes_per_second"] > 0
    assert last["redirected_bytes_per_second"] == 0


def test_sums_are_those_of_flows(host: Host, lab: Lab) -> None:
    def look_now() -> dict[str, Any]:
        """Looks are shared, and the last one may be of before."""

        def is_of_now() -> dict[str, Any] | None:
            total: dict[str, Any] = look(host, "-n", "1")["total"]
            told = host.daemon.totals()
            keys = ("redirected_bytes", "redirected_messages")
            return total if all(total[key] == told[key] for key in keys) else None

        found: dict[str, Any] = wait_until("top and status agree", is_of_now, 15.0)
        return found

    pair = host.hot_pair(lab)
    before = look_now()
    assert before["spliced"] == sum(flow["state"] == "spliced" for flow in host.daemon.flows())
    pair.pingpong(500)
    after = look_now()
    assert after["redirected_messages"] - before["redirected_messages"] == 1000, "each message once"


def test_on_a_terminal(host: Host, lab: Lab) -> None:
    """The pair is there, among connections as well; and the terminal is as it was."""
    pair = host.hot_pair(lab)
    command = command_line("top", "--interval", "0.5", f"--run-dir={host.run_dir}")
    with on_terminal(command, columns=120) as terminal, talking(pair):
        terminal.wait_for("CLIENT")
        terminal.press("c")
        terminal.wait_for(f":{pair.client.local[1]}", 15.0)
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.attributes() == terminal.before


def test_the_daemon_goes_away(lab: Lab) -> None:
    with Host() as host:
        command = command_line("top", "--interval", "0.5", f"--run-dir={host.run_dir}")
        with on_terminal(command) as terminal:
            terminal.wait_for("redirected")
            assert host.daemon.stop() == 0
            assert terminal.end() == 3
            assert terminal.attributes() == terminal.before
            assert b"not running" in terminal.shown


def test_in_tmux(host: Host, lab: Lab) -> None:
    """What a person sees: drawn, resized, and the shell's screen again at the end."""
    assert shutil.which("tmux"), "the program tmux is missing: make setup-test installs it"
    socket = host.directory / "tmux"

    def tmux(*arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(socket), "-f", "/dev/null", *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            cwd="/",
            env=environment(),
        )
        return done.stdout

    def screen() -> str:
        return tmux("capture-pane", "-p")

    pair = host.hot_pair(lab)
    tmux("new-session", "-d", "-x", "100", "-y", "24", "sh")
    try:
        tmux("send-keys", "stty -a > " + str(host.directory / "before") + "; echo be''fore", "Enter")
        wait_until("the shell is there", lambda: "before" in screen())
        command = " ".join(
            command_line("top", "--connections", "--interval", "0.5", f"--run-dir={host.run_dir}")
        )
        with talking(pair):
            tmux("send-keys", f"{command}; echo co''de=$?", "Enter")
            wait_until("the pair is shown", lambda: f":{pair.client.local[1]}" in screen(), 15.0)
            seen = screen().splitlines()
            assert seen[0].endswith("spliced")
            assert seen[2].split() == ["CLIENT", "SERVER", "STATE", "REASON", "MSG/S", "SPLICED/S", "TCP/S"]
            assert seen[23].startswith("q quit")
            tmux("resize-window", "-x", "60", "-y", "10")
            wait_until("it is drawn anew", lambda: screen().splitlines()[9].startswith("q quit"))
            # A name gives way to its port, and that to no more than its last digits.
            wait_until("the pair is still shown", lambda: str(pair.client.local[1])[-4:] in screen())
            tmux("send-keys", "q")
            wait_until("it has ended", lambda: "code=0" in screen())
        assert "MSG/S" not in screen(), "what was on the screen before is there again"
        after = host.directory / "after"
        tmux("send-keys", f"stty -a > {after}; echo af''ter", "Enter")
        wait_until("the shell is there", lambda: "after" in screen())
        # But for the size, in the first line.
        before = (host.directory / "before").read_text()
        assert after.read_text().splitlines()[1:] == before.splitlines()[1:]
    finally:
        tmux("kill-server")
