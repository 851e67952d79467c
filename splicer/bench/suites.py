# SPDX-License-Identifier: Apache-2.0
"""Which suites there are. Light: a help text needs no more than this."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splicer.bench.suite import Findings, Workshop

DEFAULT = "wrk"


@dataclass(frozen=True)
class Suite:
    """`module` is one of this room; without it the suite is a group of workloads, and has lines of a table
    for them if it is `tabular`. `selects`: it is a module, and has workloads all the same. If it `compares`
    plain and spliced, there are verdicts and pictures."""

    name: str
    summary: str
    module: str = ""
    tabular: bool = False
    compares: bool = True
    selects: bool = False

    def run(self, workshop: Workshop) -> Findings:
        """Measure. Raises SplicerError, KeyboardInterrupt."""
        if self.module:
            findings: Findings = importlib.import_module(f"splicer.bench.{self.module}").run(workshop)
        else:
            chains = importlib.import_module("splicer.bench.chains")
            findings = chains.run(workshop, self.name, tabular=self.tabular)
        return findings


_ALL = (
    Suite("wrk", "wrk on nginx: keep-alive, a connection per request, through a proxy"),
    Suite("matrix", "one connection: ping-pong and stream by size of message", tabular=True),
    Suite("apps", "programs with loads of their own, those that are installed", tabular=True),
    Suite("plain", "what stays plain, and has to cost nothing: refused, off, remote"),
    Suite("adopt", "how soon busy connections are spliced", "adopting", compares=False),
    Suite("scale", "1 000 to 100 000 connections: memory, CPU, cost of each step", "scale", compares=False),
    Suite("streams", "streams that are always redirected, by size", tabular=True),
    Suite("naive", "what a program that always redirects would give", "naive", selects=True),
    Suite("tap", "what splicer tap costs those whom it taps", "tapping"),
    Suite("relays", "Varnish, lighttpd and socat in front of nginx"),
    Suite("lives", "nginx proxying to nginx, connections that end after some requests"),
    Suite("connecting", "what a connection of one request pays for being seen", "connecting", compares=False),
    Suite("census", "how soon older connections are found", "census", compares=False),
    Suite("watch", "what looking after spliced connections costs", "watching", compares=False),
    Suite("stack", "which part of a stack's bytes is redirected, and why not the rest", "stack"),
)


def _list_present() -> Iterator[Suite]:
    for suite in _ALL:
        if not suite.module or importlib.util.find_spec(f"splicer.bench.{suite.module}") is not None:
            yield suite


SUITES: dict[str, Suite] = {suite.name: suite for suite in _list_present()}
