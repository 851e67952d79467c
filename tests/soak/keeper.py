# SPDX-License-Identifier: Apache-2.0
"""Starts and ends the daemon, and keeps account of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from support.daemon import ControlError, call
from support.host import Host

from soak.findings import Findings
from soak.watch import Watch


class Keeper:
    """`wanted`: a daemon that is not there has died by itself. `count_stopped` says how many workers cannot
    read at the moment."""

    def __init__(
        self,
        host: Host,
        watch: Watch,
        findings: Findings,
        note: Callable[[str], None],
        count_stopped: Callable[[], int],
    ) -> None:
        self.wanted = False
        self._host = host
        self._watch = watch
        self._findings = findings
        self._note = note
        self._count_stopped = count_stopped
        # Since when there has been none, and readers may wait for the next one.
        self._missed_since = 0.0

    @property
    def alive(self) -> bool:
        return self._host.has_run and self._host.daemon.alive

    def start(self) -> None:
        """Start one if there is none."""
        self.wanted = True
        if self.alive:
            return
        self._host.start()
        self._note("started")
        if self._missed_since:
            self._findings.no_daemon.append((self._missed_since, time.monotonic()))
            self._missed_since = 0.0

    def stop(self) -> None:
        """SIGTERM: it drains what can be drained, and takes itself out."""
        self.wanted = False
        if not self.alive:
            return
        self._watch.sample()
        daemon, began = self._host.daemon, time.monotonic()
        stopped = self._count_stopped()
        code = daemon.stop()
        if code:
            self._findings.daemon_deaths.append(f"stop: {code}\n{daemon.tail(30)}")
        unread = read_unread(daemon.log)
        self._findings.stops += 1
        self._findings.stops_while_stopped += bool(stopped)
        self._findings.unread += unread
        if unread:
            self._missed_since = began
        self._note(f"stopped in {time.monotonic() - began:.1f} s, {stopped} workers stopped, {unread} unread")
        self._watch.end_generation()

    def kill(self) -> None:
        """SIGKILL."""
        self.wanted = False
        self._watch.sample()
        self._missed_since = self._missed_since or time.monotonic()
        self._host.daemon.kill()

    def unload(self) -> None:
        """Take out what a daemon that was killed has left."""
        done = call("unload", f"--run-dir={self._host.run_dir}", f"--pin-dir={self._host.pin_dir}")
        if done.code:
            self._findings.daemon_deaths.append(f"unload: {done}")
        self._watch.end_generation()

    def revive(self) -> None:
        """Start it again, and complain, if it died although nobody wanted it to."""
        if self.wanted and self._host.has_run and not self._host.daemon.alive:
            daemon = self._host.daemon
            self._findings.daemon_deaths.append(f"ended with {daemon.process.returncode}:\n{daemon.tail(30)}")
            self.start()

    def reload(self, text: str) -> None:
        """Another configuration, for this daemon or the next."""
        self._host.config.write_text(text)
        if self.alive:
            try:
                self._host.reload(text)
            except AssertionError as error:
                self._findings.daemon_deaths.append(f"no reload: {error}\n{self._host.daemon.tail(30)}")

    def drain(self) -> None:
        if self.alive:
            with contextlib.suppress(OSError, ControlError):
                self._host.daemon.drain()


def read_unread(log: Path) -> int:
    """How many connections the last orderly stop left with unread bytes, by the daemon's log."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record.get("event") == "drained":
                return int(record.get("unread_connections", 0))
    return 0
