# SPDX-License-Identifier: Apache-2.0
"""The DaemonSet's pod, run by `podman kube play`: what it splices, how it stops, and what pods can say to it.

examples/kubernetes/README.md says the same to users. That the Docker watcher follows Podman's service:
test_dockerd.py and others, which run with both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import pauses
from support.bpf import list_objects, list_pinned
from support.daemon import REPOSITORY, wait_until
from support.docker import Engine
from support.images import DEMO, SPLICER, base_of
from support.pauses import Stopwatch
from support.podman import Podman
from support.stack import Stack, finish_load, listens, load_command
from support.tiers import thorough

MANIFEST = REPOSITORY / "examples/kubernetes/splicer.yaml"
CONNECTIONS = 4
# What `splicer doctor` may warn of in the pod: what the test has to change, and what is the machine's.
WARNINGS = {
    "cgroup_root",  # the test's cgroup is the root in there
    "cap_net_broadcast",  # not given, and not needed
    "fionread",  # the kernel's class
    "neighbours",  # the very daemon that runs, and others on this machine
}
POD = "splicer-pod-0"  # the first of a Deployment's
SOCKET = "unix:///run/podman/podman.sock"


def read_manifest() -> str:
    """The manifest as Podman before 4.7 reads it, which does not know the kind DaemonSet."""
    text = MANIFEST.read_text()
    assert text.count("\nkind: DaemonSet\n") == 1
    return text.replace("\nkind: DaemonSet\n", "\nkind: Deployment\n")


def follow_podman(text: str) -> str:
    """The same, told to follow Podman: the socket, and the directory that it is in."""
    documents = list(yaml.safe_load_all(text))
    pod = next(each for each in documents if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    container["args"][container["args"].index("--docker") + 1] = SOCKET
    container["volumeMounts"].append({"name": "podman", "mountPath": "/run/podman", "readOnly": True})
    pod["volumes"].append({"name": "podman", "hostPath": {"path": "/run/podman", "type": "Directory"}})
    return yaml.safe_dump_all(documents)


class Played(Stack):
    """What the manifest makes, in place of the compose file's sidecar."""

    def __init__(self, podman: Podman, manifest: str, directory: Path) -> None:
        super().__init__(podman)
        self.podman = podman
        self.file = directory / "splicer.yaml"
        self.file.write_text(manifest)

    def up(self, *_: str, **__: str) -> None:
        # The manifest's `hostPID: true` is known to Podman since 4.4.
        self.podman.play(self.file, pidns="host")
        self.wait_answering(timeout=45)

    def down(self) -> None:
        # Podman 4.3 gives nobody time to end by himself when it takes a manifest down.
        self.stop()
        self.podman.podman("kube", "down", str(self.file))

    def container(self, service: str) -> str:
        return f"{POD}-{service}"

    def stop(self) -> None:
        """As an orchestrator does: SIGTERM, and a grace period."""
        self.podman.podman("pod", "stop", "--time=20", POD)


class Pods:
    """Pods of one container each, from the demonstration's image."""

    def __init__(self, podman: Podman, directory: Path) -> None:
        self.podman = podman
        self._directory = directory

    def play(self, name: str, container: str, command: list[str], **metadata: Any) -> str:
        """Start a pod; the name of its container."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **metadata},
            "spec": {
                "restartPolicy": "Never",
                "containers": [
                    {"name": container, "image": DEMO, "imagePullPolicy": "IfNotPresent", "command": command}
                ],
            },
        }
        file = self._directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(pod))
        self.podman.play(file)
        return f"{name}-{container}"

    def serve(self, name: str, **metadata: Any) -> str:
        """A pod with nginx, which listens when this returns."""
        container = self.play(name, "nginx", ["nginx", "-c", "/etc/splicer-demo/web.conf"], **metadata)
        pid = self.podman.inspect(container)["State"]["Pid"]
        wait_until("nginx listens", lambda: listens(pid, 8080), timeout=10)
        return container

    def load(self, name: str, server: str) -> str:
        """A pod with wrk against another pod, which goes by its name."""
        return self.play(name, "wrk", load_command(f"http://{server}:8080/", CONNECTIONS))

    def remove(self) -> None:
        names = self.podman.podman("pod", "ps", "--format={{.Name}}").split()
        if names := [name for name in names if name != POD]:
            self.podman.podman("pod", "rm", "--force", "--time=2", *names)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def image(podman: Podman) -> None:
    """The image by the name that the manifest has for it."""
    name = next(each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "DaemonSet")
    podman.podman("tag", SPLICER, name["spec"]["template"]["spec"]["containers"][0]["image"])


@pytest.fixture
def pods(podman: Podman, directory: Path) -> Iterator[Pods]:
    made = Pods(podman, directory)
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def played(podman: Podman, image: None, directory: Path) -> Iterator[Played]:
    """The DaemonSet's pod as the manifest has it."""
    yield from _play(Played(podman, read_manifest(), directory))


@pytest.fixture
def following(podman: Podman, image: None, directory: Path) -> Iterator[Played]:
    """The same, told to follow Podman."""
    yield from _play(Played(podman, follow_podman(read_manifest()), directory))


def _play(made: Played) -> Iterator[Played]:
    try:
        made.up()
        yield made
    finally:
        made.down()
    assert not made.is_attached()
    assert made.count_pins() == 0


def _wait_spliced(stack: Stack, container: str) -> None:
    wait_until(
        f"{container} is spliced",
        lambda: stack.count_spliced(container) == CONNECTIONS,
        timeout=20,
        pause=0.1,
    )


def test_the_pod_of_the_manifest(podman: Podman, played: Played, pods: Pods) -> None:
    """Healthy and able inside; what pods say to each other is spliced, and whose it is comes from cgroups."""
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f"\n          {probe}:\n" in played.file.read_text()
    assert "Running" in played.splicer("status")
    played.splicer("status", "--brief")  # the three probes; a code other than 0 raises
    found = json.loads(played.splicer("doctor", "--json"))
    assert found["can_run"]
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert {name for name, state in states.items() if state != "ok"} <= WARNINGS
    assert set(states.values()) <= {"ok", "warn"}
    assert states["pids"] == states["bpffs"] == states["daemon"] == "ok"

    web, load = pods.serve("web"), pods.load("load", "web")
    client, server = (podman.inspect(each)["Id"] for each in (load, web))
    _wait_spliced(played, server[:12])
    flows = played.flows(server[:12])
    assert {flow["state"] for flow in flows} == {"spliced"}
    assert {(flow["client"]["container"], flow["server"]["container"]) for flow in flows} == {
        (client[:12], server[:12])
    }
    assert {(flow["client"]["process"], flow["server"]["process"]) for flow in flows} == {("wrk", "nginx")}
    assert {flow["server"]["cgroup"].rpartition("/")[2] for flow in flows} == {f"libpod-{server}"}
    assert client[:12] in played.splicer("flows")

    ours = list_pinned(podman.bpffs.path)
    assert {kind for kind, _ in ours} == {"prog", "map", "link"}
    with Stopwatch() as watch:
        played.stop()
    assert watch.seconds < 19, "the grace period was not what ended it"
    state = podman.inspect(played.sidecar)["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    (drained,) = (line for line in played.logs().splitlines() if '"event": "drained"' in line)
    assert (json.loads(drained)["connections"], json.loads(drained)["unread_connections"]) == (CONNECTIONS, 0)
    assert not played.is_attached()
    assert played.count_pins() == 0
    assert not played.run_dir.joinpath("control.sock").exists()
    tally = finish_load(podman, load)
    assert tally["errors"] == 0
    assert tally["requests"] > 500
    wait_until("the kernel has let go of all of it", lambda: not ours & list_objects().keys())


@thorough("what was compiled is kept: kernel/test_cache.py")
def test_the_next_pod_need_not_compile(played: Played) -> None:
    played.down()
    played.up()
    events = [json.loads(line)["event"] for line in played.logs().splitlines()]
    assert "ready" in events
    assert "compiling" not in events
    assert "cache_not_written" not in events


def test_what_pods_say_by_label_and_annotation(following: Played, pods: Pods) -> None:
    """Podman tells of both; with its socket ends have names, and pods too."""
    willing = pods.serve(
        "willing", labels={"splicer.enable": "true"}, annotations={"splicer.ports": "80,8080"}
    )
    unwilling = pods.serve("unwilling", annotations={"splicer.mode": "off", "example.org/team": "a"})
    labelled = pods.serve("labelled", labels={"splicer.mode": "off"})
    # As an image's label, with the pod's annotation.
    both = pods.serve("both", labels={"splicer.mode": "off"}, annotations={"splicer.mode": "adaptive"})
    mistaken = pods.serve("mistaken", annotations={"splicer.mode": "adaptve"})
    expected = {
        willing: ("off", "annotation splicer.ports"),  # on its other ports
        unwilling: ("off", "annotation splicer.mode"),
        labelled: ("off", "label splicer.mode"),
        both: ("adaptive", "annotation splicer.mode"),
        mistaken: ("off", "annotation splicer.mode (bad value)"),
    }

    def read() -> dict[str, tuple[str, str]]:
        told = {name: following.policy(name) for name in expected}
        return {name: (each["mode"], each["mode_source"]) for name, each in told.items() if each}

    wait_until("all pods are known", lambda: len(read()) == len(expected), pause=0.1)
    assert read() == expected
    ports = following.policy(willing)["ports"]
    assert [(each["port"], each["mode"]) for each in ports] == [(80, "adaptive"), (8080, "adaptive")]
    (problem,) = following.status()["problems"]
    assert (problem["container"], problem["value"], problem["meant"]) == (mistaken, "adaptve", "adaptive")

    # One after the other: Podman answers nobody while all CPUs are busy.
    for name, server in (("willing", willing), ("both", both)):
        client = pods.load(f"to-{name}", name)
        _wait_spliced(following, server)
        ends = ((client, f"to-{name}"), (server, name))
        # Podman is asked about the client while it begins to talk.
        wait_until("both ends have names", lambda: _name_ends(following, server) == {ends}, timeout=20)  # noqa: B023
        assert finish_load(following.engine, client, seconds=0)["errors"] == 0
    for name, server in (("unwilling", unwilling), ("labelled", labelled)):
        client = pods.load(f"to-{name}", name)
        wait_until("it talks", lambda: len(following.flows(server)) >= CONNECTIONS, pause=0.1)  # noqa: B023
        pauses.sleep(1.0)  # long enough for it to be spliced, were it to be
        assert following.count_spliced(server) == 0
        assert {flow["reason"] for flow in following.flows(server)} == {"policy_off"}
        assert finish_load(following.engine, client, seconds=0)["errors"] == 0


def _name_ends(stack: Stack, server: str) -> set[tuple[tuple[str, str], ...]]:
    """Container and pod of client and server, of all flows of a server."""
    return {
        tuple((flow[end]["container"], flow[end]["pod"]) for end in ("client", "server"))
        for flow in stack.flows(server)
    }


@thorough("the image by another builder than test_image.py's")
def test_podman_builds_the_image(dockerd: Engine, podman: Podman) -> None:
    podman.take_images(dockerd, base_of(REPOSITORY / "Dockerfile")[0])
    podman.podman("build", "--network=host", "--tag=built-here", str(REPOSITORY), timeout=600)
    try:
        assert "splicer" in podman.podman("run", "--rm", "--network=none", "built-here", "version")
    finally:
        podman.podman("rmi", "built-here")
