# SPDX-License-Identifier: Apache-2.0
"""What a daemon left in the kernel that is gone: whoever asks for a daemon and finds none wants to know."""

from __future__ import annotations

import os

from splicer.errors import NOT_RUNNING, SplicerError


def are_loaded(pin_dir: str) -> bool:
    """Are programs of an earlier run still loaded? They stay when a daemon is killed, and splices go on."""
    try:
        # What is left of an earlier run for sockets that it left spliced can be neither taken over nor out.
        return any(not name.startswith("left-") for name in os.listdir(pin_dir))
    except OSError:
        return False


def mention(error: SplicerError, pin_dir: str) -> SplicerError:
    """The error of a command that found no daemon, with what is left of one."""
    if error.exit_code != NOT_RUNNING or "not running" not in error.message or not are_loaded(pin_dir):
        return error
    return SplicerError(
        f"{error.message}, but programs of an earlier run are still loaded ({pin_dir})",
        hint="take them over with: splicer run; take them out with: splicer unload",
        exit_code=error.exit_code,
    )
