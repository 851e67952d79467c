# SPDX-License-Identifier: Apache-2.0
"""gRPC without generated code: messages are bytes. rpc.rb does the same, call for call.

rpc.py serve ADDRESS PORT
rpc.py ask ADDRESS PORT calls|retire|die SECONDS

`ask` prints what came of each step, as JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SIZES = (0, 1, 17, 300, 4096, 16_384, 70_000)
LARGE = 4 << 20
WARM = 300  # calls; by then it is spliced, if it ever is
PATIENCE = 60.0  # seconds


def make(size: int, seed: int) -> bytes:
    """The same bytes in every language."""
    block = bytes((seed * 31 + at * 7) & 255 for at in range(min(size, 1 << 12)))
    return (block * (size // max(len(block), 1) + 1))[:size]


# -- the server ----------------------------------------------------------------------------------------------


class Service(grpc.GenericRpcHandler):
    """What the server can do; each call is named like its method."""

    def __init__(self) -> None:
        self.retire = threading.Event()
        self._cancelled = itertools.count()
        self._guard = threading.Lock()
        self._ended = 0

    def service(self, details: Any) -> Any:
        return {
            "/splicer.Test/Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "/splicer.Test/Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "/splicer.Test/Sleep": grpc.unary_unary_rpc_method_handler(self.sleep),
            "/splicer.Test/Ended": grpc.unary_unary_rpc_method_handler(self.ended),
            "/splicer.Test/Retire": grpc.unary_unary_rpc_method_handler(self.go),
            "/splicer.Test/Die": grpc.unary_unary_rpc_method_handler(self.die),
            "/splicer.Test/Collect": grpc.stream_unary_rpc_method_handler(self.collect),
            "/splicer.Test/Produce": grpc.unary_stream_rpc_method_handler(self.produce),
            "/splicer.Test/Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }.get(details.method)

    def echo(self, request: bytes, _context: Any) -> bytes:
        return request

    def fail(self, _request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as it was asked to")
        raise AssertionError

    def sleep(self, _request: bytes, context: Any) -> bytes:
        while context.is_active():
            time.sleep(0.005)
        return b""

    def ended(self, _request: bytes, _context: Any) -> bytes:
        return str(self._ended).encode()

    def go(self, _request: bytes, _context: Any) -> bytes:
        self.retire.set()
        return b""

    def die(self, _request: bytes, _context: Any) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    def collect(self, requests: Iterator[bytes], _context: Any) -> bytes:
        found = hashlib.sha256()
        for each in requests:
            found.update(each)
        return found.hexdigest().encode()

    def produce(self, request: bytes, context: Any) -> Iterator[bytes]:
        """`COUNT SIZE`: so many messages; a count of 0 means no end."""
        count, size = map(int, request.split())
        if not count:
            context.add_callback(self._note_end)
        for number in range(count) if count else itertools.count():
            yield make(size, number)

    def _note_end(self) -> None:
        with self._guard:
            self._ended += 1

    def chat(self, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        yield from requests


def serve(target: str) -> None:
    """Until somebody calls Retire; the calls that run then are waited for, and the clients get a GOAWAY."""
    service = Service()
    server = grpc.server(ThreadPoolExecutor(30), (service,), options=[*OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_insecure_port(target)
    server.start()
    service.retire.wait()
    server.stop(PATIENCE).wait()


# -- the client ----------------------------------------------------------------------------------------------


class Client:
    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target, options=OPTIONS)
        self.facts: dict[str, Any] = {}

    def call(self, method: str, request: bytes = b"", timeout: float = PATIENCE) -> bytes:
        done: bytes = self.channel.unary_unary(f"/splicer.Test/{method}")(
            request, timeout=timeout, wait_for_ready=True
        )
        return done

    def name_error(self, method: str, timeout: float = PATIENCE) -> str:
        """What a call that must not succeed ends with."""
        try:
            self.channel.unary_unary(f"/splicer.Test/{method}")(b"", timeout=timeout)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def warm_up(self) -> None:
        for number in range(WARM):
            if self.call("Echo", make(64, number)) != make(64, number):
                raise SystemExit("an answer is wrong")

    def measure(self, seconds: float) -> float:
        """Calls per second, one after the other."""
        start, count = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            self.call("Echo", b"?")
            count += 1
        return round(count / (time.monotonic() - start))

    def chat(self) -> tuple[Any, queue.SimpleQueue[bytes | None]]:
        """A call that goes on until None is put into the queue."""
        questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        return self.channel.stream_stream("/splicer.Test/Chat")(iter(questions.get, None)), questions

    def talk(self, answers: Any, questions: queue.SimpleQueue[bytes | None], rounds: int) -> int:
        """How many of so many messages came back as they went."""
        right = 0
        for number in range(rounds):
            message = make(SIZES[number % len(SIZES)], number)
            questions.put(message)
            right += next(answers) == message
        return right

    # steps

    def ask_unary(self) -> None:
        right = sum(
            self.call("Echo", make(SIZES[n % len(SIZES)], n)) == make(SIZES[n % len(SIZES)], n)
            for n in range(200)
        )
        self.facts["unary"] = right
        self.facts["large"] = sum(self.call("Echo", make(LARGE, n)) == make(LARGE, n) for n in range(6))

    def ask_in_parallel(self) -> None:
        def ask(number: int) -> bool:
            size = random.Random(number).choice(SIZES)
            return self.call("Echo", make(size, number)) == make(size, number)

        with ThreadPoolExecutor(8) as pool:
            self.facts["parallel"] = sum(pool.map(ask, range(400)))

    def stream(self) -> None:
        for name, count, size in (("small", 400, 100), ("medium", 200, 10_000), ("huge", 6, LARGE)):
            sent = [make(size, number) for number in range(count)]
            collect = self.channel.stream_unary("/splicer.Test/Collect")
            right = collect(iter(sent)).decode() == hashlib.sha256(b"".join(sent)).hexdigest()
            produce = self.channel.unary_stream("/splicer.Test/Produce")
            got = list(produce(b"%d %d" % (count, size)))
            self.facts[f"streams-{name}"] = [right, got == sent]
        answers, questions = self.chat()
        self.facts["chat"] = self.talk(answers, questions, 200)
        questions.put(None)
        self.facts["chat-ended"] = [len(list(answers)), answers.code().name]

    def cancel(self) -> None:
        """In the middle of streams that never end; the server has to hear of each."""
        codes = []
        for number in range(10):
            answers = self.channel.unary_stream("/splicer.Test/Produce")(b"0 5000")
            right = [next(answers) == make(5000, at) for at in range(number + 1)]
            answers.cancel()
            codes.append([all(right), answers.code().name])
        self.facts["cancelled"] = codes
        deadline = time.monotonic() + PATIENCE
        while self.call("Ended") != b"10" and time.monotonic() < deadline:
            time.sleep(0.01)
        self.facts["ended"] = self.call("Ended").decode()
        self.facts["overdue"] = [self.name_error("Sleep", 0.05) for _ in range(5)]
        self.facts["failed"] = [self.name_error("Fail") for _ in range(5)]

    def outlive(self, last: str) -> None:
        """A call goes on when the server is told to retire (it goes on, no other begins) or dies."""
        answers, questions = self.chat()
        self.facts["before"] = self.talk(answers, questions, 100)
        if last == "retire":
            self.call("Retire")
            deadline = time.monotonic() + PATIENCE
            # One that comes as the server stops may be cancelled.
            while (code := self.name_error("Echo")) in ("OK", "CANCELLED") and time.monotonic() < deadline:
                time.sleep(0.01)
            self.facts["refused"] = code
            self.facts["after"] = self.talk(answers, questions, 200)
            questions.put(None)
            self.facts["ended"] = [len(list(answers)), answers.code().name]
        else:
            self.facts["died"] = self.name_error("Die")
            try:
                next(answers)
            except grpc.RpcError:
                self.facts["ended"] = answers.code().name
            questions.put(None)


def ask(target: str, what: str, seconds: float) -> None:
    client = Client(target)
    client.warm_up()
    measures = {}
    if what == "calls":
        measures["calls per second"] = client.measure(seconds)
        client.ask_unary()
        client.ask_in_parallel()
        client.stream()
        client.cancel()
    else:
        client.outlive(what)
    client.channel.close()
    print(json.dumps({"facts": client.facts, "measures": measures}))


if sys.argv[1] == "serve":
    serve(f"{sys.argv[2]}:{sys.argv[3]}")
else:
    ask(f"{sys.argv[2]}:{sys.argv[3]}", sys.argv[4], float(sys.argv[5]))
