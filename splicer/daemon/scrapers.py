# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of the endpoint: a thread for each who asks, few at once, and a time limit for all.

A module of its own because what it imports takes 2 MB, and by default nobody asks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from splicer.logs import Logger

SCRAPERS_AT_ONCE = 4
# From the connection to the last byte of the answer.
_EXCHANGE_S = 10.0
# How often it is looked for those who take longer.
_PAUSE_S = 0.2
_TEXT = "text/plain; charset=utf-8"

Answer = Callable[[str, str], tuple[int, str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    server: Server
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


class Server(socketserver.TCPServer):
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
