# SPDX-License-Identifier: Apache-2.0
"""A container engine that runs nothing. It answers like Docker, and as badly as a test wants."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.daemon import wait_until


def name_id(number: int) -> str:
    """An id of 64 digits."""
    return f"{number:064x}"


class FakeEngine:
    """Listens at `path`. Change `containers` and call `emit` as the engine would."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.url = f"unix://{path}"
        self.version: Any = {"Version": "28.0", "ApiVersion": "1.47", "MinAPIVersion": "1.24"}
        self.containers: dict[str, dict[str, Any]] = {}
        self.own: dict[str, Any] = {}
        """What Podman says in its own words, by what follows "/libpod/"; see become_podman()."""
        self.requests: list[str] = []
        self.methods: set[str] = set()
        self.statuses: dict[str, int] = {}
        """Answer requests whose path ends so with this code."""
        self.hang: set[str] = set()
        """Never answer requests whose path ends so."""
        self.calls: dict[str, Any] = {}
        """Called when a request whose path ends so comes in."""
        self.history: list[bytes] = []
        self.streams: list[queue.SimpleQueue[bytes | None]] = []
        self._held: list[bytes] | None = None
        self._sending = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._released = threading.Event()
        self._server: socketserver.ThreadingUnixStreamServer | None = None
        self.start()

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._released.clear()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                engine._connections.add(self.connection)

            def finish(self) -> None:
                engine._connections.discard(self.connection)
                with contextlib.suppress(OSError):
                    super().finish()

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle()

            def do_GET(self) -> None:
                engine._answer(self)

            do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(self.path, Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As a daemon that ends: the socket is gone, and connections are closed."""
        if self._server is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.cut()
        self._released.set()

    def cut(self) -> None:
        """Close all connections in the middle of whatever they are doing."""
        # Whoever is cut off may be back at once, with a stream that is none of these.
        connections, streams = list(self._connections), list(self.streams)
        for each in connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for stream in streams:
            stream.put(None)

    def become_podman(self) -> None:
        """Whoever connects from now on is told that this is Podman."""
        part = {"Name": "Podman Engine", "Version": "4.3.1", "Details": {"APIVersion": "4.3.1"}}
        self.version = {**self.version, "ApiVersion": "1.41", "Components": [part, {"Name": "Conmon"}]}

    # -- containers ----------------------------------------------------------------------------------------

    def run(self, number: int, *, emit: bool = True, **changes: Any) -> str:
        """Start a container, or change one and tell of it as of a start."""
        identifier = name_id(number)
        pid = changes.pop("pid", 1000 + number)
        known = {
            "name": f"c{number}",
            "labels": {},
            "mode": "default",
            "networks": {"bridge": {}},
            "ports": {},
        }
        known |= changes
        self.containers[identifier] = {
            "Id": identifier,
            "Name": f"/{known['name']}",
            "State": {"Status": "running", "Running": True, "Paused": False, "Pid": pid},
            "Image": "sha256:0",
            "Config": {"Image": "nginx:alpine", "Labels": known["labels"]},
            "HostConfig": {"NetworkMode": known["mode"]},
            "NetworkSettings": {"Networks": known["networks"], "Ports": known["ports"]},
        }
        if emit:
            self.emit("start", identifier)
        return identifier

    def die(self, identifier: str, *, emit: bool = True) -> None:
        self.containers[identifier]["State"] |= {"Status": "exited", "Running": False, "Pid": 0}
        if emit:
            self.emit("die", identifier)

    def remove(self, identifier: str, *, emit: bool = True) -> None:
        self.containers.pop(identifier, None)
        if emit:
            self.emit("destroy", identifier)

    def emit(self, action: str, identifier: str, kind: str = "container") -> None:
        """Send an event to all streams."""
        now = time.time_ns()
        actor: dict[str, Any] = {"ID": identifier, "Attributes": {"name": "x"}}
        if kind == "network":
            actor = {"ID": "9" * 64, "Attributes": {"container": identifier, "type": "bridge"}}
        event = {"Type": kind, "Action": action, "Actor": actor, "time": now // 10**9, "timeNano": now}
        self.send(json.dumps(event).encode() + b"\n")

    def send(self, raw: bytes) -> None:
        """Send anything to all streams."""
        with self._sending:
            self.history.append(raw)
            if self._held is None:
                self._put(raw)
            else:
                self._held.append(raw)

    def _put(self, raw: bytes) -> None:
        for stream in list(self.streams):
            stream.put(raw)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is sent inside the block is sent at its end, in one piece, however long the block takes."""
        self._held = held = []
        try:
            yield
        finally:
            self._held = None
        self._put(b"".join(held))

    def count(self, ending: str) -> int:
        """Requests so far whose path ends so."""
        return sum(urlsplit(each).path.endswith(ending) for each in list(self.requests))

    def wait_for_stream(self) -> None:
        wait_until("somebody asks for events", lambda: self.streams, pause=0.005)

    # -- answers -------------------------------------------------------------------------------------------

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.path)
        self.methods.add(handler.command)
        path = urlsplit(handler.path).path
        query = parse_qs(urlsplit(handler.path).query)
        for ending, call in list(self.calls.items()):
            if path.endswith(ending):
                call()
        if any(path.endswith(ending) for ending in self.hang):
            self._released.wait(30)
            handler.close_connection = True
            return
        for ending, code in self.statuses.items():
            if path.endswith(ending):
                self._write(handler, {"message": f"status {code}\nby order"}, code)
                return
        if "/libpod/" in path:
            found = self.own.get(path.partition("/libpod/")[2])
            self._write(handler, found or {"cause": "no such thing"}, 200 if found else 404)
        elif path.endswith("/version"):
            self._write(handler, self.version)
        elif path.endswith("/containers/json"):
            self._write(
                handler, [self._list(each) for each in list(self.containers.values()) if each["State"]["Pid"]]
            )
        elif path.endswith("/json"):
            found = self.containers.get(path.split("/")[-2])
            self._write(handler, found or {"message": "No such container"}, 200 if found else 404)
        elif path.endswith("/events"):
            self._stream(handler, query)
        else:
            self._write(handler, {"message": "page not found"}, 404)

    def _list(self, found: dict[str, Any]) -> dict[str, Any]:
        return {
            "Id": found["Id"],
            "Names": [found["Name"]],
            "Image": found["Config"]["Image"],
            "Labels": found["Config"]["Labels"],
            "State": "running",
            "Status": f"Up {time.monotonic()} seconds",
            "HostConfig": found["HostConfig"],
            "NetworkSettings": {"Networks": found["NetworkSettings"]["Networks"]},
        }

    def _write(self, handler: BaseHTTPRequestHandler, document: Any, code: int = 200) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        if handler.headers.get("Connection") == "close":
            handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)

    def _stream(self, handler: BaseHTTPRequestHandler, query: dict[str, list[str]]) -> None:
        handler.close_connection = True
        stream: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Whoever has the headers is told of everything from then on.
        with self._sending:
            if "since" in query:
                whole, _, fraction = query["since"][0].partition(".")
                since = int(whole) * 10**9 + int(fraction.ljust(9, "0"))
                for raw in self.history:
                    if json.loads(raw).get("timeNano", 0) >= since:
                        stream.put(raw)
            self.streams.append(stream)
        try:
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.flush()
            while (raw := stream.get()) is not None:
                handler.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
                handler.wfile.flush()
        except OSError:
            pass
        finally:
            self.streams.remove(stream)
