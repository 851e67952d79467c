# SPDX-License-Identifier: Apache-2.0
"""CPython's own tests of sockets and of what is built on them; the result of each test is compared."""

from __future__ import annotations

import functools
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

from apps.case import Case, Failed, Outcome
from apps.stage import Stage

PYTHON = "/usr/bin/python3"
TIMEOUT = 130  # seconds
# A suite that hangs is ended after this many seconds, with a stack.
TEST_TIMEOUT = 120

# What has nothing to do with TCP, or hangs in virtual machines without splicer.
IGNORED = ("*VSOCK*", "*.CAN*", "*.BasicCAN*", "*.ISOTP*", "*.J1939*", "*UDPLITE*", "*RDS*")
# The modules of test_asyncio that make TCP connections; the others take most of its time.
ASYNCIO = ("buffered_proto", "events", "sendfile", "server", "sock_lowlevel", "ssl", "sslproto", "streams")
SUITES = {
    "test_socket": (),
    "test_asyncio": tuple(f"test.test_asyncio.test_{name}.*" for name in ASYNCIO),
    "test_ssl": (),
    "test_httplib": (),
    "test_socketserver": (),
}


def _name_missing() -> list[str]:
    probe = "import importlib.util as u; assert u.find_spec('test.test_socket')"
    try:
        done = subprocess.run([PYTHON, "-I", "-c", probe], capture_output=True, check=False)
    except OSError:
        return [PYTHON]
    return ["the package test of Python (libpython3.x-testsuite)"] if done.returncode else []


def _read_results(text: str) -> dict[str, str]:
    """Name of each test and how it ended: ok, failure, error or skipped."""
    results = {}
    for test in ElementTree.fromstring(text).iter("testcase"):
        ends = [child.tag for child in test if child.tag in ("failure", "error", "skipped")]
        results[test.get("name", "")] = ends[0] if ends else "ok"
    return results


def _run(stage: Stage, suite: str, only: tuple[str, ...]) -> Outcome:
    report = stage.directory / "report.xml"
    options = [option for pattern in IGNORED for option in ("--ignore", pattern)]
    options += [option for pattern in only for option in ("--match", pattern)]
    # `network` is what test_socketserver asks for to use loopback; there is no other network here.
    output = stage.call(
        *(PYTHON, "-I", "-m", "test", "--use=network", f"--timeout={TEST_TIMEOUT}", f"--junit-xml={report}"),
        *(*options, suite),
        host="alone",
        timeout=TIMEOUT,
        # 2: tests failed; 3: all were skipped.
        codes=(0, 1, 2, 3),
    )
    if not report.exists():
        raise Failed(f"{suite} gave no results: {output[-300:]}")
    results = _read_results(report.read_text())
    counts = Counter(results.values())
    failed = sorted(name for name, end in results.items() if end in ("failure", "error"))
    skipped = sorted(name for name, end in results.items() if end == "skipped")
    return Outcome(
        f"{counts['ok']} ok, {len(failed)} failed, {len(skipped)} skipped",
        {"failed": failed, "skipped": skipped, "tests": len(results)},
    )


def _make(suite: str, only: tuple[str, ...]) -> Case:
    return Case(
        f"cpython-{suite}",
        functools.partial(_run, suite=suite, only=only),
        # Most of these connections are blocking, or closed before both ends have read; asyncio's are neither.
        redirects=True if suite == "test_asyncio" else None,
        reasons=frozenset({"blocking_reader"} if suite == "test_ssl" else ()),
        settings=("--hot-reads=1",),
        find_missing=_name_missing,
        narrow=functools.partial(_narrow, suite),
        remark="with --hot-reads=1, since its connections are short",
    )


def _narrow(suite: str, plain: dict[str, Any], spliced: dict[str, Any]) -> Case | None:
    """The tests that failed on one side only, if nothing else differs."""
    failed = set(plain["failed"]) ^ set(spliced["failed"])
    if not failed or plain["tests"] != spliced["tests"]:
        return None
    return _make(suite, tuple(sorted(failed)))


CASES = tuple(_make(suite, only) for suite, only in SUITES.items())
