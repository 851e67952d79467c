# SPDX-License-Identifier: Apache-2.0
"""A terminal's screen for a command that shows something again and again; imports curses.

The terminal is as it was before, however the command ends: by a key, a signal, an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TextIO

from splicer.errors import SplicerError
from splicer.text import is_terminal

# What ends a command from outside. Ctrl-C is a KeyboardInterrupt anyway, and ncurses sees to Ctrl-Z.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
LEAST_LINES, LEAST_COLUMNS = 6, 40
RESIZED = "resized"


def _require_terminal() -> None:
    try:
        termios.tcgetattr(0)
    except termios.error as error:
        raise SplicerError("the terminal is gone") from error


class _EndedError(BaseException):
    """A signal that ends the process has come."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def is_possible(stdout: TextIO, environ: Mapping[str, str]) -> bool:
    """Can a screen be shown, and are there keys to be read?"""
    if environ.get("TERM", "") in ("", "dumb") or not is_terminal(stdout):
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if not sys.stdin.isatty():
            return False
        import curses

        try:
            curses.setupterm(environ["TERM"], stdout.fileno())
        except curses.error:
            return False
        return True
    return False


class Screen:
    """What `opened` gives."""

    def __init__(self, window: Any, curses: Any) -> None:
        self._window = window
        self._curses = curses

    @property
    def size(self) -> tuple[int, int]:
        """Lines and columns."""
        lines, columns = self._window.getmaxyx()
        return int(lines), int(columns)

    def show(self, lines: Sequence[str], heading: int | None = None, footer: str = "") -> None:
        """Show these lines instead of what is there; that of number `heading` stands out, and the footer is
        at the bottom. What does not fit is left out."""
        height, width = self.size
        self._window.erase()
        if height < LEAST_LINES or width < LEAST_COLUMNS:
            self._put(0, f"too small: {LEAST_COLUMNS}x{LEAST_LINES}"[:width], 0)
        else:
            for row, line in enumerate(lines[: height - 1]):
                self._put(row, line[:width], self._curses.A_REVERSE if row == heading else 0)
            self._put(height - 1, footer[: width - 1], self._curses.A_DIM)
        self._window.refresh()

    def _put(self, row: int, text: str, style: int) -> None:
        # The last place of the screen cannot be written to without an error.
        with contextlib.suppress(self._curses.error):
            self._window.addstr(row, 0, text, style)

    def read_key(self, seconds: float) -> str:
        """The key that was pressed within so many seconds, empty if none was, or RESIZED. Raises
        SplicerError if the terminal is gone."""
        self._window.timeout(max(0, int(seconds * 1000)))
        code = self._window.getch()
        if code == self._curses.KEY_RESIZE:
            return RESIZED
        if code == -1 and seconds > 0:
            _require_terminal()
        return chr(code) if 0 <= code < 256 else ""


@contextlib.contextmanager
def opened() -> Iterator[Screen]:
    """A screen of our own. Afterwards the terminal is as it was, and a signal that came to end the process
    does so."""
    import curses

    before = termios.tcgetattr(0)
    handlers = {number: signal.signal(number, _end) for number in _ENDING}
    ended: _EndedError | None = None
    try:
        try:
            window = curses.initscr()
            curses.noecho()
            curses.cbreak()
            window.keypad(True)
            with contextlib.suppress(curses.error):
                curses.curs_set(0)
            yield Screen(window, curses)
        finally:
            # A signal that comes between these lines is as one before.
            for number in _ENDING:
                signal.signal(number, signal.SIG_IGN)
    except _EndedError as error:
        ended = error
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The terminal may be gone.
        with contextlib.suppress(curses.error, OSError):
            curses.endwin()
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        signal.signal(signal.SIGINT, interrupt)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ended is not None:
        signal.signal(ended.number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.number)


def _end(number: int, _frame: FrameType | None) -> None:
    raise _EndedError(number)
