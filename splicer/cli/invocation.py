# SPDX-License-Identifier: Apache-2.0
"""The command as it was called, for hints that repeat it: as root, with its arguments."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence

# Where sudo(8) looks by default (secure_path of Debian's and Fedora's sudoers), and root's shells.
ROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def spell(argv: Sequence[str], *, program: str | None = None, path: str = ROOT_PATH) -> str:
    """The command line that root can paste. `program` is what was called, sys.argv[0] if it is not given.

    Root's path often has no splicer: it may be in a virtual environment, or be a source tree.
    """
    called = sys.argv[0] if program is None else program
    own = os.path.abspath(called) if os.sep in called else shutil.which(called) or called
    found = shutil.which("splicer", path=path)
    if found and (not os.path.isfile(own) or os.path.realpath(found) == os.path.realpath(own)):
        words = ["splicer"]
    elif os.path.basename(own) == "splicer" and os.access(own, os.X_OK):
        words = [own]
    else:
        words = [sys.executable, "-m", "splicer"]
    return shlex.join([*words, *argv])


def repeat_as_root(hint: str, command: str, argv: Sequence[str]) -> str:
    """A hint with the whole command line in the place of `sudo splicer COMMAND`."""
    return re.sub(rf"\bsudo splicer {re.escape(command)}\b", lambda _: f"sudo {spell(argv)}", hint)
