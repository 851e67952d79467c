# SPDX-License-Identifier: Apache-2.0
"""A container engine of the tests' own, that shares nothing with the machine's: dockerd, and in podman.py
Podman's service, which is asked by the same client.

It lives in a network and a mount namespace of its own: bridges, firewall rules, overlay mounts, /run and the
socket are private, and gone when its processes are. Its processes and containers are in one cgroup, by which
they are found whatever happens. slirp4netns connects it to the outside for building images, without a change
to the machine's routes or firewall.

Process ids are the machine's: `pid: host` means here what it means everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from support.bpf import Bpffs
from support.cgroup import Cgroup, remove_v1_directories
from support.daemon import wait_until

START_TIMEOUT = 60.0  # seconds
TEMPORARY = Path("/var/tmp")  # an overlay file system wants a real one below it


class DockerError(Exception):
    """A command to an engine failed; what it said."""


class Engine:
    """dockerd. A context manager: leaving it removes containers, images, processes, mounts and cgroups."""

    # What it has of its own: nsenter's word, and that of /proc.
    NAMESPACES: Mapping[str, str] = {"net": "net", "mount": "mnt"}

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"splicer-test-{os.getpid()}-", dir=TEMPORARY))
        self.run = self.directory / "run"  # /run of the engine and, bind-mounted, of the sidecar
        self.log = self.directory / "engine.log"
        self._undo: list[Callable[[], None]] = [lambda: shutil.rmtree(self.directory)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._holder = 0
        self._service: subprocess.Popen[bytes] | None = None
        self.bpffs: Bpffs
        self.cgroup: Cgroup

    # -- life ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        try:
            self._start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _start(self) -> None:
        self.run.mkdir(mode=0o755)
        self.bpffs = Bpffs(self.directory / "bpffs")
        self._undo.append(self.bpffs.unmount)
        self.cgroup = Cgroup()
        self._undo.append(self._remove_cgroups)
        self._make_homes()
        self._holder = self._hold_namespaces().pid
        self._prepare_run()
        self.enter("mount", "--bind", str(self.run), "/run")
        self.enter("mount", "--bind", str(self.bpffs.path), "/sys/fs/bpf")
        self._spawn(
            *("slirp4netns", "--configure", "--mtu=1500", "--disable-host-loopback"),
            *(str(self._holder), "tap0"),
        )
        wait_until("the way out", lambda: "default" in self.enter("ip", "route"), timeout=10)
        self.start_service()

    def _prepare_run(self) -> None:
        # The engine's /run is empty but for what the machine's resolv.conf may point to.
        resolver = Path("/etc/resolv.conf").resolve()
        if resolver.is_relative_to("/run"):
            copy = self.run / resolver.relative_to("/run")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(resolver, copy)

    def _make_homes(self) -> None:
        (self.cgroup.path / "engine").mkdir()

    def _homes(self) -> list[Path]:
        """The cgroups of the engine's processes."""
        return [self.cgroup.path / "engine"]

    def _birthplaces(self) -> list[Path]:
        """The cgroups in which its namespaces are made."""
        return self._homes()

    def _hold_namespaces(self) -> subprocess.Popen[bytes]:
        options = [f"--{each}" for each in self.NAMESPACES]
        command = ("unshare", *options, "--propagation", "slave", "sleep", "infinity")
        holder = self._spawn(*command, homes=self._birthplaces())
        wait_until("the engine's namespaces", lambda: self._has_namespaces(holder.pid), timeout=10)
        return holder

    def _has_namespaces(self, pid: int) -> bool:
        kinds = self.NAMESPACES.values()
        own, its = ([os.stat(f"/proc/{each}/ns/{kind}").st_ino for kind in kinds] for each in ("self", pid))
        return all(one != other for one, other in zip(own, its, strict=True))

    def _spawn(
        self, *command: str, log: Path | None = None, homes: Iterable[Path] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in the engine's cgroups, or in these."""
        with (log or self.directory / "processes.log").open("ab") as sink:
            process = subprocess.Popen(
                [*moving(self._homes() if homes is None else homes), *command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd="/",
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def remove(self) -> None:
        """Take everything away. Raises what the last failing step raised, after all steps were tried."""
        with contextlib.suppress(Exception):
            self.remove_containers()
        problem: BaseException | None = None
        self.stop_service()
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                problem = error
        for process in self._processes:
            process.wait(5)
        if problem is not None:
            raise problem

    def _remove_cgroups(self) -> None:
        self.cgroup.remove()
        remove_v1_directories(self.cgroup.path.name)

    # -- the engine's process --------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        return self.run / "docker.sock"

    @property
    def namespace(self) -> str:
        """Path of the network namespace that is the engine's "host"."""
        return f"/proc/{self._holder}/ns/net"

    @property
    def attached_at(self) -> Path:
        """Where those whom the engine starts see the cgroup that all of them are in."""
        return self.cgroup.path

    def start_service(self, *arguments: str, live_restore: bool = True) -> None:
        """Start the engine and wait until it answers."""
        if live_restore:
            arguments = ("--live-restore", *arguments)
        self._service = self._spawn(
            *self._entering(),
            *("dockerd", "--exec-opt=native.cgroupdriver=cgroupfs"),
            f"--data-root={self.directory / 'data'}",
            f"--cgroup-parent=/{self.cgroup.path.name}/containers",
            *arguments,
            log=self.log,
        )
        self._wait_answering()

    def _wait_answering(self) -> None:
        wait_until("the engine answers", self._answers, timeout=START_TIMEOUT, pause=0.1)

    def _answers(self) -> bool:
        assert self._service is not None
        if self._service.poll() is not None:
            raise DockerError(f"the engine ended with {self._service.returncode}:\n{self.tail()}")
        with contextlib.suppress(DockerError):
            self.docker("version")
            return True
        return False

    def stop_service(self) -> None:
        """Containers stay (live-restore)."""
        if self._service is None:
            return
        self._service.send_signal(signal.SIGTERM)
        try:
            self._service.wait(30)
        except subprocess.TimeoutExpired:
            self._service.kill()
            self._service.wait(5)
        self._service = None

    def tail(self, lines: int = 30) -> str:
        """The last lines of what the engine wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    # -- commands ------------------------------------------------------------------------------------------

    def _entering(self) -> list[str]:
        options = [f"--{each}" for each in self.NAMESPACES]
        return ["nsenter", *options, f"--target={self._holder}", "--"]

    def enter(self, *command: str, timeout: float = 30.0) -> str:
        """Run a command in the engine's namespaces; its output. Raises DockerError."""
        return run_command([*self._entering(), *command], timeout=timeout)

    def environment(self, **changes: str) -> dict[str, str]:
        """For docker and docker-compose."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SPLICER_", "DOCKER_", "COMPOSE_", "DEMO_"))
        }
        # The builder that every engine has, and a client's configuration of nobody's.
        own = {
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_BUILDKIT": "0",
            "COMPOSE_DOCKER_CLI_BUILD": "0",
            "DOCKER_CONFIG": str(self.directory / "client"),
        }
        return {**kept, **own, **changes}

    def docker(self, *arguments: str, timeout: float = 60.0, stdin: IO[bytes] | None = None) -> str:
        """A docker command's output. Raises DockerError."""
        return run_command(["docker", *arguments], timeout=timeout, env=self.environment(), stdin=stdin)

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine knows about a container or image."""
        return dict(json.loads(self.docker("inspect", name))[0])

    def run_container(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """Start a container in the background; its id."""
        return self.docker("run", "--detach", *options, image, *command).strip()

    def remove_containers(self, *names: str) -> None:
        """Remove these containers, or all."""
        wanted = list(names) or self.docker("ps", "--all", "--quiet").split()
        if wanted:
            self.docker("rm", "--force", "--volumes", *wanted, timeout=120)


def moving(homes: Iterable[Path]) -> list[str]:
    """What goes before a command that shall run in these cgroups."""
    script = "".join(f"echo $$ >'{home}/cgroup.procs' && " for home in homes)
    return ["sh", "-c", f'{script}exec "$@"', "sh"]


def run_command(
    command: Sequence[str],
    *,
    timeout: float,
    env: dict[str, str] | None = None,
    stdin: IO[bytes] | None = None,
) -> str:
    done = subprocess.run(
        command,
        stdin=stdin or subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
        env=env,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        raise DockerError(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout
