# SPDX-License-Identifier: Apache-2.0
"""A network namespace that lives as long as a process."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def keep_namespace(setup: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A new one, in which the shell has run `setup`: its path, and what ends it before the block is left.

    Skips the test where none can be made.
    """
    child = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", f"{setup} && echo ready && exec sleep 60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        child.kill()
        child.communicate()

    assert child.stdout is not None
    if child.stdout.readline() != "ready\n":
        pytest.skip(f"no such namespace can be made here ({child.communicate()[1].strip()})")
    try:
        yield f"/proc/{child.pid}/ns/net", end
    finally:
        end()
