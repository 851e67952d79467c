# SPDX-License-Identifier: Apache-2.0
"""Echo programs for the network libraries of Python, Node, Java and Go.

Each client checks what comes back: messages one at a time, on several connections at once, then much in both
directions, and a half-close.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apps.case import Case, Failed, Outcome
from apps.stage import PROGRAMS, Running, Stage

PORT, RELAY_PORT = 7000, 7001
CONNECTIONS = 4
BULK = 20_000_000  # bytes on each connection
MESSAGES_PER_SECOND = 400


def _count_messages(stage: Stage) -> str:
    return str(max(800, round(stage.seconds * MESSAGES_PER_SECOND)))


def _judge(output: str, stage: Stage) -> Outcome:
    try:
        answers: list[dict[str, Any]] = json.loads(output)["answers"]
    except (ValueError, KeyError):
        raise Failed(f"no answer: {output[-200:]}") from None
    right = sum(each["same"] for each in answers)
    messages = int(_count_messages(stage)) * CONNECTIONS
    return Outcome(
        f"{right} of {CONNECTIONS} right, {messages} messages",
        {"right": right, "sums": [each["sum"] for each in answers]},
    )


def _ask(stage: Stage, port: int, *command: str | Path, separate: bool = True) -> Outcome:
    """Call a client. `separate`: address and port are two arguments."""
    address = stage.address("a")
    to = (address, str(port)) if separate else (f"{address}:{port}",)
    numbers = (str(CONNECTIONS), _count_messages(stage), str(BULK))
    return _judge(stage.call(*command, *to, *numbers, timeout=60), stage)


def _run_python(stage: Stage) -> Outcome:
    program = ("/usr/bin/python3", "-I", PROGRAMS / "echo.py")
    server = stage.start(*program, "serve", stage.address("a"), str(PORT))
    stage.wait_listening(server, PORT)
    return _ask(stage, PORT, *program, "ask")


def _run_node(stage: Stage) -> Outcome:
    program = PROGRAMS / "echo.js"
    server = stage.start("node", program, "serve", stage.address("a"), str(PORT))
    stage.wait_listening(server, PORT)
    return _ask(stage, PORT, "node", program, "ask")


def _run_java(stage: Stage, style: str) -> Outcome:
    classes = stage.shared / "java"
    if not classes.exists():
        stage.own_directory(classes)
        stage.call("javac", "-encoding", "UTF-8", "-d", classes, PROGRAMS / "Echo.java", timeout=120)
    program = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", classes, "Echo")
    server = stage.start(*program, "serve", style, stage.address("a"), str(PORT))
    stage.wait_listening(server, PORT)
    return _ask(stage, PORT, *program, "ask", style)


def _run_java_stream(stage: Stage) -> Outcome:
    return _run_java(stage, "stream")


def _run_java_available(stage: Stage) -> Outcome:
    return _run_java(stage, "available")


def _run_java_channel(stage: Stage) -> Outcome:
    return _run_java(stage, "channel")


def _start_go(stage: Stage, *arguments: str, port: int) -> tuple[Path, Running]:
    program = stage.shared / "go" / "relay"
    if not program.exists():
        directory = stage.own_directory(program.parent)
        environment = {"GO111MODULE": "off", "GOCACHE": str(directory / "cache"), "CGO_ENABLED": "0"}
        stage.call(
            *("go", "build", "-o", program, PROGRAMS / "relay.go"), environment=environment, timeout=300
        )
    server = stage.start(program, *arguments)
    stage.wait_listening(server, port)
    return program, server


def _run_go(stage: Stage) -> Outcome:
    program, _ = _start_go(stage, "serve", f"{stage.address('a')}:{PORT}", port=PORT)
    return _ask(stage, PORT, program, "ask", separate=False)


def _run_go_relay(stage: Stage) -> Outcome:
    address = stage.address("a")
    program, _ = _start_go(stage, "serve", f"{address}:{PORT}", port=PORT)
    _start_go(stage, "pass", f"{address}:{RELAY_PORT}", f"{address}:{PORT}", port=RELAY_PORT)
    return _ask(stage, RELAY_PORT, program, "ask", separate=False)


CASES = (
    Case("python-asyncio", _run_python, ("/usr/bin/python3",)),
    Case("node", _run_node, ("node",)),
    Case(
        "java-stream",
        _run_java_stream,
        ("java", "javac"),
        redirects=False,
        reasons=frozenset({"blocking_reader"}),
        remark="java.net.Socket without a time limit is blocking",
    ),
    Case("java-available", _run_java_available, ("java", "javac")),
    Case("java-channel", _run_java_channel, ("java", "javac")),
    Case("go-echo", _run_go, ("go",)),
    Case(
        "go-relay",
        _run_go_relay,
        ("go",),
        redirects=False,
        reasons=frozenset({"splice_reader"}),
        remark="io.Copy between two connections is splice(2)",
    ),
)
