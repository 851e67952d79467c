# SPDX-License-Identifier: Apache-2.0
"""Keeps the sums in the run directory, so that a daemon that takes the programs over goes on with them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping

from splicer.metrics.ledger import Ledger
from splicer.metrics.services import Services

FILE_NAME = "metrics.json"
_SCHEMA = 1
_LIMIT = 16 << 20  # bytes


def load(run_dir: str, programs: str, ledgers: Mapping[str, Ledger], services: Services) -> bool:
    """Fill the ledgers, if the file is of these `programs`. A file that cannot be read is as none."""
    try:
        with open(os.path.join(run_dir, FILE_NAME), encoding="utf-8") as file:
            document = json.loads(file.read(_LIMIT))
        if document["schema"] != _SCHEMA or document["programs"] != programs:
            return False
        for name, ledger in ledgers.items():
            ledger.take_over(document["ledgers"][name])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False
    for ledger in ledgers.values():
        services.take_over(ledger.sums)
    return True


def save(run_dir: str, programs: str, ledgers: Mapping[str, Ledger]) -> None:
    """Replace the file in one step. Raises OSError; the old file stays."""
    path = os.path.join(run_dir, FILE_NAME)
    document = {
        "schema": _SCHEMA,
        "programs": programs,
        "ledgers": {name: ledger.to_json() for name, ledger in ledgers.items()},
    }
    draft = f"{path}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(draft, flags, 0o600), "w", encoding="utf-8") as file:
            json.dump(document, file, separators=(",", ":"))
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise


def remove(run_dir: str) -> None:
    """The programs are gone, and with them what they have counted."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(run_dir, FILE_NAME))
