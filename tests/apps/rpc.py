# SPDX-License-Identifier: Apache-2.0
"""gRPC: its C core asks for TCP_INQ on every connection. Python's is PyPI's newest, Ruby's is Debian's.

Calls of all four kinds, messages of 4 MB, calls that are cancelled, overdue or refused; a server that retires
(its clients get a GOAWAY) or dies while a call goes on.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from apps.case import Case, Failed, Outcome
from apps.stage import PROGRAMS, STOP_TIMEOUT, Stage

Command = tuple[str | Path, ...]

PORT = 7000
# The interpreter that has grpcio.
PYTHON: Command = (sys.executable, "-I", PROGRAMS / "rpc.py")
RUBY: Command = ("ruby", PROGRAMS / "rpc.rb")


def _find_python() -> list[str]:
    return [] if importlib.util.find_spec("grpc") else ["grpcio"]


def _find_ruby() -> list[str]:
    try:
        done = subprocess.run(["ruby", "-e", "require 'grpc'"], check=False, capture_output=True)
    except FileNotFoundError:
        return []  # named as a program
    return ["ruby-grpc"] if done.returncode else []


def _find_both() -> list[str]:
    return _find_python() + _find_ruby()


def _run(
    stage: Stage, server: Command, client: Command, what: str, environment: Mapping[str, str]
) -> Outcome:
    address = (stage.address("a"), str(PORT))
    running = stage.start(*server, "serve", *address, environment=environment)
    stage.wait_listening(running, PORT)
    command = (*client, "ask", *address, what, str(stage.seconds))
    told: dict[str, Any] = json.loads(stage.call(*command, timeout=120, environment=environment))
    facts = told["facts"]
    if what != "calls":
        try:
            facts["server"] = running.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"the server is still there: {running.tail()}") from None
        stage.stop(running)
        return Outcome(f"{facts['before']} messages, then {facts['ended']}", facts)
    rate = told["measures"]["calls per second"]
    return Outcome(f"{facts['unary'] + facts['parallel']} calls right", facts, {"calls per second": rate})


def _case(
    name: str,
    server: Command,
    client: Command,
    what: str,
    *,
    redirects: bool = True,
    reasons: Collection[str] = (),
    remark: str = "",
    **environment: str,
) -> Case:
    return Case(
        name,
        partial(_run, server=server, client=client, what=what, environment=environment),
        tuple(sorted({str(each[0]) for each in (server, client)})),
        find_missing=_find_both if server != client else _find_python if server is PYTHON else _find_ruby,
        redirects=redirects,
        reasons=frozenset(reasons),
        remark=remark,
    )


CASES = (
    _case("grpc-python", PYTHON, PYTHON, "calls"),
    _case("grpc-python-retires", PYTHON, PYTHON, "retire"),
    _case("grpc-python-dies", PYTHON, PYTHON, "die"),
    _case("grpc-python-poll", PYTHON, PYTHON, "calls", GRPC_POLL_STRATEGY="poll"),
    _case(
        *("grpc-python-lowat", PYTHON, PYTHON, "calls"),
        GRPC_EXPERIMENTS="tcp_rcv_lowat,tcp_frame_size_tuning",
    ),
    _case("grpc-ruby", PYTHON, RUBY, "calls"),
    _case("grpc-ruby-retires", PYTHON, RUBY, "retire"),
    _case("grpc-ruby-dies", PYTHON, RUBY, "die"),
    _case(
        *("grpc-ruby-server", RUBY, PYTHON, "calls"),
        redirects=False,
        reasons={"zerocopy"},
        remark="a server whose C core knows MSG_ZEROCOPY has SO_ZEROCOPY on its listening sockets",
    ),
)
