# SPDX-License-Identifier: Apache-2.0
"""gRPC on its C core: a server that gives back what it gets, and clients that make one call after the other.

    rpc.py serve ADDRESS PORT
    rpc.py call ADDRESS PORT CONNECTIONS SECONDS    prints JSON: calls, calls a second, median in us

It takes grpcio, and no protocol compiler: messages are bytes.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from concurrent import futures

import grpc  # type: ignore[import-untyped]

METHOD = "/bench.Echo/Say"
MESSAGE = b"x" * 100
WARM_UP_SECONDS = 0.2
# A call that takes so long is lost.
PATIENCE_SECONDS = 15


class _Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method != METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, _: request)


def serve(address: str, port: int) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    server.add_generic_rpc_handlers((_Echo(),))
    server.add_insecure_port(f"{address}:{port}")
    server.start()
    server.wait_for_termination()


def call(address: str, port: int, number: int, seconds: float) -> dict[str, float]:
    """So many clients, each with a connection of its own."""
    begin = time.perf_counter() + WARM_UP_SECONDS
    end = begin + seconds
    times: list[float] = []

    def work() -> None:
        # Else all channels to one address share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"{address}:{port}", options=options) as channel:
            say = channel.unary_unary(METHOD)
            while (before := time.perf_counter()) < end:
                if say(MESSAGE, timeout=PATIENCE_SECONDS) != MESSAGE:
                    raise ValueError("another message came back")
                if before >= begin:
                    times.append(time.perf_counter() - before)

    with futures.ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(work) for _ in range(number)]:
            done.result()
    if not times:
        raise ValueError("no call ended in time")
    return {
        "calls": len(times),
        "rate": len(times) / seconds,
        "p50_us": 1e6 * statistics.median(times),
    }


def main() -> None:
    what, address, port, *rest = sys.argv[1:]
    if what == "serve":
        serve(address, int(port))
    else:
        threading.stack_size(256 * 1024)
        print(json.dumps(call(address, int(port), int(rest[0]), float(rest[1]))))


if __name__ == "__main__":
    main()
