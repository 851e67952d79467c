# SPDX-License-Identifier: Apache-2.0
"""What an operator has set at run time: subject to mode, oldest first, in a file that outlives the daemon;
and whether splicing is paused, in another one.

The files lie in the run directory, which the next boot empties: an override is for the moment, labels and the
configuration are for good.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from splicer.errors import USAGE, SplicerError
from splicer.logs import Logger
from splicer.policy.labels import read_ports
from splicer.policy.rules import CONTAINER_MODES, PORTS_PER_RULE, VALUE_TYPES, Rule, show_ports
from splicer.policy.values import check_value, refuse

FILE_NAME = "overrides.json"
PAUSE_NAME = "paused"
_SCHEMA = 1
MOST = 256
"""So many overrides at most: each new one is looked at before all older ones."""

CONTAINER, CGROUP, PROCESS, PORT, ADDRESS = "container", "cgroup", "process", "port", "address"
KINDS = (CONTAINER, CGROUP, PROCESS, PORT, ADDRESS)
_CHECKS = {CGROUP: "cgroup", PROCESS: "container", ADDRESS: "cidr"}


@dataclass(frozen=True)
class Subject:
    """What an override is about. `kind` is one of KINDS."""

    kind: str
    value: str

    @property
    def key(self) -> str:
        """Its name in the file: that of a container, which has no `=` in it, or kind and value."""
        return self.value if self.kind == CONTAINER else f"{self.kind}={self.value}"

    @property
    def words(self) -> str:
        """The same for people."""
        return self.value if self.kind == CONTAINER else f"{self.kind} {self.value}"

    @property
    def rule(self) -> Rule | None:
        """The table that would say the same; None of a container, and of a process, which no table has."""
        if self.kind == CGROUP:
            return Rule(cgroup=self.value)
        if self.kind == ADDRESS:
            return Rule(cidr=self.value)
        if self.kind == PORT:
            return Rule(ports=read_ports(self.value, PORTS_PER_RULE))
        return None


def read_key(key: str) -> Subject:
    """The subject with this key."""
    kind, equals, value = key.partition("=")
    return Subject(kind, value) if equals and kind in KINDS else Subject(CONTAINER, key)


def read_subject(kind: str, text: str) -> Subject:
    """A subject out of what an operator wrote. Raises SplicerError with exit code 2."""
    if kind == PORT:
        try:
            return Subject(PORT, show_ports(read_ports(text, PORTS_PER_RULE)))
        except ValueError:
            raise refuse("port", text, "a port, a range such as 8000-8010, or several with commas") from None
    if kind in _CHECKS:
        check_value(VALUE_TYPES[_CHECKS[kind]], text, kind, text)
    elif kind != CONTAINER:
        raise SplicerError(f"unknown subject ({kind})", hint=f"accepted: {', '.join(KINDS)}", exit_code=USAGE)
    return Subject(kind, text)


def load(run_dir: str, log: Logger) -> dict[str, str]:
    """Overrides of an earlier daemon, by key; none if there is no file, and none with a warning if it is
    broken."""
    path = os.path.join(run_dir, FILE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        found = document["overrides"]
        if document["schema"] != _SCHEMA or not all(
            isinstance(name, str) and mode in CONTAINER_MODES for name, mode in found.items()
        ):
            raise ValueError("unknown content")
        for subject in map(read_key, found):
            read_subject(subject.kind, subject.value)
        return dict(found)
    except FileNotFoundError:
        return {}
    except SplicerError as error:
        log.warning("overrides_unreadable", path=path, error=error.message)
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("overrides_unreadable", path=path, error=str(error) or type(error).__name__)
        return {}


def store(run_dir: str, overrides: Mapping[str, str]) -> None:
    """Replace the file in one step; without overrides there is none. Raises OSError; the old file stays."""
    path = os.path.join(run_dir, FILE_NAME)
    if not overrides:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    _replace(path, json.dumps({"schema": _SCHEMA, "overrides": dict(overrides)}))


def read_pause(run_dir: str) -> float | None:
    """Since when splicing is paused, in seconds since the boot (CLOCK_BOOTTIME); None if it is not."""
    try:
        with open(os.path.join(run_dir, PAUSE_NAME), encoding="ascii", errors="replace") as file:
            text = file.read(64)
    except OSError:
        return None
    try:
        return float(text)
    except ValueError:  # that it is there is what counts
        return read_time_since_boot()


def store_pause(run_dir: str, since: float | None) -> None:
    """Remember that splicing is paused since then, or that it is not. Raises OSError; then it is as
    before."""
    path = os.path.join(run_dir, PAUSE_NAME)
    if since is not None:
        _replace(path, str(since))
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def read_time_since_boot() -> float:
    """Seconds since the boot, those asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _replace(path: str, text: str) -> None:
    draft = f"{path}.{os.getpid()}"
    try:
        with open(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
