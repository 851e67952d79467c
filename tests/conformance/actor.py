# SPDX-License-Identifier: Apache-2.0
"""The process that plays probes: told over stdin which and how, as support/peer.py is.

Each command is carried out by a child of its own, so that what a probe does to its process (signals,
splice(2), a hang) ends with it. The child reports every line as it is written: of a probe that hangs, all
before is known.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conformance.memory import Bound, make_bound, remove_bounds
from conformance.probes import PROBES, Probe, load
from conformance.scene import Cut, End, Overdue, Scene

SO_NETNS_COOKIE = 71
IPPROTO_MPTCP = 262
ROUNDS = 22  # ping-pongs that make both ends hot
SETTLING_ROUNDS = 4  # the first messages after adoption may go through TCP
SPLICE_PATIENCE = 8.0  # seconds
MISTAKEN = "taken for a process that had used splice(2)"
ATTEMPTS = 4
BOUND = "splicer-test-probe-"
SILENCE = 10.0  # seconds without a line from a child, more than any patience in it: it hangs


class Mistaken(Exception):
    """This process has the id of one that was seen to use splice(2), and is taken for it."""


class Control:
    """Asks the daemon about connections of this network namespace."""

    def __init__(self, path: str) -> None:
        self._path = path
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            self._cookie = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]

    def ask(self, command: str) -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10.0)
            sock.connect(self._path)
            sock.sendall(json.dumps({"command": command}).encode() + b"\n")
            return json.loads(sock.makefile("rb").readline())["result"]

    def flows(self) -> dict[int, dict[str, Any]]:
        """The connections of this namespace by the client's port."""
        return {
            int(flow["local"].rpartition(":")[2]): flow
            for flow in self.ask("flows")["flows"]
            if flow["netns"] == self._cookie
        }


def connect(probe: Probe, port: int = 0, bound: Bound | None = None) -> tuple[socket.socket, socket.socket]:
    """A connection over this namespace's loopback: client's and server's socket."""
    inside = {probe.bound: bound.inside} if bound else {}
    protocol = IPPROTO_MPTCP if probe.mptcp else 0
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(("127.0.0.1", port or probe.port))
        door.listen(8)
        with inside.get("client", contextlib.nullcontext)():
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        for each in probe.options[0]:
            client.setsockopt(*each)
        if not probe.blocking[0]:
            # Non-blocking from the start, which `eager` asks of a client.
            client.settimeout(10.0)
        client.connect(door.getsockname())
        with inside.get("server", contextlib.nullcontext)():
            server, _ = door.accept()
    for each in probe.options[1]:
        server.setsockopt(*each)
    client.setblocking(probe.blocking[0])
    server.setblocking(probe.blocking[1])
    if not probe.nagle:
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


def exchange(lines: list[Scene], rounds: int, probe: Probe) -> None:
    """Ping-pong on every connection."""
    for _ in range(rounds):
        for scene in lines:
            if probe.heat is not None:
                probe.heat(scene.client.sock, scene.server.sock)
                continue
            for one, other in ((scene.client, scene.server), (scene.server, scene.client)):
                one.sock.sendall(bytes(64))
                got = 0
                while got < 64:
                    other.wait(select.POLLIN)
                    with contextlib.suppress(BlockingIOError):
                        got += len(other.sock.recv(64 - got))


def heat(scenes: list[Scene], probe: Probe, control: Control | None) -> None:
    """Make connections hot, and see that they are spliced, or refused for the reason that is documented."""
    exchange(scenes, ROUNDS, probe)
    deadline = time.monotonic() + SPLICE_PATIENCE
    left = list(scenes) if control is not None else []
    while left:
        assert control is not None
        flows = control.flows()
        left = [each for each in left if not _is_ready(flows.get(_port(each)), probe)]
        if any(_is_mistaken(flows.get(_port(each)), probe) for each in left):
            raise Mistaken
        if time.monotonic() > deadline:
            raise Overdue(f"{probe.reason or 'spliced'}: {[flows.get(_port(each)) for each in left]}")
        if left:
            exchange(left, 2, probe)
            time.sleep(0.01)
    exchange(scenes, SETTLING_ROUNDS, probe)
    for scene in scenes:
        scene.settle()


def _port(scene: Scene) -> int:
    return int(scene.client.sock.getsockname()[1])


def _is_mistaken(flow: dict[str, Any] | None, probe: Probe) -> bool:
    return flow is not None and flow["reason"] == "splice_reader" != probe.reason


def _is_ready(flow: dict[str, Any] | None, probe: Probe) -> bool:
    if flow is None:
        # No connection of these kinds is paired in the first place.
        return probe.reason in ("policy_off", "mptcp")
    if probe.reason:
        return (flow["state"], flow["reason"]) == ("paired", probe.reason)
    return bool(flow["state"] == "spliced")


def play(probe: Probe, cuts: list[Cut], control: Control | None, port: int, tell: Any) -> None:
    """Each run on a connection of its own, all of them made hot together."""
    scenes = []
    for number, cut in enumerate(cuts):
        bound = make_bound(f"{BOUND}{os.getpid()}-{number}") if probe.bound else None
        client, server = connect(probe, port, bound)
        scenes.append(Scene(End("client", client), End("server", server), cut))
        if bound:
            scenes[-1].memory = bound
            scenes[-1].keep(contextlib.ExitStack()).callback(bound.remove)
        if control is not None:
            scenes[-1].drain = lambda: control.ask("drain")
    stormy = any(cut.drag for cut in cuts)
    heat(scenes, probe, control)
    before = control.flows() if control else {}
    tell({"ready": True})
    for number, scene in enumerate(scenes):
        if stormy:
            exchange([scene], 2, probe)
        elif scene.cut.how == "drain" and number:
            # The one before drained this connection too.
            heat([scene], probe, control)
        port = _port(scene)
        scene.report = lambda line, number=number: tell({"run": number, "line": line})
        ended = "ok"
        try:
            probe.play(scene)
        except Overdue as overdue:
            ended = f"never: {overdue}"
        except Exception:
            ended = traceback.format_exc()
        flow = control.flows().get(port) if control else None
        scene.close()
        known = flow is not None and port in before
        tell(
            {
                "run": number,
                "ended": ended,
                "moments": scene.moments,
                "state": flow["state"] if flow else None,
                "reason": flow["reason"] if flow else None,
                "redirected": flow["redirected_messages"] - before[port]["redirected_messages"]
                if known
                else None,
            }
        )


class Actor:
    """The operations; see support/peer.py."""

    def play(
        self,
        probe: str,
        cuts: list[dict[str, Any]],
        control: str | None,
        ready: str | None = None,
        port: int = 0,
    ) -> Any:
        """Play a probe once for each cut; `ready` is a file to make when the connections are hot. `port` is
        the server's, if its policy matters.

        The value: "runs", each with its transcript, and "failure", which is why there are fewer.
        """
        for _ in range(ATTEMPTS):
            answer = self._play_once(probe, [Cut(**each) for each in cuts], control, port, ready)
            # Ids come round again quickly on a busy machine; KNOWN_ISSUES.md says what comes of it.
            if answer["failure"] != MISTAKEN or answer["runs"][0]["lines"]:
                break
        return answer

    def _play_once(
        self, probe: str, cuts: list[Cut], control: str | None, port: int, ready: str | None
    ) -> dict[str, Any]:
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(out)
            self._become(probe, cuts, control, port, into)
        os.close(into)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        try:
            return self._listen(out, len(cuts), ready)
        finally:
            os.close(out)
            # The group is the child's own: whatever it has started ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            remove_bounds(f"{BOUND}{child}-")
            if ready:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(ready)

    @staticmethod
    def _listen(out: int, count: int, ready: str | None) -> dict[str, Any]:
        runs: list[dict[str, Any]] = [{"lines": [], "ended": None} for _ in range(count)]
        failure, unread = None, b""
        while True:
            if not select.select([out], [], [], SILENCE)[0]:
                failure = f"no sign of life for {SILENCE} s"
                break
            data = os.read(out, 1 << 16)
            if not data:
                break
            unread += data
            *lines, unread = unread.split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "failure" in told:
                    failure = told["failure"]
                elif "ready" in told:
                    if ready:
                        Path(ready).touch()
                elif "line" in told:
                    runs[told["run"]]["lines"].append(told["line"])
                else:
                    runs[told["run"]].update(told)
        return {"runs": runs, "failure": failure}

    @staticmethod
    def _become(name: str, cuts: list[Cut], control: str | None, port: int, into: int) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            os.dup2(nothing, 1)
            probe = PROBES[name]

            def tell(what: dict[str, Any]) -> None:
                os.write(into, json.dumps(what).encode() + b"\n")

            try:
                play(probe, cuts, Control(control) if control else None, port, tell)
            except Overdue as overdue:
                tell({"failure": f"never: {overdue}"})
            except Mistaken:
                tell({"failure": MISTAKEN})
            except Exception:
                tell({"failure": traceback.format_exc()})
            code = 0
        finally:
            os._exit(code)


def serve() -> None:
    """Carry out the commands on stdin until it ends."""
    load()
    actor = Actor()
    print(json.dumps({"ok": True, "value": os.getpid()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        operation = getattr(actor, command.pop("op"))
        command.pop("timeout", None)
        print(json.dumps({"ok": True, "value": operation(**command)}), flush=True)


if __name__ == "__main__":
    serve()
