# SPDX-License-Identifier: Apache-2.0
"""The log: structlog, on stderr, lines for a terminal and JSON for everything else.

Events have fixed snake_case names and carry what varies as keys, so that a log can be searched and counted:

    log.info("generation_attached", cgroup=cgroup.path, programs=5)
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, Protocol, TextIO, cast

from splicer.text import is_terminal, printable

LogFormat = Literal["auto", "console", "json"]

_PATIENCE_S = 0.02


class Logger(Protocol):
    """What the rest of the package needs of a logger; structlog's has it, and so has a list in a test."""

    def debug(self, event: str, /, **keys: object) -> object: ...
    def info(self, event: str, /, **keys: object) -> object: ...
    def warning(self, event: str, /, **keys: object) -> object: ...
    def error(self, event: str, /, **keys: object) -> object: ...
    def exception(self, event: str, /, **keys: object) -> object: ...


class _Unfailing:
    """A stream that never fails: a full disk or a closed pipe is no reason to let go of connections. Nor does
    it wait for long: what finds no room in a pipe that nobody reads is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        try:
            # Around Python's buffer, which would keep what could not be written, and fail once more at exit.
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError):
            self._fd = None

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self._fd is None:
                return self._stream.write(text)
            data = text.encode(errors="backslashreplace")
            # As much as fits into a pipe that can be written to, so this does not block (pipe(7)).
            while data and select.select([], [self._fd], [], _PATIENCE_S)[1]:
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _make_printable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Values may come from anywhere, labels of containers for one: none may drive the terminal."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = "\n".join(printable(line) for line in value.split("\n"))
    return event


def _keep_to_one_line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """On a console, what a value holds must not look like a line of ours. Not every version of structlog
    escapes line breaks (22.3, Debian 12's, does not); JSON has them escaped anyway."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = value.replace("\n", "\\n")
    return event


def configure(
    log_format: LogFormat = "auto",
    *,
    debug: bool = False,
    stream: TextIO | None = None,
    colour: bool = False,
) -> Logger:
    """Return a logger that writes to `stream` (default: stderr).

    `auto` means `console` on a terminal and `json` otherwise. JSON lines hold `timestamp` (ISO 8601, UTC),
    `level`, `event` and the keys of the event. `debug` lets debug events through.
    """
    # Whoever names the type Logger imports this module; only the daemon has a use for the library.
    import structlog

    out = sys.stderr if stream is None else stream
    console = log_format == "console" or (log_format == "auto" and is_terminal(out))
    processors: list[structlog.typing.Processor] = [structlog.processors.add_log_level, _make_printable]
    if console:
        processors += [
            _keep_to_one_line,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=colour, exception_formatter=structlog.dev.plain_traceback),
        ]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            # A path or name that is not UTF-8 must not be able to break the log: escape everything beyond
            # ASCII.
            structlog.processors.JSONRenderer(ensure_ascii=True, default=str),
        ]
    logger = structlog.wrap_logger(
        # A line and its end in one write: those who collect lines, as Podman does, may mix up the parts.
        structlog.WriteLogger(cast(TextIO, _Unfailing(out))),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        cache_logger_on_first_use=False,
    )
    # wrap_logger hands out a lazy proxy; bind() makes the real one, which is also safe to use from threads.
    return cast(Logger, logger.bind())
