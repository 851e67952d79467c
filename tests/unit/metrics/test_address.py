# SPDX-License-Identifier: Apache-2.0
"""Loopback or a Unix socket, and nothing else."""

from __future__ import annotations

import pytest

from splicer.metrics.address import Address, is_accepted, parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("off", None),
        ("127.0.0.1:9469", Address("127.0.0.1", 9469)),
        ("127.8.9.10:65535", Address("127.8.9.10", 65535)),
        ("localhost:1", Address("127.0.0.1", 1)),
        ("[::1]:9469", Address("::1", 9469)),
        ("/run/splicer/metrics.sock", Address(path="/run/splicer/metrics.sock")),
    ],
)
def test_accepted(text: str, address: Address | None) -> None:
    assert parse(text) == address
    assert is_accepted(text)
    if address and "localhost" not in text:
        assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "on", "9469", ":9469", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536"),
        *("127.0.0.1:-1", "127.0.0.1:+80", "127.0.0.1: 80", "127.0.0.1:http", "127.0.0.1:\u0661"),
        *("0.0.0.0:9469", "10.0.0.1:9469", "[::]:9469", "[fe80::1]:9469", "::1:9469", "example.org:9469"),
        *("[::ffff:10.0.0.1]:9469", "run/metrics.sock", "/run/", "/" + "x" * 107, "/run/a\nb"),
    ],
)
def test_refused(text: str) -> None:
    assert not is_accepted(text)


def test_what_is_no_text_is_refused() -> None:
    assert not is_accepted(9469) and not is_accepted(True)
