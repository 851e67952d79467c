# SPDX-License-Identifier: Apache-2.0
"""The census at the start: when it is taken, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

from splicer.kernel.census import CensusReport
from splicer.logs import Logger

OFF, EARLIER, UNAVAILABLE = "off", "earlier", "unavailable"
FAILED = "failed"
_RUNNING, _DONE = "running", "done"


class CensusTaker:
    """Takes one step of a census at each turn of the daemon's loop, and keeps the report."""

    def __init__(
        self, steps: Generator[CensusReport | None, None, None] | None, log: Logger, *, instead: str = OFF
    ) -> None:
        """No `steps`: none is taken, for the reason `instead`."""
        self._steps = steps
        self._log = log
        self._state = instead if steps is None else _RUNNING
        self._report = CensusReport()

    @property
    def deadline(self) -> float:
        """When the next step is due (time.monotonic()): at once, or never."""
        return math.inf if self._steps is None else 0.0

    def work(self) -> None:
        """Take a step, if there is one."""
        if self._steps is None:
            return
        try:
            report = next(self._steps)
        except OSError as error:
            self._log.warning("census_failed", error=str(error))
            self._steps, self._state = None, FAILED
            return
        if report is not None:
            self._report, self._state = report, _DONE
            self._log.info("census_taken", **asdict(report))
            self.close()

    def close(self) -> None:
        """Take no further step."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def describe(self) -> dict[str, Any]:
        """For `splicer status`. Any thread may ask."""
        return {"state": self._state, **asdict(self._report)}
