# SPDX-License-Identifier: Apache-2.0
"""Serves /metrics, /healthz and /readyz over HTTP, to this host alone.

Who is slow, in asking or in listening, is cut off. The daemon's loop never waits for any of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from splicer.daemon.control import remove_stale
from splicer.errors import SplicerError
from splicer.logs import Logger
from splicer.metrics import page
from splicer.metrics.address import Address, parse

if TYPE_CHECKING:
    from .scrapers import Server

_TEXT = "text/plain; charset=utf-8"
_PATHS = ("/metrics", "/healthz", "/readyz")


@dataclass(frozen=True)
class Source:
    """What there is to tell. `render` takes the header Accept and gives content type and text; `find_trouble`
    and `find_hindrance` say why this is not healthy, and not ready; empty if it is."""

    render: Callable[[str], tuple[str, bytes]]
    find_trouble: Callable[[], str]
    find_hindrance: Callable[[], str]


class Endpoint:
    """A context manager: entering listens, leaving hangs up on everybody. Off, it does nothing."""

    def __init__(self, where: str, log: Logger) -> None:
        """`where` is the setting `metrics`."""
        self._address = parse(where)
        self._log = log
        self._server: Server | None = None
        self._source: Source | None = None
        # Held while the source is asked: it lasts until nobody is.
        self._guard = threading.Lock()

    @property
    def is_on(self) -> bool:
        return self._address is not None

    def __enter__(self) -> Endpoint:
        if self._address is not None:
            page.require()
            self._server = _listen(self._address, self._answer, self._log)
            self._server.begin()
            self._log.info("metrics_served", address=str(self._address))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None and self._address is not None:
            self._server.end(self._address.path)
            self._server = None

    @contextlib.contextmanager
    def serving(self, source: Source) -> Iterator[None]:
        """Inside the block there is something to tell."""
        self._source = source
        try:
            yield
        finally:
            with self._guard:
                self._source = None

    def _answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and text for a request."""
        if path not in _PATHS:
            return 404, _TEXT, f"there are {', '.join(_PATHS)}\n".encode()
        source = self._source
        if source is None:
            return 503, _TEXT, b"starting, or stopping\n"
        if path == "/healthz":
            return _judge(source.find_trouble())
        if path == "/readyz":
            return _judge(source.find_hindrance() or source.find_trouble())
        with self._guard:
            if self._source is not source:
                return 503, _TEXT, b"stopping\n"
            return 200, *source.render(accept)


def _judge(complaint: str) -> tuple[int, str, bytes]:
    return (503 if complaint else 200), _TEXT, f"{complaint or 'ok'}\n".encode()


def _listen(address: Address, answer: Callable[[str, str], tuple[int, str, bytes]], log: Logger) -> Server:
    """Raises SplicerError, with exit code 1, if it cannot be listened there."""
    from .scrapers import Server

    try:
        if address.path:
            remove_stale(address.path, "metrics socket")
            return Server(socket.AF_UNIX, address.path, answer, log)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return Server(family, (address.host, address.port), answer, log)
    except OSError as error:
        hint = None
        if error.errno == errno.EADDRINUSE:
            hint = f"find out who has it: ss -tlnp | grep :{address.port}; or choose another with --metrics"
        elif address.path:
            hint = f"its directory has to be there, and writable: ls -ld {os.path.dirname(address.path)}"
        raise SplicerError(
            f"cannot serve metrics there ({address}: {error.strerror or error})", hint=hint
        ) from error
