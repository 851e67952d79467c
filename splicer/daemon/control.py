# SPDX-License-Identifier: Apache-2.0
"""The control socket: how `splicer status` and `splicer flows` ask the daemon.

A unix stream socket, <run-dir>/control.sock, mode 0600, for root only. One JSON object on each line, UTF-8:

    request   {"command": "status"}
    reply     {"ok": true, "result": {...}}   or   {"ok": false, "error": "...", "hint": "..." or null}

What has many rows is sent as it is put together: neither side has all of it. Who asks for that gets the rows
in lines of their own, some in each, and a last line with their number, or with what went wrong:

    request   {"command": "flows", "stream": true}
    reply     {"ok": true, "result": {...}, "rows": "flows"}   {"rows": [{...}, ...]}  ...   {"end": 1234}

What goes on until one of the two hangs up (events that are followed) has no last line, and lines without rows
while there is nothing to tell.

Who does not ask gets one line, as for anything else, with the rows in the result under that name.

A connection may carry several requests, one after the other. After a request that is no JSON object or is too
long the server answers and hangs up.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from splicer.errors import FAILURE, NOT_RUNNING, SplicerError
from splicer.host.process import is_stopped
from splicer.logs import Logger

SOCKET_NAME = "control.sock"
REQUEST_LIMIT = 64 * 1024  # bytes
REPLY_LIMIT = 512 * 1024 * 1024  # bytes; a million flows are about 350 MB
PEERS_AT_ONCE = 8
# Commands that only show something, and have an option for how long to wait.
SHOWS = ("status", "flows", "policy", "explain", "events")
# Who hears nothing for so long looks whether the daemon was stopped.
_STOPPED_AFTER_S = 0.5
BACKLOG = 64
# Address of a unix socket: 108 bytes with the closing zero (unix(7)).
_ADDRESS_LIMIT = 107


@dataclass(frozen=True)
class Rows:
    """A result with many rows: what else is in it, the name under which they are, and the rows, some at a
    time. What `waits` takes as long as it likes for a part, and others are answered meanwhile; it may be used
    by several threads. If the parts have a close(), it is called however the answer ends."""

    head: Mapping[str, Any]
    name: str
    parts: Iterable[Sequence[Mapping[str, Any]]]
    waits: bool = False

    def close(self) -> None:
        if (close := getattr(self.parts, "close", None)) is not None:
            close()


Handler = Callable[[dict[str, Any]], Mapping[str, Any] | Rows]


class _RefusedError(Exception):
    """A request that cannot be answered and after which the connection cannot go on."""


class _HungUpError(Exception):
    """An answer that cannot be finished; what went wrong is in the log."""


def socket_path(run_dir: str) -> str:
    """Where the daemon of `run_dir` listens."""
    return os.path.join(run_dir, SOCKET_NAME)


class _Lines:
    """Reads lines from a socket, each within a number of seconds and bytes."""

    def __init__(self, peer: socket.socket, limit: int) -> None:
        self._peer = peer
        self._limit = limit
        self._buffer = bytearray()

    def read(self, timeout: float) -> bytes | None:
        """One line without its newline; None at the end of the stream.

        Raises TimeoutError, another OSError, or _RefusedError for what is too long or ends too early.
        """
        deadline = time.monotonic() + timeout
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._limit:
                break
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self._peer.settimeout(remaining)
            chunk = self._peer.recv(256 * 1024)
            if not chunk:
                if self._buffer:
                    raise _RefusedError("the request ends in the middle of a line")
                return None
            self._buffer += chunk
        if end < 0 or end > self._limit:
            raise _RefusedError(f"the request is longer than {self._limit} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


class Server:
    """Answers requests in threads of its own. A context manager: entering starts it, leaving closes it.

    Handlers are called one at a time, but never in the thread that made the server; what they share with it
    they must guard. A handler takes the request and returns the result, or raises SplicerError to refuse.
    """

    def __init__(
        self,
        run_dir: str,
        handlers: Mapping[str, Handler],
        log: Logger,
        *,
        timeout: float = 5.0,
        allowed_uid: int = 0,
    ) -> None:
        """`timeout`, in seconds, bounds the arrival of one request and the departure of one reply."""
        self.path = socket_path(run_dir)
        self._handlers = dict(handlers)
        self._log = log
        self._timeout = timeout
        self._allowed_uid = allowed_uid
        self._listener: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self._slots = threading.BoundedSemaphore(PEERS_AT_ONCE)
        self._peers: set[socket.socket] = set()
        self._peers_guard = threading.Lock()
        self._closing = threading.Event()

    def start(self) -> None:
        """Listen. Requests are answered from here on. Raises SplicerError when the socket cannot be made."""
        _check_length(self.path)
        remove_stale(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self.path)
            # Nobody can connect between bind() and listen(), so nobody sees the mode the umask gave.
            os.chmod(self.path, 0o600)
            listener.listen(BACKLOG)
            status = os.stat(self.path)
        except OSError as error:
            listener.close()
            raise SplicerError(
                f"cannot listen on the control socket ({self.path}: {error.strerror})"
            ) from error
        self._identity = (status.st_dev, status.st_ino)
        self._listener = listener
        self._thread = threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, hang up on everybody and remove the socket file. Safe to call twice."""
        self._closing.set()
        if self._listener is None:
            return
        # Remove the name only if it is still ours: a successor may have put its own there.
        with contextlib.suppress(OSError):
            status = os.stat(self.path, follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        # close() alone would leave accept() asleep.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._peers_guard:
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._timeout)
        self._listener.close()
        self._listener = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                peer, _ = listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                self._log.warning("control_accept_failed", error=str(error))
                # Out of descriptors, most likely: they come back, and until then there is no use in a busy
                # loop.
                time.sleep(0.1)
                continue
            while not self._slots.acquire(timeout=0.2):
                if self._closing.is_set():
                    peer.close()
                    return
            with self._peers_guard:
                self._peers.add(peer)
            try:
                threading.Thread(target=self._serve, args=(peer,), name="control-peer", daemon=True).start()
            except RuntimeError as error:
                self._log.warning("control_thread_failed", error=str(error))
                self._forget(peer)

    def _forget(self, peer: socket.socket) -> None:
        with self._peers_guard:
            self._peers.discard(peer)
            peer.close()
        self._slots.release()

    def _serve(self, peer: socket.socket) -> None:
        try:
            uid = peer_uid(peer)
            if uid != self._allowed_uid:
                self._log.warning("control_peer_refused", uid=uid)
                self._send(peer, _failure("only root may use the control socket", "run it as root"))
                return
            lines = _Lines(peer, REQUEST_LIMIT)
            while not self._closing.is_set() and (line := lines.read(self._timeout)) is not None:
                with contextlib.closing(self._answer(line)) as parts:
                    for part in parts:
                        self._send(peer, part)
        except _RefusedError as refusal:
            with contextlib.suppress(OSError):
                self._send(peer, _failure(str(refusal), None))
        except _HungUpError:
            pass
        except OSError as error:
            # The peer left or dawdled; its business, not ours.
            self._log.debug("control_peer_lost", error=str(error) or type(error).__name__)
        finally:
            self._forget(peer)

    def _send(self, peer: socket.socket, reply: bytes) -> None:
        peer.settimeout(self._timeout)
        peer.sendall(reply)

    def _answer(self, line: bytes) -> Generator[bytes, None, None]:
        """The reply to a request, in parts that have to leave one by one."""
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise _RefusedError("the request is not valid JSON") from None
        if not isinstance(request, dict):
            raise _RefusedError("the request is not a JSON object")
        command = request.get("command")
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            yield _failure(f"unknown command {json.dumps(command)}", f"commands: {known}")
            return
        is_begun = False
        try:
            with self._turn:
                result = handler(request)
            is_begun = isinstance(result, Rows) and request.get("stream") is not True
            if not isinstance(result, Rows):
                reply = _encode({"ok": True, "result": result})
            else:
                write = self._stream if request.get("stream") is True else self._write_out
                with contextlib.closing(result):
                    reply = yield from write(result)
        except SplicerError as error:
            reply = _failure(error.message, error.hint)
        except Exception as error:  # the daemon outlives a mistake in a handler
            self._log.exception("control_request_failed", command=command)
            if is_begun:
                # In the middle of a line.
                raise _HungUpError from error
            reply = _failure(f"internal error in the daemon ({type(error).__name__})", "see the daemon's log")
        yield reply

    def _take(self, result: Rows) -> Iterator[Sequence[Mapping[str, Any]]]:
        """The rows, some at a time. Others who ask come in between."""
        parts = iter(result.parts)
        turn = contextlib.nullcontext() if result.waits else self._turn
        while True:
            with turn:
                part = next(parts, None)
            if part is None or self._closing.is_set():
                return
            if part or result.waits:
                yield part

    def _stream(self, result: Rows) -> Generator[bytes, None, bytes]:
        """All but the last line, which it returns."""
        yield _encode({"ok": True, "result": result.head, "rows": result.name})
        count = 0
        for part in self._take(result):
            count += len(part)
            yield _encode({"rows": part})
        return _encode({"end": count})

    def _write_out(self, result: Rows) -> Generator[bytes, None, bytes]:
        """The beginning of one long line, and the end, which it returns."""
        whole = _encode({"ok": True, "result": {**result.head, result.name: []}})
        separator, end = whole[: -len(_END_OF_ROWS)], whole[-len(_END_OF_ROWS) :]
        for part in self._take(result):
            yield separator + _encode(part)[1:-2]
            separator = b","
        return end if separator == b"," else whole


# What follows the rows in an answer of one line.
_END_OF_ROWS = b"]}}\n"


def _encode(reply: Mapping[str, object] | Sequence[object]) -> bytes:
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _failure(error: str, hint: str | None) -> bytes:
    return _encode({"ok": False, "error": error, "hint": hint})


def _check_length(path: str) -> None:
    if len(os.fsencode(path)) > _ADDRESS_LIMIT:
        raise SplicerError(
            f"the path of the control socket is too long ({path})",
            hint=f"choose a --run-dir of at most {_ADDRESS_LIMIT - len(SOCKET_NAME) - 1} bytes",
        )


def peer_pid(peer: socket.socket) -> int:
    """Process that made the other end, as this pid namespace sees it; 0 if it does not, or has none."""
    return _read_credentials(peer)[0]


def peer_uid(peer: socket.socket) -> int:
    """User id of the process that connected, as this user namespace sees it (SO_PEERCRED, unix(7))."""
    return _read_credentials(peer)[1]


def _read_credentials(peer: socket.socket) -> tuple[int, int, int]:
    """Process, user and group."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def remove_stale(path: str, what: str = "control socket") -> bool:
    """Remove the socket file at `path` that nobody listens on. True when there was one.

    `what` is what to call it. Raises SplicerError when somebody does listen, or when the file is no socket.
    """
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SplicerError(f"cannot look at the {what} ({path}: {error.strerror})") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise SplicerError(f"a file is in the place of the {what} ({path})", hint=f"look at it: ls -l {path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return True
        except OSError as error:
            if error.errno != errno.EAGAIN and not isinstance(error, TimeoutError):
                raise SplicerError(f"cannot look at the {what} ({path}: {error.strerror})") from error
    raise SplicerError(
        f"another process listens on the {what} ({path})", hint=f"find it with: ss -xlp | grep {path}"
    )


def request(
    run_dir: str,
    command: str,
    fields: Mapping[str, object] | None = None,
    *,
    timeout: float = 10.0,
    patience: float | None = None,
) -> dict[str, object]:
    """Ask the daemon of `run_dir` and return its result. `timeout`, in seconds, is for the whole exchange,
    and `patience` for the time until the answer begins, the same if it is not given. One that is longer
    counts for all of it.

    Raises SplicerError: with exit code 3 when no daemon listens; else with what the daemon said or what went
    wrong.
    """
    with contextlib.closing(_Question(run_dir, command, timeout, patience)) as question:
        return _decode(question.ask(fields or {}), question.path)


def request_rows(
    run_dir: str,
    command: str,
    name: str,
    fields: Mapping[str, object] | None = None,
    *,
    timeout: float = 10.0,
    patience: float | None = None,
    idle: Callable[[], None] | None = None,
) -> tuple[dict[str, object], Iterator[Mapping[str, object]]]:
    """Ask for what has many rows under `name`: the rest of the result, and the rows as they come. `patience`
    is for the time until the answer begins, and `timeout` for each further part. `idle` is called whenever
    the daemon says that there is nothing new.

    Raises SplicerError as `request` does, also as one goes through the rows.
    """
    question = _Question(run_dir, command, timeout, patience)
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(question))
        line = question.ask({**(fields or {}), "stream": True})
        head = _decode(line, question.path)
        if "rows" in _read_object(line):
            opened.pop_all()
            return head, question.read_rows(idle)
    # It knows nothing of streams.
    rows = head.pop(name, None)
    return head, iter([row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else [])


class _Question:
    """One question to the daemon. Raises SplicerError, whatever goes wrong."""

    def __init__(self, run_dir: str, command: str, timeout: float, patience: float | None) -> None:
        self.path = socket_path(run_dir)
        _check_length(self.path)
        self._run_dir = run_dir
        self._command = command
        # How long this waits for what is to come next, and for all of it.
        self._patience = timeout if patience is None else patience
        self._timeout = max(timeout, self._patience)
        self._daemon = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = _Lines(self._daemon, REPLY_LIMIT)

    def close(self) -> None:
        self._daemon.close()

    def ask(self, fields: Mapping[str, object]) -> bytes:
        """Ask, and read the first line of the answer."""
        begun = time.monotonic()
        deadline = begun + self._timeout
        with self._explained():
            self._daemon.settimeout(self._patience)
            _connect(self._daemon, self.path, begun + self._patience)
            # A peer that refuses before it has read leaves the reason for us to read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._daemon.sendall(_encode({**fields, "command": self._command}))
            _await_reply(self._daemon, begun, self._patience)
            line = self._lines.read(max(deadline - time.monotonic(), 0.001))
        return self._require(line)

    def read_rows(self, idle: Callable[[], None] | None = None) -> Iterator[Mapping[str, object]]:
        """The rows that follow the first line; then there is nothing more to ask."""
        count = 0
        self._patience = self._timeout
        with contextlib.closing(self):
            while True:
                with self._explained():
                    line = self._lines.read(self._timeout)
                part = _read_object(self._require(line))
                if isinstance(rows := part.get("rows"), list):
                    if not rows and idle is not None:
                        idle()
                    count += len(rows)
                    yield from rows
                    continue
                if part.get("end") == count:
                    return
                _decode(_encode(part), self.path)
                raise self._cut_off()

    def _require(self, line: bytes | None) -> bytes:
        if line is None:
            raise SplicerError(
                f"the daemon hung up without an answer ({self.path})", hint="it may be stopping; try again"
            )
        return line

    def _cut_off(self) -> SplicerError:
        return SplicerError(
            f"the daemon's answer was cut off ({self.path})", hint="see the daemon's log, then try again"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            raise SplicerError(
                f"not running (run directory {self._run_dir})",
                hint="start it with: splicer run --cgroup /sys/fs/cgroup",
                exit_code=NOT_RUNNING,
            ) from None
        except PermissionError as error:
            raise SplicerError(
                f"no permission to use the control socket ({self.path})",
                hint=f"run it as root: sudo splicer {self._command}",
                exit_code=FAILURE,
            ) from error
        except TimeoutError as error:
            raise _describe_silence(self._daemon, self._patience, self.path, self._command) from error
        except OSError as error:
            raise SplicerError(
                f"cannot talk to the daemon ({self.path}: {error.strerror or error})"
            ) from error
        except _RefusedError as error:
            raise self._cut_off() from error


def _await_reply(daemon: socket.socket, begun: float, patience: float) -> None:
    """Wait until the answer begins. Raises TimeoutError, early of a daemon that was stopped."""
    while (left := begun + patience - time.monotonic()) > 0:
        if select.select([daemon], [], [], min(left, _STOPPED_AFTER_S))[0]:
            return
        if is_stopped(peer_pid(daemon)):
            break
    raise TimeoutError


def _describe_silence(daemon: socket.socket, patience: float, path: str, command: str) -> SplicerError:
    pid = 0
    with contextlib.suppress(OSError):  # it was not even connected
        pid = peer_pid(daemon)
    if pid and is_stopped(pid):
        return SplicerError(
            f"the daemon is stopped, by a signal or a debugger (pid {pid}, {path})",
            hint=f"let it go on: kill -CONT {pid}; what is spliced is redirected meanwhile",
        )
    who = f"pid {pid}, {path}" if pid else path
    return SplicerError(
        f"the daemon did not answer within {patience:g} seconds ({who})",
        hint=f"it may be busy, try again, or wait longer: splicer {command} --timeout 30"
        if command in SHOWS
        else "it may be busy, try again; see its log",
    )


def _connect(daemon: socket.socket, path: str, deadline: float) -> None:
    while True:
        try:
            return daemon.connect(path)
        except BlockingIOError:
            # A unix socket with a full backlog does not wait, unlike TCP, when the caller has set a timeout.
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(0.02)


def _read_object(line: bytes) -> dict[str, Any]:
    """Empty if it is no JSON object."""
    try:
        reply = json.loads(line)
    except ValueError:
        return {}
    return reply if isinstance(reply, dict) else {}


def _decode(line: bytes, path: str) -> dict[str, object]:
    reply = _read_object(line)
    result, error, hint = reply.get("result"), reply.get("error"), reply.get("hint")
    if reply.get("ok") is True and isinstance(result, dict):
        return result
    if reply.get("ok") is False and isinstance(error, str):
        raise SplicerError(error, hint=hint if isinstance(hint, str) else None)
    raise SplicerError(
        f"what answers on the control socket is no splicer ({path})",
        hint=f"find it with: ss -xlp | grep {path}",
    )
