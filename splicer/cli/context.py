# SPDX-License-Identifier: Apache-2.0
"""What a command may touch of the outside world, so that a test can give it another one."""

from __future__ import annotations

import json
import select
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from splicer.text import PLAIN, Palette


@dataclass(frozen=True)
class Context:
    """Streams, environment and colours of one invocation. stdout is for data, stderr for everything else."""

    stdout: TextIO
    stderr: TextIO
    environ: Mapping[str, str]
    palette: Palette = PLAIN
    error_palette: Palette = PLAIN

    def write(self, lines: Sequence[str]) -> None:
        """Print lines of data."""
        for line in lines:
            self.stdout.write(line + "\n")

    def require_reader(self) -> None:
        """Raises BrokenPipeError if stdout is a pipe that nobody reads any more. A write would tell, but
        there may be nothing to write for hours."""
        try:
            descriptor = self.stdout.fileno()
        except (OSError, ValueError):  # none of the kernel's
            return
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(news & select.POLLERR for _, news in poll.poll(0)):
            raise BrokenPipeError

    def write_json(self, document: Mapping[str, object]) -> None:
        """Print one JSON object on one line."""
        self.stdout.write(json.dumps(document, separators=(",", ":")) + "\n")

    def write_json_rows(
        self, document: Mapping[str, object], name: str, rows: Iterable[Mapping[str, object]]
    ) -> None:
        """The same with an array of this name at its end, of whose elements one at a time is in memory."""
        head = json.dumps({**document, name: []}, separators=(",", ":"))
        separator = head[:-2]
        for row in rows:
            self.stdout.write(separator + json.dumps(row, separators=(",", ":")))
            separator = ","
        self.stdout.write(("]}" if separator == "," else head) + "\n")
