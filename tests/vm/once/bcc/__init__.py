# SPDX-License-Identifier: Apache-2.0
"""Stands before the real bcc in a guest: compiles as that does, and keeps what came out.

In emulation clang takes a minute, and most tests start splicer anew. The text, the flags and the kernel name
a file; where that exists, its maps are created and its instructions handed out as bcc would have done. Of
bcc there is only what splicer/kernel/compiler.py uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bcc.libbcc import Module

KEPT = Path(os.environ.get("SPLICER_VM_KEPT", "/srv/results/kept"))
RECORD = Path(__file__).parents[1] / "record.py"


class BPF:
    def __init__(self, text: str, cflags: list[str]) -> None:
        asked = json.dumps([os.uname().release, os.uname().version, text, cflags])
        path = KEPT / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(_compile(text, cflags)))
            draft.replace(path)
        self.module = Module(json.loads(path.read_text()))


def _compile(text: str, cflags: list[str]) -> Any:
    """By the real bcc, in a process that has only that; what clang says goes to our stderr."""
    done = subprocess.run(
        [sys.executable, "-I", str(RECORD)],
        input=json.dumps({"text": text, "cflags": cflags}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
