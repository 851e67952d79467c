# SPDX-License-Identifier: Apache-2.0
"""What a command may touch of the outside world, so that a test can give it another one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
