# SPDX-License-Identifier: Apache-2.0
"""The one exception for failures we expect, exit codes of the command line, and what several hints name."""

from __future__ import annotations

OK = 0
FAILURE = 1
USAGE = 2
NOT_RUNNING = 3
UNSUPPORTED = 4
INTERRUPTED = 130

# By their upstream versions; see docs/kernels.md. Those of class B and C:
COUNTING = "Linux 6.6.128, 6.12.75, 6.18.14 or a later one of these lines, or 6.19 or later"
KERNELS = f"Linux 6.1 or later as distributions build it, or {COUNTING}"


class SplicerError(Exception):
    """A failure whose cause is known well enough to say it in one line.

    `message` names what failed and the object it failed on. `hint` is the next thing to do, best of all a
    command. `exit_code` is what the process exits with when nobody handles the error.
    """

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def lines(self) -> list[str]:
        """What is printed on stderr: one line of message and, where there is one, one line of hint."""
        shown = [f"splicer: {self.message}"]
        if self.hint:
            shown.append(f"hint: {self.hint}")
        return shown
