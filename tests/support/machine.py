# SPDX-License-Identifier: Apache-2.0
"""A Debian system of its own with systemd as its first process: namespaces and a cgroup of ours, this kernel.

Its cgroup namespace begins at our cgroup, and what is mounted there is version 2 alone. So systemd and
splicer in it take that for a host's root. Network, pids and mounts are its own as well. With `connect` it
reaches the packages that this machine reaches.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.bpf import walk_pins
from support.cgroup import Cgroup
from support.daemon import REPOSITORY, wait_until
from support.docker import TEMPORARY
from support.images import apt_of, archive_of, pip_of

_PINS = "/sys/fs/bpf"
# What whoever logs in has; nothing of what is said to the tests.
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "TERM=xterm",
)
TALKER = REPOSITORY / "tests/e2e/talker.py"
_TALKING = "/run/talking"
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
        self._way: subprocess.Popen[bytes] | None = None

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
        return ["nsenter", f"--target={self.pid}", "--all", "--root", "--wd", "env", "-i", *_ENVIRONMENT]

    def call(self, *command: str, timeout: float = 60.0) -> str:
        """The same, for a command that must end with 0."""
        done = self.attempt(*command, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def inside(self, *command: str) -> list[str]:
        """How to start a command inside that is in a cgroup of the machine as well."""
        return self._below("inside", *self._entering(), *command)

    def _below(self, cgroup: str, *command: str) -> list[str]:
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ["sh", "-c", script, str(self._cgroup.child(cgroup).path), *command]

    def bring(self, file: Path) -> str:
        """Copy a file or a directory into /root; its path inside."""
        if file.is_dir():
            shutil.copytree(file, self.root / "root" / file.name, symlinks=True)
        else:
            shutil.copy(file, self.root / "root" / file.name)
        return f"/root/{file.name}"

    def connect(self) -> None:
        """Give it a way out, as the tests' dockerd has one: no route or firewall here is touched."""
        options = ["--configure", "--mtu=1500", "--disable-host-loopback"]
        command = self._below("way", "slirp4netns", *options, str(self.pid), "tap0")
        with (self.root / "way.log").open("wb") as log:
            self._way = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until("the way out", lambda: "tap0" in self.call("cat", "/proc/net/route"), timeout=10)

    def disconnect(self) -> None:
        """Take the way out away."""
        if self._way is not None:
            self._way.kill()
            self._way.wait(timeout=30)
            self._way = None

    @contextmanager
    def talking(self) -> Iterator[None]:
        """A connection over loopback that checks itself. At the end every byte of it must have come."""
        command = self.inside("python3", "-I", self.bring(TALKER), _TALKING)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as talk:
            try:
                yield
                assert talk.poll() is None, "it has ended by itself"
            finally:
                (Path(f"/proc/{self.pid}/root") / _TALKING.lstrip("/")).unlink(missing_ok=True)
                said, _ = talk.communicate(timeout=30)
        assert talk.returncode == 0, said
        assert int(said.split()[0]) > 0

    def programs(self) -> set[int]:
        """Ids of what is attached to its cgroups at splicer's hooks; systemd has others."""
        command = ["bpftool", "--json", "cgroup", "tree", str(self.cgroup)]
        tree = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        programs = [program for each in tree for program in each["programs"]]
        return {each["id"] for each in programs if "sock" in each["attach_type"]}

    def pins(self) -> dict[Path, set[tuple[str, int]]]:
        """What is pinned in it, as (kind, id) by path, but for what the kernel itself has put there."""
        found = walk_pins(Path(f"/proc/{self.pid}"), _PINS)
        return {path: objects for path, objects in found if path.parent != Path(_PINS)}

    def halt(self) -> None:
        """Kill everything in it."""
        self.disconnect()
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
        (made.root / "etc/hosts").write_text(f"127.0.0.1 localhost {platform.node()}\n")
        certificates = "/etc/machine-certificates.crt"
        settings, bundle = pip_of(certificates)
        (made.root / "etc/pip.conf").write_text("\n".join(["[global]", *settings, ""]))
        if bundle is not None:
            shutil.copy(bundle, made.root / certificates.lstrip("/"))
        shutil.copy("/etc/resolv.conf", made.root / "etc/resolv.conf")
        update = _run(["chroot", str(made.root), "apt-get", "update", "--quiet"], timeout=300)
        assert update.returncode == 0, update.stdout
        made.install("systemd", "dbus", "man-db")
        yield made
    finally:
        made.halt()
        cgroup.remove()
        shutil.rmtree(directory)
