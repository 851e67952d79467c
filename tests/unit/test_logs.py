# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import io
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest

import splicer
from splicer.logs import LogFormat, configure

from .conftest import Terminal

PACKAGE = Path(splicer.__file__).parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}


def test_json_lines() -> None:
    stream = io.StringIO()
    log = configure(stream=stream)
    log.info("generation_attached", cgroup="/sys/fs/cgroup/\udcff ü", programs=5, where=Path("/x"))
    log.warning("pair_lost")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["event"] == "generation_attached"
    assert first["level"] == "info"
    assert first["programs"] == 5
    assert first["where"] == "/x"
    assert first["cgroup"].endswith("ü")
    assert datetime.fromisoformat(first["timestamp"]).utcoffset() is not None
    assert second["level"] == "warning"
    assert stream.getvalue().isascii()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_line_is_one_write(log_format: LogFormat) -> None:
    """Whoever collects the lines of several threads need not put parts together."""
    reader, writer = os.pipe2(os.O_DIRECT)  # packets (pipe(2))
    with open(reader, "rb", buffering=0) as collector, open(writer, "w") as stream:
        log = configure(log_format, stream=stream)
        for event in ("compiling", "ready"):
            log.info(event)
            line = collector.read(4096)
            assert event.encode() in line and line.endswith(b"\n")


def test_exceptions_are_one_json_line() -> None:
    stream = io.StringIO()
    log = configure("json", stream=stream)
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("sweep_failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_a_terminal_gets_lines_for_people() -> None:
    stream = Terminal()
    configure(stream=stream).info("generation_attached", programs=5)
    assert "generation_attached" in stream.getvalue()
    assert "programs=5" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    painted = Terminal()
    configure(stream=painted, colour=True).info("generation_attached", programs=5)
    assert "\x1b[" in painted.getvalue()


def test_the_format_can_be_forced() -> None:
    terminal, file = Terminal(), io.StringIO()
    configure("json", stream=terminal).info("x")
    configure("console", stream=file).info("x")
    assert json.loads(terminal.getvalue())["event"] == "x"
    assert not file.getvalue().startswith("{")


@pytest.mark.parametrize("debug", [True, False])
def test_debug_events_only_when_asked_for(debug: bool) -> None:
    stream = io.StringIO()
    configure(stream=stream, debug=debug).debug("ring_polled")
    assert bool(stream.getvalue()) is debug


def _events() -> list[tuple[str, int, ast.expr]]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            owner = node.func.value
            name = (
                owner.attr
                if isinstance(owner, ast.Attribute)
                else owner.id
                if isinstance(owner, ast.Name)
                else ""
            )
            if name.lstrip("_") in ("log", "logger") and node.func.attr in LEVELS:
                found.append((str(file.relative_to(PACKAGE)), node.lineno, node.args[0]))
    return found


def test_event_names_are_fixed_and_snake_case() -> None:
    events = _events()
    assert events
    wrong = [
        f"{file}:{line}"
        for file, line, event in events
        if not (
            isinstance(event, ast.Constant)
            and isinstance(event.value, str)
            and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", event.value)
        )
    ]
    assert not wrong, "log events must be constant snake_case names: " + ", ".join(wrong)


def test_a_value_is_no_line_of_its_own_on_a_console() -> None:
    """Labels may hold line breaks, and not every structlog escapes them."""
    stream = io.StringIO()
    configure("console", stream=stream).warning("bad_label", value="\n2026-01-01 [info] forged\n")
    assert len(stream.getvalue().splitlines()) == 1
