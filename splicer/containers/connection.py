# SPDX-License-Identifier: Apache-2.0
"""How the connection to the engine stands: what `splicer status` says of it, and the log."""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

from splicer.logs import Logger

State = Literal["connected", "absent", "lost", "off"]


class ConnectionState:
    """What is known of the connection, and since when. The watcher's thread tells, any thread may ask."""

    def __init__(self, docker: str, log: Logger, guard: threading.Condition) -> None:
        """`docker` is "auto", "off" or an address. `guard` is held while the state is changed or read."""
        self._log = log
        self._guard = guard
        self._state: State = "off" if docker == "off" else "absent"
        self._since = time.monotonic()
        self._endpoint = "" if docker in ("auto", "off") else docker
        self._error = ""
        # The watcher's thread's own.
        self.was_connected = False
        self._complaint = ""

    @property
    def endpoint(self) -> str:
        """Where the engine listens, or listened last; empty if none was found."""
        return self._endpoint

    def note_endpoint(self, endpoint: str) -> None:
        """Somebody listens there, and is asked next."""
        with self._guard:
            self._endpoint = endpoint

    def note_connected(self, containers: int) -> None:
        """The engine has told of all its containers."""
        self.was_connected = True
        self._complaint = ""
        if self._set_state("connected"):
            self._log.info("docker_connected", endpoint=self._endpoint, containers=containers)

    def note_lost(self, kind: str, error: str) -> None:
        """There is none, or no more. `kind` is that of the EngineError."""
        self._set_state("lost" if self.was_connected else "absent", error)
        # Once for each outage, and again if its reason is one that somebody has to do something about.
        complaint = "refused" if kind == "refused" else "gone"
        if complaint != self._complaint:
            self._complaint = complaint
            if self.was_connected:
                self._log.warning("docker_lost", endpoint=self._endpoint, error=error)
            else:
                self._log.warning("docker_absent", endpoint=self._endpoint, error=error)

    def _set_state(self, state: State, error: str = "") -> bool:
        with self._guard:
            changed = state != self._state
            if changed:
                self._state, self._since = state, time.monotonic()
            self._error = error
            return changed

    def describe(self, containers: int) -> dict[str, Any]:
        """For `splicer status`."""
        with self._guard:
            return {
                "state": self._state,
                "endpoint": self._endpoint,
                "containers": containers,
                "since_seconds": round(time.monotonic() - self._since, 3),
                "error": self._error,
            }
