# SPDX-License-Identifier: Apache-2.0
"""What a command may touch of the outside world, so that a test can give it another one."""

from __future__ import annotations

import json
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
