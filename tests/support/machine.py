# SPDX-License-Identifier: Apache-2.0
"""A Debian system of its own with systemd as its first process: namespaces and a cgroup of ours, this kernel.

Its cgroup namespace begins at our cgroup, and what is mounted there is version 2 alone. So systemd and
splicer in it take that for a host's root. Network, pids and mounts are its own as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.cgroup import Cgroup
from support.daemon import wait_until
from support.docker import TEMPORARY
from support.images import apt_of, archive_of

# In the new namespaces, before systemd: what the first process of a machine finds mounted.
_BOOT = """
set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t sysfs sysfs "$1/sys"
mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
mount -t bpf bpf "$1/sys/fs/bpf"
mount -t tmpfs tmpfs "$1/run"
mount -t tmpfs tmpfs "$1/tmp"
mount --rbind /dev "$1/dev"
ip link set lo up
cd "$1"
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    unshare --root="$1" /lib/systemd/systemd systemd.unit=multi-user.target
"""


class Machine:
    """A system in a directory. `install` works before and after `boot`, `call` after it."""

    def __init__(self, root: Path, cgroup: Cgroup) -> None:
        self.root = root
        self._cgroup = cgroup
        self._init: int | None = None

    @property
    def cgroup(self) -> Path:
        """Where its cgroups begin, as seen from outside."""
        return self._cgroup.path

    @property
    def pid(self) -> int:
        """Its first process, as seen from outside."""
        assert self._init is not None, "it is not booted"
        return self._init

    def install(self, *packages: str) -> None:
        """apt-get install, without what is only recommended. A path is one inside of the system. Raises
        AssertionError with what apt said."""
        self._apt("install", *packages)

    def remove(self, *packages: str) -> None:
        """apt-get purge."""
        self._apt("purge", *packages)

    def _apt(self, verb: str, *packages: str) -> None:
        options = ["--yes", "--quiet", "--no-install-recommends", "--allow-downgrades"]
        command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", verb, *options, *packages]
        if self._init is None:
            done = _run(["chroot", str(self.root), *command], timeout=300)
        else:
            done = self.attempt(*command, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:]

    def boot(self, timeout: float = 60.0) -> None:
        """Start systemd and wait until it has started what there is to start."""
        unshare = "unshare -m -p -C -u -i -n -f --propagation private"
        script = f'echo $$ > "$2/cgroup.procs" && exec {unshare} sh -c "$3" sh "$1"'
        with (self.root / "boot.log").open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", script, "sh", str(self.root), str(self._cgroup.path), _BOOT],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(
            "the machine has a first process", lambda: children.read_text().split() != [], timeout=timeout
        )
        self._init = int(children.read_text().split()[0])
        self._unshare = process
        wait_until(
            "systemd answers",
            lambda: self.attempt("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"),
            timeout=timeout,
        )

    def attempt(self, *command: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside; stdout and stderr together."""
        return _run([*self._entering(), *command], timeout=timeout)

    def _entering(self) -> list[str]:
        enter = ["nsenter", f"--target={self.pid}", "--all", "--root", "--wd"]
        # What is said to the tests is not said to it.
        ours = [f"--unset={name}" for name in os.environ if name.startswith("SPLICER_")]
        return [*enter, "env", *ours]

    def call(self, *command: str, timeout: float = 60.0) -> str:
        """The same, for a command that must end with 0."""
        done = self.attempt(*command, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command inside, in the background and in a cgroup of the machine."""
        enter = [*self._entering(), *command]
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        inside = self._cgroup.child("talk").path
        return subprocess.Popen(
            ["sh", "-c", script, str(inside), *enter],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def halt(self) -> None:
        """Kill everything in it."""
        if self._init is None:
            return
        os.kill(self._init, signal.SIGKILL)
        self._unshare.wait(timeout=30)
        self._init = None


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


@contextmanager
def machine(suite: str) -> Iterator[Machine]:
    """The smallest system of a suite, with systemd and a way to packages; not booted. Gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f"splicer-test-{os.getpid()}-", dir=TEMPORARY))
    cgroup = Cgroup()
    made = Machine(directory / "root", cgroup)
    try:
        made.root.mkdir()
        unpack = ["tar", "-C", str(made.root), "-xpf", str(archive_of(suite))]
        subprocess.run(unpack, check=True)
        source, settings = apt_of(suite)
        (made.root / "etc/apt/sources.list").write_text(f"{source}\n")
        (made.root / "etc/apt/apt.conf.d/99machine").write_text("\n".join([*settings, ""]))
        shutil.copy("/etc/resolv.conf", made.root / "etc/resolv.conf")
        update = _run(["chroot", str(made.root), "apt-get", "update", "--quiet"], timeout=300)
        assert update.returncode == 0, update.stdout
        made.install("systemd", "dbus", "man-db")
        yield made
    finally:
        made.halt()
        cgroup.remove()
        shutil.rmtree(directory)
