# SPDX-License-Identifier: Apache-2.0
"""What happened lately: a bounded number of events in memory, for `splicer events`.

Those of single connections, of which there may be a hundred thousand at once, are kept apart from those of
which there are few: a crowd does not push out that the policy has changed. All have one row of numbers, so
whoever reads sees how many are missing.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from splicer.logs import Logger
from splicer.model import MISSED, Owner

# So many events of connections are kept, and so many others.
MOST_OF_CONNECTIONS = 4096
MOST_OTHERS = 1024
# Of what an event says beside its type: longer texts and lists are cut.
_LONGEST_TEXT = 300
_LONGEST_LIST = 20

# What the log says that is an event as well, and what it is called there.
LOGGED: Mapping[str, str] = {
    "ready": "started",
    "signal": "signal",
    "drained": "drained",
    "override": "override",
    "policy_applied": "policy_changed",
    "policy_incomplete": "policy_incomplete",
    "bad_label": "bad_label",
    "paused": "paused",
    "resumed": "resumed",
    "draining": "drain_requested",
    "network_gone": "network_gone",
    "reloaded": "reloaded",
    "reload_failed": "reload_failed",
    "restart_needed": "restart_needed",
    "census_taken": "census_taken",
    "census_failed": "census_failed",
    "docker_connected": "docker_connected",
    "docker_lost": "docker_lost",
    "docker_absent": "docker_absent",
    "sweeps_held_up": "sweeps_held_up",
}


@dataclass(slots=True)
class Record:
    """One event. `time` is in seconds since the epoch, `name` the connection's, 0 if it is about none or
    several. `raw` is the connection's record in the kernel as it was then, if it was read: until whose it is
    has been found out, which is later. So `client` and `server` come before `raw` goes."""

    number: int
    time: float
    type: str
    reason: str = ""
    count: int = 1
    name: int = 0
    netns: tuple[int, int] = (0, 0)
    tgid: tuple[int, int] = (0, 0)
    raw: bytes | None = None
    local: str = ""
    remote: str = ""
    client: Owner | None = None
    server: Owner | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def take_parties(self, other: Record) -> None:
        """It is about the same connection."""
        self.raw = other.raw
        self.local, self.remote = other.local, other.remote
        self.server, self.client = other.server, other.client

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "time": round(self.time, 6),
            "type": self.type,
            "reason": self.reason,
            "count": self.count,
            "local": self.local,
            "remote": self.remote,
            "client": None if self.client is None else dict(vars(self.client)),
            "server": None if self.server is None else dict(vars(self.server)),
            "detail": dict(self.detail),
        }


class Journal:
    """The latest events. May be used from any thread."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        most_of_connections: int = MOST_OF_CONNECTIONS,
        most_others: int = MOST_OTHERS,
    ) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._of_connections: deque[Record] = deque(maxlen=most_of_connections)
        self._others: deque[Record] = deque(maxlen=most_others)
        self._number = 0
        self.daemon = uuid.uuid4().hex
        """Another text for each daemon: numbers begin anew with it."""
        self.since = clock()

    @property
    def last(self) -> int:
        """The number of the latest event, 0 if there was none."""
        return self._number

    def note(
        self,
        type_: str,
        *,
        reason: str = "",
        count: int = 1,
        name: int = 0,
        netns: tuple[int, int] = (0, 0),
        tgid: tuple[int, int] = (0, 0),
        raw: bytes | None = None,
        detail: Mapping[str, Any] | None = None,
        of_connections: bool = False,
    ) -> Record:
        """Something has happened now."""
        with self._guard:
            self._number += 1
            record = Record(
                self._number, self._clock(), type_, reason, count, name, netns, tgid, raw, detail=detail or {}
            )
            (self._of_connections if of_connections else self._others).append(record)
            return record

    def read(self, after: int = 0, most: int = 0) -> list[Record]:
        """Those with higher numbers that are still known, the oldest first; the latest so many, 0 for all."""
        with self._guard:
            found = [
                record
                for records in (self._of_connections, self._others)
                for record in takewhile(lambda each: each.number > after, reversed(records))
            ]
        found.sort(key=lambda each: each.number)
        return found[-most:] if most else found


def fill_gaps(records: Iterable[Record], after: int) -> list[Record]:
    """The records, and where others are missing one that says how many. `after` is the number of the one
    before the first."""
    filled: list[Record] = []
    for record in records:
        if missing := record.number - after - 1:
            filled.append(Record(record.number - 1, record.time, MISSED, count=missing))
        filled.append(record)
        after = record.number
    return filled


class NotingLog:
    """A logger that leaves what is an event as well (LOGGED) in a journal."""

    def __init__(self, log: Logger, journal: Journal) -> None:
        self._target = log
        self._journal = journal

    def _note(self, event: str, keys: Mapping[str, object]) -> None:
        if type_ := LOGGED.get(event):
            detail = {key: _shorten(value) for key, value in keys.items()}
            self._journal.note(type_, detail=detail)

    def debug(self, event: str, /, **keys: object) -> object:
        self._note(event, keys)
        return self._target.debug(event, **keys)

    def info(self, event: str, /, **keys: object) -> object:
        self._note(event, keys)
        return self._target.info(event, **keys)

    def warning(self, event: str, /, **keys: object) -> object:
        self._note(event, keys)
        return self._target.warning(event, **keys)

    def error(self, event: str, /, **keys: object) -> object:
        self._note(event, keys)
        return self._target.error(event, **keys)

    def exception(self, event: str, /, **keys: object) -> object:
        self._note(event, keys)
        return self._target.exception(event, **keys)


def _shorten(value: object) -> object:
    """As it can be in JSON, and be kept by the hundred."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _shorten(each) for key, each in list(value.items())[:_LONGEST_LIST]}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_shorten(each) for each in value[:_LONGEST_LIST]]
    return str(value)[:_LONGEST_TEXT]
