# SPDX-License-Identifier: Apache-2.0
"""Serves /metrics, /healthz and /readyz over HTTP, to this host alone.

One thread accepts, and there is one for each who asks, few at once. Who is slow, in asking or in listening,
is cut off. The daemon's loop never waits for any of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

from splicer.daemon.control import remove_stale
from splicer.errors import SplicerError
from splicer.logs import Logger
from splicer.metrics import page
from splicer.metrics.address import Address, parse

SCRAPERS_AT_ONCE = 4
# From the connection to the last byte of the answer.
_EXCHANGE_S = 10.0
# How often it is looked for those who take longer.
_PAUSE_S = 0.2
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
        self._server: _Server | None = None
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


Answer = Callable[[str, str], tuple[int, str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _EXCHANGE_S

    def do_GET(self) -> None:
        try:
            status, kind, text = self.server.answer(
                self.path.partition("?")[0], self.headers.get("Accept", "")
            )
        except Exception:  # the daemon outlives a mistake in a number
            self.server.log.exception("metrics_failed")
            status, kind, text = 500, _TEXT, b"internal error, see the daemon's log\n"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_HEAD = do_GET

    def version_string(self) -> str:
        return "splicer"

    def log_message(self, *_: object) -> None:
        pass


class _Server(socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, family: int, where: Any, answer: Answer, log: Logger) -> None:
        self.address_family = family
        self.answer = answer
        self.log = log
        self._slots = threading.BoundedSemaphore(SCRAPERS_AT_ONCE)
        self._peers: dict[Any, float] = {}
        self._peers_guard = threading.Lock()
        self._closing = False
        self._identity: tuple[int, int] | None = None
        super().__init__(where, _Handler)
        if family == socket.AF_UNIX:
            # As open as a loopback port is: who may come here is up to the directory.
            os.chmod(where, 0o666)
            status = os.stat(where)
            self._identity = (status.st_dev, status.st_ino)

    def begin(self) -> None:
        threading.Thread(target=self.serve_forever, args=(_PAUSE_S,), name="metrics", daemon=True).start()

    def end(self, path: str) -> None:
        """Stop listening, hang up, remove the file at `path` if it is ours."""
        self._closing = True
        self._cut_off(time.monotonic() + _EXCHANGE_S)
        self.shutdown()
        self.server_close()
        if path:
            with contextlib.suppress(OSError):
                status = os.stat(path, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(path)

    def process_request(self, request: Any, client_address: Any) -> None:
        while not self._slots.acquire(timeout=_PAUSE_S):
            self.service_actions()
            if self._closing:
                return self.shutdown_request(request)
        with self._peers_guard:
            self._peers[request] = time.monotonic()
        try:
            threading.Thread(
                target=self._serve, args=(request, client_address), name="metrics-peer", daemon=True
            ).start()
        except RuntimeError as error:
            self.log.warning("metrics_thread_failed", error=str(error))
            self._forget(request)

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as error:
            # It left or dawdled; its business, not ours.
            self.log.debug("metrics_peer_lost", error=str(error) or type(error).__name__)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._peers_guard:
            self._peers.pop(request, None)
            self.shutdown_request(request)
        self._slots.release()

    def service_actions(self) -> None:
        self._cut_off(time.monotonic())

    def _cut_off(self, now: float) -> None:
        with self._peers_guard:
            for peer, since in self._peers.items():
                if now - since >= _EXCHANGE_S:
                    with contextlib.suppress(OSError):
                        peer.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log.exception("metrics_accept_failed")


def _listen(address: Address, answer: Answer, log: Logger) -> _Server:
    """Raises SplicerError, with exit code 1, if it cannot be listened there."""
    try:
        if address.path:
            remove_stale(address.path, "metrics socket")
            return _Server(socket.AF_UNIX, address.path, answer, log)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return _Server(family, (address.host, address.port), answer, log)
    except OSError as error:
        hint = None
        if error.errno == errno.EADDRINUSE:
            hint = f"find out who has it: ss -tlnp | grep :{address.port}; or choose another with --metrics"
        elif address.path:
            hint = f"its directory has to be there, and writable: ls -ld {os.path.dirname(address.path)}"
        raise SplicerError(
            f"cannot serve metrics there ({address}: {error.strerror or error})", hint=hint
        ) from error
