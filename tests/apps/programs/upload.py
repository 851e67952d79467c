# SPDX-License-Identifier: Apache-2.0
"""A WSGI application that gives the body of a request back piece by piece, while it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# Bytes; ask.py sends as much at a time. gunicorn reads as much from a socket before it gives anything.
PIECE = 1024


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "application/octet-stream")])
    while data := environ["wsgi.input"].read(PIECE):
        yield data
