# SPDX-License-Identifier: Apache-2.0
"""Signals are counted and told of later; the handlers there were come back."""

from __future__ import annotations

import os
import select
import signal

from splicer.daemon.signals import Signals

from ..conftest import Log

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def test_signals(log: Log) -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK)
    try:
        with Signals(write_fd, log) as signals:
            assert not signals.take_reload()
            signal.raise_signal(signal.SIGHUP)
            assert signals.stops == 0
            assert signals.take_reload()
            assert not signals.take_reload()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert signals.stops == 2
            assert log.events == [], "a handler may run while the log is locked"
            assert select.select([read_fd], [], [], 0)[0]
            for _ in range(2):
                signals.tell()
                assert [keys["name"] for _, _, keys in log.events] == ["SIGHUP", "SIGTERM", "SIGINT"]
        assert [signal.getsignal(number) for number in NUMBERS] == before
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        os.close(read_fd)
        os.close(write_fd)
