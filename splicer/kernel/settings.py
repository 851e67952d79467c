# SPDX-License-Identifier: Apache-2.0
"""The settings map: what the programs look up at every decision, and how it is changed while they run."""

from __future__ import annotations

import dataclasses
import struct
import threading
from typing import Any

from splicer.kernel.layout import KernelSettings
from splicer.kernel.libbpf import Map

_ZERO = struct.pack("=I", 0)


class SettingsMap:
    """The one element of the map `settings` (struct settings in bpf/types.h). Any thread may write."""

    def __init__(self, settings: Map) -> None:
        self._map = settings
        self._guard = threading.Lock()

    def read(self) -> KernelSettings:
        """All zero in programs that were loaded just now: they do nothing."""
        raw = self._map.get(_ZERO)
        assert raw is not None, "every index of an array has a value"
        return KernelSettings.unpack(raw)

    def write(self, **changes: Any) -> None:
        """Change single fields. Raises KernelError."""
        with self._guard:
            self._map.set(_ZERO, dataclasses.replace(self.read(), **changes).pack())
