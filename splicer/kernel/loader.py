# SPDX-License-Identifier: Apache-2.0
"""The child that compiles and loads (compiler.py), as its parent sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splicer.errors import FAILURE, SplicerError

_LOAD_TIMEOUT_S = 120


@dataclass(frozen=True)
class Rehearsal:
    """What came of loading everything, and letting go of it again.

    `refused`: the programs that the kernel refuses, and how that is said, with a hint. `answered`: the class
    that sockets of splicer's would see where the programs are attached that answer FIONREAD; empty if they
    are not to be, or cannot be, and then `unanswered` says why not.
    """

    refused: Mapping[str, tuple[str, str]]
    answered: str = ""
    unanswered: str = ""


def call(request: Mapping[str, Any], lock: int | None = None) -> dict[str, Any]:
    """The child's reply to a request; see compiler.py. Raises SplicerError if it has none."""
    # -P keeps the working directory out of the child's module path.
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "splicer.kernel.compiler"],
            input=json.dumps({**request, "parent": os.getpid()}),
            pass_fds=() if lock is None else (lock,),
            capture_output=True,
            text=True,
            timeout=_LOAD_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except subprocess.TimeoutExpired:
        raise SplicerError(f"the loader did not come to an end within {_LOAD_TIMEOUT_S} s") from None
    try:
        reply: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise SplicerError(f"the loader failed (exit code {child.returncode}): {last}") from None
    return reply


def check(reply: Mapping[str, Any]) -> None:
    """Raise SplicerError if the reply says that it did not work."""
    if not reply["ok"]:
        raise SplicerError(
            reply["error"], hint=reply.get("hint"), exit_code=int(reply.get("exit_code", FAILURE))
        )


def rehearse(max_connections: int, *, answer: bool) -> Rehearsal:
    """Load all programs as `splicer run` would, with those that answer FIONREAD if `answer`. Pins nothing,
    and attaches nothing but those, for a moment. Takes as long as a start.

    Raises SplicerError if they do not compile, or something else is missing.
    """
    reply = call({"rehearse": True, "max_connections": max_connections, "answer": answer})
    check(reply)
    refused = {name: (str(error), str(hint or "")) for name, (error, hint) in reply["refused"].items()}
    return Rehearsal(refused, reply["answered"], reply["unanswered"])
