# SPDX-License-Identifier: Apache-2.0
"""System calls in a memory cgroup that has reached its limit."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.01  # seconds until the next try
# What calls say that need memory of the kernel's for something new.
NO_MEMORY = (errno.ENOMEM, errno.ENOBUFS, errno.ENFILE)
# What reading into memory says that was not there yet. The bytes stay where they are.
NOWHERE_TO_READ = (errno.ENOMEM, errno.EFAULT)


def insist(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call, repeated while there is no memory for it: it waits as in a page fault."""
    while True:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno not in NO_MEMORY:
                raise
        time.sleep(PAUSE)
