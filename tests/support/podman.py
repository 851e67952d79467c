# SPDX-License-Identifier: Apache-2.0
"""A Podman of the tests' own, which shares nothing with the machine's.

Its service is asked by Docker's client, as dockerd is; `podman` itself is there for what only that can do.
Podman puts pods below the root of the cgroups, in libpod_parent, and cannot be told otherwise. So it gets a
root of its own: in its namespaces the hierarchy begins with the test's cgroup. The rest of what it writes
outside of its storage is private as well, or in a directory of the test's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.cgroup import find_v2_root, make_v1_directories
from support.docker import DockerError, Engine, moving, run_command
from support.tiers import spread

_SOCKET = "podman/podman.sock"  # below /run, where Podman's own unit has it
_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{directory}/storage"
runroot = "/run/containers/storage"
"""
# Podman asks for a million open files, which takes CAP_SYS_RESOURCE where the limit is lower. Soft and hard
# limit are the same number, since 4.3 exchanges the two.
_CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
pidns = "{pidns}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""


def on_both_engines(reason: str = "") -> pytest.MarkDecorator:
    """Run a module's tests with dockerd and with Podman. With a reason, Podman is left to `make test-all`."""
    engines = spread(("dockerd", "podman"), ("dockerd",), reason) if reason else ["dockerd", "podman"]
    return pytest.mark.parametrize("engine", engines, indirect=True, scope="module")


class Podman(Engine):
    """`podman system service`, and `podman`."""

    NAMESPACES: Mapping[str, str] = {**Engine.NAMESPACES, "cgroup": "cgroup"}

    def __init__(self) -> None:
        super().__init__()
        self._v1: dict[Path, Path] = {}

    # -- life ----------------------------------------------------------------------------------------------

    def _make_homes(self) -> None:
        super()._make_homes()
        self._v1 = make_v1_directories(self.cgroup.path.name)

    def _homes(self) -> list[Path]:
        return [*super()._homes(), *self._v1.values()]

    def _birthplaces(self) -> list[Path]:
        # What is the root in a cgroup namespace is where it was made.
        return [self.cgroup.path, *self._v1.values()]

    def _prepare_run(self) -> None:
        super()._prepare_run()
        (self.run / "podman").mkdir()
        (self.directory / "networks").mkdir()
        (self.directory / "lib").mkdir()
        (self.directory / "cache").mkdir()
        self.cgroup.child("engine").add(self._holder)
        root = find_v2_root()
        assert root is not None
        for place, ours in (self._v1 | {root: self.cgroup.path}).items():
            self.enter("mount", "--bind", str(ours), str(place))
        # Whatever is attached to the root in there must be attached to ours.
        found = int(self.enter("stat", "--format=%i", str(root)))
        assert found == self.cgroup.path.stat().st_ino
        # Locks, and a cache of Podman's that no setting concerns; and that of splicer.
        self.enter("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
        for name in ("lib", "cache"):
            self.enter("mount", "--bind", str(self.directory / name), f"/var/{name}")
        (self.directory / "storage.conf").write_text(_STORAGE.format(directory=self.directory))
        # Podman 4.3 does not know `hostPID: true`, but follows what is the default for all containers.
        for pidns in ("private", "host"):
            self._configuration(pidns).write_text(
                _CONFIGURATION.format(
                    directory=self.directory,
                    pidns=pidns,
                )
            )

    def _configuration(self, pidns: str) -> Path:
        return self.directory / f"containers-{pidns}.conf"

    # -- the service -----------------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        return self.run / _SOCKET

    @property
    def attached_at(self) -> Path:
        root = find_v2_root()
        assert root is not None
        return root

    def start_service(self, *arguments: str, live_restore: bool = True) -> None:
        """Start Podman's service and wait until it answers. Containers never need it."""
        assert live_restore
        command = ("podman", "system", "service", "--time=0", *arguments, f"unix:///run/{_SOCKET}")
        self._service = self._spawn("env", *self._settings(), *self._entering(), *command, log=self.log)
        self._wait_answering()

    def remove(self) -> None:
        with contextlib.suppress(
            DockerError, OSError, subprocess.TimeoutExpired
        ):  # the rest goes with the cgroup
            self.podman("pod", "rm", "--force", "--all", "--time=5")
        super().remove()

    # -- podman ----------------------------------------------------------------------------------------------

    def _settings(self, pidns: str = "private") -> list[str]:
        return [
            f"CONTAINERS_CONF={self._configuration(pidns)}",
            f"CONTAINERS_STORAGE_CONF={self.directory}/storage.conf",
        ]

    def podman(self, *arguments: str, timeout: float = 60.0, pidns: str = "private") -> str:
        """A podman command's output. Raises DockerError. `pidns` "host": containers it makes share the host's
        pid namespace."""
        before = [*moving(self._homes()), "env", *self._settings(pidns), *self._entering()]
        return run_command([*before, "podman", *arguments], timeout=timeout)

    def inspect_pod(self, name: str) -> dict[str, Any]:
        """What Podman knows about a pod."""
        return dict(json.loads(self.podman("pod", "inspect", name)))

    def play(self, file: Path, *, pidns: str = "private") -> None:
        """podman kube play. Raises DockerError."""
        self.podman("kube", "play", str(file), pidns=pidns)

    def take_images(self, engine: Engine, *names: str) -> None:
        """Take images from another engine."""
        archive = self.directory / "images.tar"
        engine.docker("save", "--output", str(archive), *names, timeout=180)
        try:
            self.podman("load", "--input", str(archive), timeout=180)
        finally:
            archive.unlink()
