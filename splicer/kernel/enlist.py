# SPDX-License-Identifier: Apache-2.0
"""enlist, the program that puts pairs into the SOCKHASH by the names of their sockets: how it is run."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from typing import NamedTuple

from splicer.host.namespaces import Directory, Room
from splicer.kernel import libbpf
from splicer.kernel.layout import (
    ENLIST_HEAD,
    ENLIST_PAIRS,
    ENLIST_REQUEST,
    ENLIST_SIZE,
    EnlistOutcome,
    EnlistTask,
)

# The moment comes when it comes. A call looks for it so often, at one pair or at many in turns, and at each
# one so often at least.
_RUNS = 128
_TURNS = 2
_OUTCOMES = tuple(EnlistOutcome)
_WORDS = ENLIST_REQUEST.size // 4
_TRIES = (EnlistTask.TRY, EnlistTask.TRY_EASED)


class EnlistRequest(NamedTuple):
    """A pair by its name, the cookies of its ends' network namespaces, processes that are likely in them, and
    what to do about it."""

    name: int
    netns: tuple[int, int]
    tgid: tuple[int, int]
    task: EnlistTask


class Enlister:
    """enlist, of one generation of programs, and the namespace that it is run in. One thread may use it."""

    def __init__(self, program: int, directory: Directory | None = None) -> None:
        """Raises OSError if there can be no such namespace."""
        self._run = libbpf.PacketRun(program, ENLIST_SIZE)
        self._directory = directory or Directory()
        self._room = Room()

    def close(self) -> None:
        self._room.close()

    def work(self, requests: Sequence[EnlistRequest]) -> list[EnlistOutcome]:
        """Do what is asked for, and say what came of each. Raises OSError if it cannot be run any more."""
        if self._room.is_full:
            room = Room()
            with contextlib.closing(self._room):
                self._room = room
        outcomes: list[EnlistOutcome] = []
        for start in range(0, len(requests), ENLIST_PAIRS):
            outcomes += self._work(requests[start : start + ENLIST_PAIRS])
        return outcomes

    def _work(self, requests: Sequence[EnlistRequest]) -> list[EnlistOutcome]:
        packet = self._run.packet
        ENLIST_HEAD.pack_into(packet, 0, 0, len(requests))
        offset, turns = ENLIST_HEAD.size, 1
        for name, netns, tgid, task in requests:
            numbers = (0, 0)
            if task in _TRIES:
                numbers, task = self._prepare(netns, tgid, task)
                turns = _TURNS
            ENLIST_REQUEST.pack_into(packet, offset, name, *numbers, task, EnlistOutcome.LATER)
            offset += ENLIST_REQUEST.size
        if turns > 1:
            turns = max(turns, _RUNS // len(requests))
        with self._room.entered():
            self._finish(turns * len(requests))
        words = memoryview(packet)[ENLIST_HEAD.size : offset].cast("I")
        return [_OUTCOMES[number] for number in words[_WORDS - 1 :: _WORDS]]

    def _finish(self, runs: int) -> None:
        while True:
            try:
                self._run.run(runs)
                return
            except libbpf.KernelError as error:
                # A signal. What was done is not told, and asking again does no harm.
                if error.errno != errno.EINTR:
                    raise

    def _prepare(
        self, netns: tuple[int, int], tgid: tuple[int, int], task: EnlistTask
    ) -> tuple[tuple[int, int], EnlistTask]:
        """The numbers of the namespaces in our room, and what can be done with them."""
        try:
            client, server = (self._find(*each) for each in zip(netns, tgid, strict=True))
        except OSError:
            return (0, 0), EnlistTask.HAND_OVER
        if client is None or server is None:
            # Gone, most likely, and its sockets with it.
            return (0, 0), EnlistTask.GIVE_UP
        return (client, server), task

    def _find(self, cookie: int, pid: int) -> int | None:
        number = self._room.number(cookie)
        if number is not None:
            return number
        path = self._directory.find(cookie, (pid,))
        return None if path is None else self._room.admit(cookie, path)
