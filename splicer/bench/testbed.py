# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, a cgroup, mounts and processes that disappear with the benchmark.

The namespaces have no names and the bpffs mount lives in a private mount namespace: when the process
that made them is gone, however it went, so are they. What the kernel does not clean up by itself (the
cgroup, the temporary directory) is removed by `Testbed.close`; a run that was killed with SIGKILL leaves
an empty cgroup, which the next run removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from splicer.errors import SplicerError
from splicer.host import cgroups
from splicer.host.sessions import end_with_parent

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

SERVER_ADDRESS = "10.77.0.1"
CLIENT_ADDRESS = "10.77.0.2"
PREFIX = "splicer-bench-"
# What runs in processes of its own, and is called by its path.
LOADS = Path(__file__).resolve().parent / "loads"

_libc = ctypes.CDLL(None, use_errno=True)


class TestbedError(SplicerError):
    """The machine cannot give what a measurement needs; the message says what."""

    __test__ = False  # not a test case, whatever pytest thinks of the name


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise TestbedError(f"{what}: {os.strerror(number)}")


def find_cgroup_root() -> Path:
    """The cgroup v2 hierarchy's mount point: /sys/fs/cgroup, or a directory below it on a hybrid host."""
    found = cgroups.find_v2_mount(cgroups.read_mounts())
    if found is None:
        raise TestbedError(
            "no cgroup v2 hierarchy is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup/unified"
        )
    return Path(found)


def _drop_copies_of_bpffs() -> None:
    """In a mount namespace of our own: a copy would keep what is pinned there when its owner unmounts it."""
    for line in reversed(Path("/proc/self/mountinfo").read_bytes().splitlines()):
        if b" - bpf " in line:
            _libc.umount2(line.split()[4], MNT_DETACH)


@contextlib.contextmanager
def _returning_home() -> Iterator[None]:
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET), "cannot return to the own network namespace")
        os.close(home)


@dataclass(frozen=True)
class Namespace:
    """A network namespace, kept alive by an open file descriptor."""

    name: str
    fd: int

    @classmethod
    def make(cls, name: str) -> Namespace:
        with _returning_home():
            _check(_libc.unshare(CLONE_NEWNET), "cannot make a network namespace")
            return cls(name, os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, this thread makes its sockets in the namespace."""
        with _returning_home():
            _check(_libc.setns(self.fd, CLONE_NEWNET), f"cannot enter the namespace {self.name}")
            yield

    @property
    def path(self) -> str:
        """A path `ip link ... netns` accepts, valid while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


class Testbed:
    """Server and client namespaces on a bridge (in a third), a cgroup for the load, a temporary directory.

    Raises TestbedError when something cannot be made. Use as a context manager.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Testbed:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process, then removes everything. Signals that arrive meanwhile are ignored."""
        with signals_ignored():
            for child in reversed(self._children):
                self.stop(child)
            self._stack.close()

    def _build(self) -> None:
        if os.geteuid() != 0:
            raise TestbedError("namespaces and cgroups need root", hint="sudo splicer bench")
        _check(_libc.unshare(CLONE_NEWNS), "cannot make a mount namespace")
        _check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "cannot make mounts private")
        _drop_copies_of_bpffs()
        root = find_cgroup_root()
        _remove_stale(root)
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.cgroup = root / f"{PREFIX}{os.getpid()}"
        try:
            self.cgroup.mkdir()
        except OSError as error:
            raise TestbedError(f"cannot make the cgroup {self.cgroup}: {error.strerror}") from error
        self._stack.callback(_remove_cgroup, self.cgroup)
        self._mount_bpffs()
        self._connect_namespaces()

    def _mount_bpffs(self) -> None:
        self.bpffs = self.directory / "bpffs"
        self.bpffs.mkdir()
        target = os.fsencode(self.bpffs)
        _check(_libc.mount(b"bpf", target, b"bpf", 0, b"mode=0700"), f"cannot mount a bpffs on {self.bpffs}")
        self._stack.callback(_libc.umount2, target, MNT_DETACH)

    def _connect_namespaces(self) -> None:
        self._bridge = self._namespace("bridge")
        self.ip(self._bridge, "link add bridge type bridge")
        self.ip(self._bridge, "link set bridge up")
        self.server = self.add_host("server", SERVER_ADDRESS)
        self.client = self.add_host("client", CLIENT_ADDRESS)

    def add_host(self, name: str, address: str) -> Namespace:
        """One more namespace on the bridge."""
        end = self.add_namespace(name)
        self.ip(self._bridge, f"link add {name} type veth peer name eth0 netns {end.path}")
        self.ip(self._bridge, f"link set {name} master bridge up")
        self.ip(end, f"addr add {address}/24 dev eth0")
        self.ip(end, "link set eth0 up")
        # Room for tens of thousands of connections per second to one port.
        self.run(["sh", "-c", "echo 1024 65535 >/proc/sys/net/ipv4/ip_local_port_range"], end)
        # Else TIME_WAIT piles up from leg to leg, and plain TCP itself slows down and then stalls.
        self.run(["sh", "-c", "echo 2048 >/proc/sys/net/ipv4/tcp_max_tw_buckets"], end)
        return end

    def add_namespace(self, name: str) -> Namespace:
        """One more, with a loopback device and nothing else."""
        namespace = self._namespace(name)
        self.ip(namespace, "link set lo up")
        return namespace

    def _namespace(self, name: str) -> Namespace:
        namespace = Namespace.make(name)
        self._stack.callback(os.close, namespace.fd)
        return namespace

    def ip(self, namespace: Namespace, arguments: str) -> None:
        """Runs ip(8) in a namespace."""
        self.run(["ip", *arguments.split()], namespace)

    def run(self, command: Sequence[str], namespace: Namespace) -> str:
        """Runs a command that sets something up or tells something; what it printed. Its failure is a
        TestbedError with that."""
        done = subprocess.run(
            command,
            preexec_fn=make_entry(namespace, None, signal.SIGKILL),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise TestbedError(f"{' '.join(command)} (namespace {namespace.name}): {done.stdout.strip()}")
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        namespace: Namespace | None = None,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = None,
        stdin: int = subprocess.DEVNULL,
        cpu: int | None = None,
        watched: bool = True,
        group: str = "",
    ) -> subprocess.Popen[bytes]:
        """Starts a process, in a namespace and in the cgroup; without a namespace: outside of both.

        With `cpu` it stays on the CPU of that index among the usable ones, modulo their number. If it is not
        `watched`, it is outside the cgroup, as a process of another host would be. `group` is a cgroup of its
        own below the other, as a container has one.
        """
        cgroup = self.cgroup / group if namespace and watched else None
        if cgroup is not None:
            cgroup.mkdir(exist_ok=True)
        with signals_blocked():
            child = subprocess.Popen(
                command,
                preexec_fn=make_entry(namespace, cgroup, signal.SIGTERM, cpu),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                # Ctrl-C goes to the benchmark alone, which then ends the others in order.
                start_new_session=True,
            )
            self._children.append(child)
        return child

    def stop(self, child: subprocess.Popen[bytes], patience: float = 15.0) -> int:
        """SIGTERM, and SIGKILL after `patience` seconds; the exit status as in subprocess."""
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child in self._children:
            self._children.remove(child)
        return child.returncode


def run_load(bed: Testbed, command: list[str], namespace: Namespace, cpu: int | None = None) -> str:
    """The last line a load program prints. Raises TestbedError when it fails or prints none."""
    return run_program(bed, command, namespace, cpu).splitlines()[-1]


def run_program(bed: Testbed, command: list[str], namespace: Namespace, cpu: int | None = None) -> str:
    """What a load program prints. Raises TestbedError when it fails or prints nothing."""
    child = bed.start(command, namespace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cpu=cpu)
    try:
        out, err = child.communicate()
    finally:
        status = bed.stop(child)
    text, complaint = (each.decode(errors="replace").strip() for each in (out, err))
    if status != 0 or not text:
        said = (complaint or text).splitlines()
        raise TestbedError(f"{Path(command[0]).name} failed ({status}): {said[-1] if said else 'no output'}")
    return text


def make_entry(
    namespace: Namespace | None, cgroup: Path | None, parent_death: int, cpu: int | None = None
) -> Callable[[], None]:
    """What a child does between fork and exec."""
    parent = os.getpid()

    def enter() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATING)
        if cpu is not None:
            usable = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {usable[cpu % len(usable)]})
        end_with_parent(parent, parent_death)
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")
        if namespace is not None and _libc.setns(namespace.fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    return enter


def _remove_cgroup(cgroup: Path) -> None:
    for group in cgroup.glob("*/"):
        _remove_cgroup(group)
    # Whoever is still in it was started here, and by now only as an orphan of something that crashed.
    for pid in (cgroup / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while True:
        try:
            cgroup.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _remove_stale(root: Path) -> None:
    """Removes the cgroups of runs that were killed with SIGKILL."""
    for cgroup in root.glob(f"{PREFIX}*"):
        if not Path(f"/proc/{cgroup.name.removeprefix(PREFIX)}").exists():
            with contextlib.suppress(OSError):
                for group in cgroup.glob("*/"):
                    group.rmdir()
                cgroup.rmdir()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Until what is started inside is known to whoever ends it: a signal that comes meanwhile waits. Programs
    are started with make_entry(), which takes that from them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Keeps a second Ctrl-C from interrupting the cleaning up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in TERMINATING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TERMINATING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """One of TERMINATING arrived."""


def interrupt_on_signals() -> None:
    """From now on a terminating signal unwinds the stack, so that everything is cleaned up."""

    def raise_interrupted(number: int, _frame: object) -> None:
        raise Interrupted(signal.Signals(number).name)

    for number in TERMINATING:
        signal.signal(number, raise_interrupted)
