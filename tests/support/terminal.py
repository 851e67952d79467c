# SPDX-License-Identifier: Apache-2.0
"""A terminal of the test's own with a process on it, as a person would have it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from support.daemon import environment, wait_until
from support.pauses import Stopwatch


class Terminal:
    """What is shown on it is collected as it comes, with all that moves the cursor."""

    def __init__(self, command: Sequence[str], lines: int, columns: int, **changes: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(lines, columns)
        self.before = self.attributes()
        self.shown = b""
        kept = {
            name: value for name, value in environment(**changes).items() if name not in ("LINES", "COLUMNS")
        }
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd="/",
            env={"TERM": "xterm", **kept} | changes,
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C and a change of size get there.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def attributes(self) -> list[Any]:
        """All that stty(1) shows."""
        return termios.tcgetattr(self.slave)

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read(self, seconds: float = 0.05) -> bytes:
        """What has come since the last time."""
        fresh = b""
        while select.select([self.master], [], [], seconds)[0]:
            fresh += os.read(self.master, 1 << 16)
            seconds = 0.0
        self.shown += fresh
        return fresh

    def wait_for(self, text: str, timeout: float = 10.0) -> bytes:
        """Read until this is shown, from here on; returns what was read."""
        seen = b""
        with Stopwatch() as watch:
            while text.encode() not in seen:
                seen += self.read()
                assert watch.seconds < timeout, f"{text!r} was not shown: {seen.decode(errors='replace')!r}"
        return seen

    def end(self, timeout: float = 10.0) -> int:
        """Wait for the process, and read on meanwhile; its exit code."""

        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        wait_until("the process has ended", ended, timeout)
        self.read()
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def on_terminal(
    command: Sequence[str], *, lines: int = 24, columns: int = 100, **changes: str
) -> Iterator[Terminal]:
    """Run it there; `changes` are for its environment."""
    terminal = Terminal(command, lines, columns, **changes)
    try:
        yield terminal
    finally:
        terminal.close()
