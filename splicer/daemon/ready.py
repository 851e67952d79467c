# SPDX-License-Identifier: Apache-2.0
"""The ready file: it is there, with the daemon's pid in it, while connections are spliced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from splicer.errors import SplicerError


@contextlib.contextmanager
def ready_file(path: str | None) -> Iterator[None]:
    """Write it, and remove it at the end of the block. No path: do nothing. Raises SplicerError."""
    if not path:
        yield
        return
    _write(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write(path: str) -> None:
    draft = f"{path}.{os.getpid()}"
    try:
        # Not through a link that somebody put there; a directory may be everybody's.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(draft, flags, 0o644), "w") as file:
            file.write(f"{os.getpid()}\n")
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise SplicerError(
            f"cannot write the ready file ({path}: {error.strerror})",
            hint="nothing was left attached; give another --ready-file",
        ) from error
