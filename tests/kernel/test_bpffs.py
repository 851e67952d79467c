# SPDX-License-Identifier: Apache-2.0
"""Hosts without systemd have no BPF file system mounted: splicer mounts it and takes it away again."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os
from splicer.kernel import bpffs
mounted = bpffs.prepare("/sys/fs/bpf/splicer")
assert mounted == "/sys/fs/bpf", mounted
assert bpffs.is_bpffs("/sys/fs/bpf")
assert bpffs.prepare("/sys/fs/bpf/splicer") is None, "mounted a second time"
{between}
bpffs.release(mounted)
print(bpffs.is_bpffs("/sys/fs/bpf"))
"""


@pytest.mark.parametrize(
    ("between", "stays"),
    [("", "False"), ("os.mkdir('/sys/fs/bpf/of-somebody-else')", "True")],
    ids=["empty", "in-use"],
)
def test_mounted_and_released(between: str, stays: str) -> None:
    """The mount goes when it holds nothing, and stays when somebody has put something there."""
    hide = 'mount -t tmpfs none /sys/fs/bpf && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hide, "sh", sys.executable, "-c", SCRIPT.format(between=between)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == stays
