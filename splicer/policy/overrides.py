# SPDX-License-Identifier: Apache-2.0
"""What an operator has set at run time: container name to mode, in a file that outlives the daemon.

The file lies in the run directory, which the next boot empties: an override is for the moment, labels and the
configuration are for good.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping

from splicer.logs import Logger
from splicer.policy.config import CONTAINER_MODES

FILE_NAME = "overrides.json"
_SCHEMA = 1


def load(run_dir: str, log: Logger) -> dict[str, str]:
    """Overrides of an earlier daemon; none if there is no file, and none with a warning if it is broken."""
    path = os.path.join(run_dir, FILE_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        found = document["overrides"]
        if document["schema"] != _SCHEMA or not all(
            isinstance(name, str) and mode in CONTAINER_MODES for name, mode in found.items()
        ):
            raise ValueError("unknown content")
        return dict(found)
    except FileNotFoundError:
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
    draft = f"{path}.{os.getpid()}"
    try:
        with open(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            json.dump({"schema": _SCHEMA, "overrides": dict(overrides)}, file)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
