# SPDX-License-Identifier: Apache-2.0
"""All cases, in the order in which they run."""

from __future__ import annotations

from apps import cpython, databases, iperf3, languages, rpc, web
from apps.case import Case

CASES: tuple[Case, ...] = (
    *(*cpython.CASES, *web.CASES, *iperf3.CASES, *databases.CASES, *languages.CASES),
    *rpc.CASES,
)
# What `make test` runs too. scripts/setup.sh e2e installs what they need.
CHEAP = (
    *("cpython-test_httplib", "cpython-test_socketserver", "wrk", "curl", "nginx-http1", "haproxy-default"),
    *("haproxy-splice", "redis-benchmark", "python-asyncio"),
    *("grpc-python", "grpc-python-retires", "grpc-python-dies"),
)


def find_cases(pattern: str) -> list[Case]:
    """The case of this name; if there is none, those of the group."""
    exact = [case for case in CASES if case.name == pattern]
    return exact or [case for case in CASES if case.belongs_to(pattern)]
