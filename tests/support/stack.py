# SPDX-License-Identifier: Apache-2.0
"""The repository's docker-compose.yml on the tests' engine: sidecar, demonstration, and questions to them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from support import daemon
from support.bpf import count_spliced, list_attached
from support.daemon import REPOSITORY, ControlError, wait_until
from support.docker import DockerError, Engine
from support.images import DEMO
from support.requirements import find_compose

PROJECT = "splicertest"
# Where the demonstration's image has the package.
REPORT = "/usr/lib/python3/dist-packages/splicer/bench/loads/report.lua"
CLIENT = Path(__file__).with_name("keepalive.py")
HEALTHY_TIMEOUT = 45.0  # seconds
LONGEST_LOAD = 600  # seconds after which load ends that nobody has ended


class Stack:
    """The compose project. `settings` are the SPLICER_* variables of the sidecar."""

    def __init__(self, engine: Engine, **settings: str) -> None:
        self.engine = engine
        self.config = engine.directory / "etc" / "splicer.toml"
        self.config.parent.mkdir(exist_ok=True)
        self.config.write_text("")
        self.settings = {
            "SPLICER_CGROUP": str(engine.attached_at),
            "SPLICER_CONFIG_DIR": str(self.config.parent),
            "SPLICER_CONFIG": f"/etc/splicer/{self.config.name}",
            **settings,
        }
        self.run_dir = engine.run / "splicer"
        self.pin_dir = engine.bpffs.path / "splicer"

    # -- compose -------------------------------------------------------------------------------------------

    def compose(self, *arguments: str, timeout: float = 120.0, **changes: str) -> str:
        """Output of a docker-compose command. Raises DockerError."""
        file = str(REPOSITORY / "docker-compose.yml")
        program = find_compose()
        assert program is not None
        command = [*program, "--project-name", PROJECT, "--file", file]
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=REPOSITORY,
            env=self.engine.environment(**self.settings, **changes),
        )
        if done.returncode:
            raise DockerError(f"docker-compose {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def container(self, service: str) -> str:
        """Id of a service's container. Raises AssertionError if there is not exactly one."""
        found = self.engine.docker(
            *("ps", "--all", "--quiet", "--no-trunc"),
            *("--filter", f"label=com.docker.compose.project={PROJECT}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).split()
        assert len(found) == 1, f"containers of {service}: {found}"
        return found[0]

    def up(self, *services: str, **changes: str) -> None:
        """Start services; returns when the sidecar answers."""
        self.compose("--profile", "demo", "up", "--detach", "--no-build", *services, **changes)
        self.wait_answering(HEALTHY_TIMEOUT)

    def down(self) -> None:
        self.compose("--profile", "demo", "down", "--timeout", "20", timeout=180)

    # -- the sidecar ---------------------------------------------------------------------------------------

    @property
    def sidecar(self) -> str:
        return self.container("splicer")

    def wait_healthy(self) -> None:
        identifier = self.sidecar

        def is_healthy() -> bool:
            state = self.engine.inspect(identifier)["State"]
            assert state["Status"] == "running", f"the sidecar is {state['Status']}:\n{self.logs()}"
            return bool(state["Health"]["Status"] == "healthy")

        wait_until("the sidecar is healthy", is_healthy, timeout=HEALTHY_TIMEOUT, pause=0.25)

    def wait_answering(self, timeout: float = 20.0) -> None:
        """Sooner than health, which is looked at every ten seconds."""

        def answers() -> bool:
            with contextlib.suppress(OSError, ValueError):
                self.status()
                return True
            return False

        wait_until("the sidecar answers", answers, timeout=timeout, pause=0.1)

    def logs(self, service: str = "splicer") -> str:
        done = subprocess.run(
            ["docker", "logs", "--tail", "1000", self.container(service)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.engine.environment(),
            text=True,
            check=False,
        )
        return done.stdout

    def splicer(self, *arguments: str) -> str:
        """Output of a splicer command in the sidecar. Raises DockerError."""
        return self.engine.docker("exec", self.sidecar, "splicer", *arguments)

    def ask(self, command: str, **fields: Any) -> Any:
        return daemon.ask(self.run_dir, command, **fields)

    def status(self) -> dict[str, Any]:
        return dict(self.ask("status"))

    def flows(self, *containers: str) -> list[dict[str, Any]]:
        """Flows; with names, those with one of these containers at either end."""
        flows = list(self.ask("flows")["flows"])
        if containers:
            flows = [flow for flow in flows if _containers_of(flow) & set(containers)]
        return flows

    def count_spliced(self, *containers: str) -> int:
        """Spliced connections, all or those of the named containers."""
        return sum(flow["state"] == "spliced" for flow in self.flows(*containers))

    def policy(self, container: str) -> dict[str, Any]:
        """What `splicer policy` says about one container. Raises AssertionError if it says nothing yet."""
        with contextlib.suppress(ControlError):
            found = self.ask("policy", container=container)["containers"]
            if len(found) == 1:
                return dict(found[0])
        return {}

    def count_in_sockhash(self) -> int:
        return count_spliced(self.pin_dir)

    def is_attached(self) -> bool:
        return bool(list_attached(self.engine.cgroup.path))

    def count_pins(self) -> int:
        return len(self.engine.bpffs.pins())


def _containers_of(flow: dict[str, Any]) -> set[str]:
    return {str(flow.get(end, {}).get("container", "")) for end in ("client", "server")}


class Network:
    """A bridge network with one nginx on it, `name`, and wrk containers against it."""

    def __init__(self, engine: Engine, name: str, *options: str) -> None:
        self.engine = engine
        self.name = name
        engine.docker("network", "create", name)
        self.serve(name, *options)

    def serve(self, name: str, *options: str) -> str:
        """Start one more nginx; its id. Returns when it listens."""
        identifier = self.engine.run_container(
            DEMO,
            *("nginx", "-c", "/etc/splicer-demo/web.conf"),
            options=["--name", name, "--network", self.name, *options],
        )
        pid = self.engine.inspect(identifier)["State"]["Pid"]
        wait_until("nginx listens", lambda: listens(pid, 8080), timeout=10)
        return identifier

    def start_load(
        self, name: str, url: str, *options: str, connections: int = 8, network: str | None = None
    ) -> str:
        """wrk in the background, until finish_load(); the container's id."""
        return self.engine.run_container(
            DEMO,
            *load_command(url, connections),
            options=["--name", name, "--network", network or self.name, *options],
        )

    def start_client(self, name: str, *hosts: str, connections: int = 4) -> str:
        """A keep-alive client that tries again (support/keepalive.py), in the background and until
        finish_load(); its id."""
        return self.engine.run_container(
            DEMO,
            *("python3", "/keepalive.py", str(LONGEST_LOAD), str(connections), *hosts),
            options=["--name", name, "--network", self.name, f"--volume={CLIENT}:/keepalive.py:ro"],
        )

    def finish_load(self, name: str, seconds: float = 1.0) -> dict[str, Any]:
        """See finish_load()."""
        return finish_load(self.engine, name, seconds)

    def remove(self) -> None:
        """The network; its containers first."""
        found = self.engine.docker("ps", "--all", "--quiet", "--filter", f"network={self.name}").split()
        if found:
            self.engine.remove_containers(*found)
        self.engine.docker("network", "rm", self.name)


def load_command(url: str, connections: int) -> list[str]:
    """wrk, in the demonstration's image, until finish_load()."""
    options = ["-t1", f"-c{connections}", f"-d{LONGEST_LOAD}", "--timeout", "10s", "-s", REPORT]
    return ["wrk", *options, url]


def finish_load(engine: Engine, name: str, seconds: float = 1.0) -> dict[str, Any]:
    """Have wrk or the client go on for some seconds and end; the JSON it ends with. The container is removed.

    wrk: requests, duration and p50 (microseconds), errors. The client: see support/keepalive.py.
    """
    time.sleep(seconds)
    with contextlib.suppress(DockerError):  # it has ended; its last line says why
        engine.docker("kill", "--signal", "INT", name)
    engine.docker("wait", name, timeout=60)
    text = engine.docker("logs", name)
    engine.remove_containers(name)
    return dict(json.loads(text.strip().splitlines()[-1]))


def listens(pid: int, port: int) -> bool:
    """A socket in state LISTEN (0A) on the port, in the namespace of a process."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    return True
    return False
