# SPDX-License-Identifier: Apache-2.0
"""The probes: functions that use a connection as applications do, each through a `Scene`.

A probe says in its docstring what an application relies on. It knows nothing of splicing, must be
deterministic on plain TCP (the suite plays it twice and compares), and leaves the connection as it likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODULES = (
    "beginnings",
    "reading",
    "readiness",
    "uring",
    "detours",
    "limits",
    "sending",
    "streams",
    "endings",
    "options",
    "in_queue",
    "processes",
    "sleepless",
    "unspliced",
)


@dataclass(frozen=True)
class Probe:
    """A probe and how it wants to be played."""

    name: str
    play: Callable[..., None]
    # Client and server sockets block. One with a reason is never spliced.
    blocking: tuple[bool, bool] = (False, False)
    # Options [level, option, value] of the client's socket before connect(2), and of the server's after
    # accept(2).
    options: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
    # Why a connection of this kind is never spliced, as `splicer flows` has it.
    reason: str = ""
    # False where nothing is sent, or nothing that may be redirected.
    redirects: bool = True
    # At most so many moments are tried, spread evenly: for probes that take their time.
    cuts: int = 5
    # How often it is drained by the operator: at so many moments, and again and again so many times.
    drains: int = 2
    storms: int = 1
    port: int = 0
    # Without TCP_NODELAY. It is set otherwise, for then plain TCP needs no delayed ACK to go on.
    nagle: bool = False
    # How the connection is made hot: the reads a server does in these rounds are its style.
    heat: Callable[..., None] | None = None
    mptcp: bool = False
    # Whose socket ("client" or "server") has a bound on its memory, which the probe finds in `Scene.memory`.
    bound: str = ""


PROBES: dict[str, Probe] = {}


def probe(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a probe under its own name."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        assert function.__name__ not in PROBES, function.__name__
        assert function.__doc__, f"{function.__name__} does not say what an application relies on"
        PROBES[function.__name__] = Probe(function.__name__, function, **settings)
        return function

    return register


def load() -> dict[str, Probe]:
    """Every probe by name."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return PROBES
