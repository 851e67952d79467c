# SPDX-License-Identifier: Apache-2.0
"""The real SDK against a server that behaves like an engine, and like one that is in trouble."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import daemon
from support.engine import FakeEngine, name_id
from support.pauses import Stopwatch

from splicer.containers import engine
from splicer.containers.engine import (
    Engine,
    EngineError,
    Event,
    Events,
    InspectedContainer,
    find_endpoint,
    list_candidates,
)


@pytest.fixture
def fake(run_dir: str) -> Iterator[FakeEngine]:
    server = FakeEngine(f"{run_dir}/e.sock")
    yield server
    server.stop()


@pytest.fixture
def connect(fake: FakeEngine) -> Iterator[Callable[..., Engine]]:
    made = []

    def call(timeout: float = 5.0, idle: float = 30.0) -> Engine:
        made.append(Engine(fake.url, {}, timeout=timeout, idle=idle))
        return made[-1]

    yield call
    for each in made:
        each.close()


@pytest.fixture
def stream(fake: FakeEngine, connect: Callable[..., Engine]) -> Iterator[Events]:
    """Events that somebody listens to already."""
    made = connect().follow()
    fake.wait_for_stream()
    yield made
    made.release()


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    daemon.wait_until("it comes to that", holds, timeout=seconds, pause=0.01)


def list_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def count_open() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list_fds()), threading.active_count()


# -- where it is ---------------------------------------------------------------------------------------------


def test_candidates() -> None:
    assert list_candidates("unix:///x", {"DOCKER_HOST": "unix:///y"}) == ("unix:///x",)
    assert list_candidates("auto", {}) == engine.SOCKETS
    assert list_candidates("auto", {"DOCKER_HOST": "unix:///y"}) == ("unix:///y", *engine.SOCKETS)


def test_the_first_that_exists(tmp_path: Path) -> None:
    there, missing = tmp_path / "there", f"unix://{tmp_path}/missing"
    there.touch()
    assert find_endpoint((missing, f"unix://{there}", missing)) == f"unix://{there}"
    assert find_endpoint((missing, "tcp://10.0.0.1:2375", f"unix://{there}")) == "tcp://10.0.0.1:2375"
    assert find_endpoint((missing,)) == missing, "who names one wants to hear of that one"
    with pytest.raises(EngineError) as caught:
        find_endpoint((missing, f"unix://{tmp_path}/other"))
    assert caught.value.kind == "absent"
    assert missing in caught.value.message


# -- what it answers -----------------------------------------------------------------------------------------


def test_a_list_and_a_container(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    identifier = fake.run(
        1,
        name="demo-web-1",
        labels={"splicer.mode": "eager"},
        pid=42,
        ports={
            "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}],
            "1/udp": None,
        },
    )
    client = connect()
    (listed,) = client.list_running()
    assert listed.id == identifier
    assert client.inspect(identifier) == InspectedContainer(
        id=identifier,
        name="demo-web-1",
        image="nginx:alpine",
        labels={"splicer.mode": "eager"},
        pid=42,
        network_mode="bridge",
        published=("0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp"),
    )
    assert client.inspect(name_id(2)) is None
    assert fake.methods == {"GET"}, "the engine is asked and never told"
    assert "/v1.47/containers/json?" in fake.requests[1]


def look(client: Engine, identifier: str) -> InspectedContainer:
    found = client.inspect(identifier)
    assert found is not None
    return found


def test_states_of_a_container(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    identifier = fake.run(1, mode="host")
    client = connect()
    found = look(client, identifier)
    assert (found.pid, found.network_mode) == (1001, "host")
    # Podman's way of saying that it is paused.
    fake.containers[identifier]["State"] |= {"Running": False, "Paused": True}
    assert look(client, identifier).pid == 1001
    fake.die(identifier)
    assert look(client, identifier).pid == 0


def test_annotations_of_docker(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    identifier = fake.run(1)
    assert look(connect(), identifier).annotations == {}
    fake.containers[identifier]["HostConfig"]["Annotations"] = {"splicer.mode": "off"}
    assert look(connect(), identifier).annotations == {"splicer.mode": "off"}
    assert not any("libpod" in each for each in fake.requests)


class TestPodman:
    """What Docker's words have no place for is asked in Podman's."""

    @pytest.fixture
    def identifier(self, fake: FakeEngine) -> str:
        fake.become_podman()
        identifier = fake.run(1, name="shop-web")
        said = {"Annotations": {"splicer.ports": "80,443"}, "Labels": {"not": "asked"}}
        fake.own[f"containers/{identifier}/json"] = {"Config": said, "Pod": "5" * 64}
        fake.own[f"pods/{'5' * 64}/json"] = {"Id": "5" * 64, "Name": "shop"}
        return identifier

    def test_annotations_and_pod(
        self, fake: FakeEngine, connect: Callable[..., Engine], identifier: str
    ) -> None:
        found = look(connect(), identifier)
        assert (found.name, found.labels) == ("shop-web", {})
        assert (found.annotations, found.pod) == ({"splicer.ports": "80,443"}, "shop")
        assert f"/v4.3.1/libpod/containers/{identifier}/json" in fake.requests
        assert fake.methods == {"GET"}

    def test_neither(self, fake: FakeEngine, connect: Callable[..., Engine], identifier: str) -> None:
        fake.own[f"containers/{identifier}/json"] = {"Config": {"Annotations": None}, "Pod": ""}
        found = look(connect(), identifier)
        assert (found.annotations, found.pod) == ({}, "")

    @pytest.mark.parametrize("code", [403, 404])
    def test_somebody_lets_only_dockers_words_through(
        self, fake: FakeEngine, connect: Callable[..., Engine], identifier: str, code: int
    ) -> None:
        fake.statuses = {f"libpod/containers/{identifier}/json": code}
        found = look(connect(), identifier)
        assert (found.name, found.annotations, found.pod) == ("shop-web", {}, "")

    def test_it_fails_now(self, fake: FakeEngine, connect: Callable[..., Engine], identifier: str) -> None:
        """It is asked again, and not taken for one that says nothing: it may say that it be left alone."""
        fake.statuses = {f"libpod/containers/{identifier}/json": 500}
        with pytest.raises(EngineError) as caught:
            connect().inspect(identifier)
        assert caught.value.kind == "failed"


def test_what_is_null_is_nothing(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    identifier = fake.run(1, labels=None, ports=None, mode="", networks=None)
    client = connect()
    assert len(client.list_running()) == 1
    found = look(client, identifier)
    assert (found.labels, found.published, found.network_mode) == ({}, (), "")


def test_the_fingerprint(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    client = connect()

    def take(**changes: object) -> int:
        fake.run(1, **changes)
        (listed,) = client.list_running()
        return listed.fingerprint

    networks = {"a": {"IPAddress": "10.0.0.1"}, "b": {"IPAddress": "10.0.1.1"}}
    same = take(networks=networks)
    assert take(networks=networks) == same, "only how long it is up has changed"
    assert take(networks=dict(reversed(networks.items()))) == same
    assert take(networks={"a": {"IPAddress": "10.0.0.2"}}) != same
    assert take(networks=networks, name="other") != same
    assert take(networks=networks, labels={"splicer.enable": "true"}) != same


def test_versions(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    fake.version["ApiVersion"] = "1.41"
    connect().list_running()
    assert fake.requests[0] == "/version"
    assert fake.requests[1].startswith("/v1.41/")


# -- what goes wrong -----------------------------------------------------------------------------------------


def fails(call: Callable[[], object], kind: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        call()
    assert caught.value.kind == kind
    assert "\n" not in caught.value.message
    return caught.value


def test_nobody_there(run_dir: str) -> None:
    error = fails(lambda: Engine(f"unix://{run_dir}/none", {}), "absent")
    assert "No such file" in error.message
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{run_dir}/stale")
    assert "refused" in fails(lambda: Engine(f"unix://{run_dir}/stale", {}), "absent").message
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fails(lambda: Engine(f"tcp://127.0.0.1:{port}", {}), "absent")


def test_not_allowed(
    fake: FakeEngine, connect: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.statuses["/containers/json"] = 403
    assert "403" in fails(connect().list_running, "refused").message

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    error = fails(lambda: Engine(fake.url, {}), "refused")
    assert "Permission denied" in error.message
    assert error.hint is not None


@pytest.mark.parametrize(
    "endpoint", ["ssh://root@elsewhere", "npipe:////./pipe/docker", "/run/docker.sock", ""]
)
def test_an_address_of_no_use(endpoint: str) -> None:
    fails(lambda: Engine(endpoint, {}), "refused")


def test_an_engine_that_fails(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    fake.statuses["/json"] = 500
    client = connect()
    assert "status 500 by order" in fails(lambda: client.inspect(name_id(1)), "failed").message
    fake.statuses["/events"] = 503
    fails(lambda: client.follow(), "failed")


@pytest.mark.parametrize(
    "answer", [b"", b"hello", b"[]", b"{}", b"null", b'{"ApiVersion": 7}', b'{"ApiVersion": "x.y"}']
)
def test_something_else_listens_there(fake: FakeEngine, answer: bytes) -> None:
    fake.version = answer
    with pytest.raises(EngineError):
        Engine(fake.url, {})


def test_something_that_does_not_speak_http(run_dir: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{run_dir}/odd")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail ready\r\n")
            connection.close()

        threading.Thread(target=serve).start()
        fails(lambda: Engine(f"unix://{run_dir}/odd", {}), "lost")


def test_an_engine_that_never_answers(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    # The version is asked for first, and has to come in time.
    client = connect(timeout=2.0, idle=2.0)
    fake.hang |= {"/version", "/containers/json", "/events"}
    for call in (lambda: Engine(fake.url, {}, timeout=0.2), client.list_running, client.follow):
        with Stopwatch() as watch:
            assert "does not answer" in fails(call, "lost").message
        assert watch.seconds < 4


def test_an_engine_that_ends_in_the_middle(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    client = connect()
    fake.calls["/containers/json"] = fake.cut
    fails(client.list_running, "lost")
    fake.stop()
    fails(client.list_running, "absent")


def test_the_sdk_is_too_old_for_what_it_stands_on(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def refuse(*_: object, **__: object) -> None:
        raise requests.exceptions.InvalidSchema("Not supported URL scheme http+docker")

    monkeypatch.setattr(requests.Session, "send", refuse)
    assert "pip install --upgrade docker" in str(fails(lambda: Engine(fake.url, {}), "refused").hint)


def test_the_sdk_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    assert "apt install" in str(fails(lambda: Engine("unix:///x", {}), "refused").hint)


def test_the_sdk_is_loaded_only_when_it_is_needed() -> None:
    source = (
        "import sys, splicer.containers.watcher\n"
        "sys.exit('docker' in sys.modules or 'requests' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


# -- events --------------------------------------------------------------------------------------------------


def test_events(fake: FakeEngine, stream: Events) -> None:
    one = fake.run(1)
    fake.emit("exec_create: sh -c true", one)
    fake.emit("health_status: healthy", one)
    fake.emit("connect", one, "network")
    fake.emit("create", one, "network")
    fake.emit("pull", one, "image")
    fake.send(b"\n")
    fake.emit("destroy", one)
    # Podman puts the container's id where Docker puts the network's, and has no nanoseconds everywhere.
    fake.send(
        b'{"Type":"network","Action":"disconnect","Actor":{"ID":"' + one.encode() + b'"},"time":2000000000}\n'
    )
    fake.send(b'{"Type":"container","status":"died","id":"' + one.encode() + b'"}\n')
    seen: list[Event] = []
    for events in stream:
        seen += events
        if len(seen) == 5:
            stream.stop()
    assert [(each.action, each.container) for each in seen] == [
        (action, one) for action in ("start", "connect", "destroy", "disconnect", "died")
    ]
    assert stream.last_ns == 2_000_000_000 * 10**9
    assert not stream.idle


def test_events_cut_into_pieces_and_packed_together(fake: FakeEngine, stream: Events) -> None:
    line = b'{"Type":"container","Action":"die","Actor":{"ID":"%d"},"timeNano":1}\n'
    fake.send((line % 1)[:20])
    fake.send((line % 1)[20:] + line % 2 + line % 3 + (line % 4)[:-1])
    fake.send(b"\n")
    seen: list[str] = []
    for events in stream:
        seen += [each.container for each in events]
        if len(seen) == 4:
            stream.stop()
    assert seen == ["1", "2", "3", "4"]


def test_a_stream_is_stopped_from_another_thread(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    client = connect()
    stream = client.follow()
    threading.Timer(0.1, stream.stop).start()
    with Stopwatch() as watch:
        assert list(stream) == []
    assert watch.seconds < 1
    assert not stream.idle
    stream.release()
    stream.release()
    stream.stop()


def test_a_stream_that_is_idle_can_be_taken_up_again(
    fake: FakeEngine, connect: Callable[..., Engine]
) -> None:
    # The headers have to come within that time, too.
    client = connect(idle=2.0)
    stream = client.follow()
    fake.wait_for_stream()
    one = fake.run(1)
    assert [each.container for events in stream for each in events] == [one]
    assert stream.idle
    stream.release()
    two = fake.run(2)
    stream = client.follow(stream.last_ns + 1)
    assert [each.container for events in stream for each in events] == [two]
    stream.release()


@pytest.mark.parametrize("how", ["cut", "stop"])
def test_a_stream_that_is_cut(fake: FakeEngine, stream: Events, how: str) -> None:
    fake.send(b'{"Type":"container","Act')
    threading.Timer(0.1, getattr(fake, how)).start()
    assert list(stream) == []
    assert not stream.idle


@pytest.mark.parametrize(
    "raw", [b"hello\n", b"[1]\n", b'"x"\n', b'{"Type":"container","Action":"die","Actor":7}\n']
)
def test_what_is_no_event(fake: FakeEngine, stream: Events, raw: bytes) -> None:
    fake.send(raw)
    with pytest.raises(EngineError, match="cannot be understood"):
        list(stream)


def test_an_event_without_end(fake: FakeEngine, stream: Events) -> None:
    for _ in range(9):
        fake.send(b" " * (1 << 17))
    with pytest.raises(EngineError, match="without end"):
        list(stream)


def test_attempts_that_fail_leave_nothing_open(run_dir: str, fake: FakeEngine) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{run_dir}/stale")
    fake.version = b"nonsense"
    gc.collect()
    fds = len(list_fds())
    for endpoint in (f"unix://{run_dir}/none", f"unix://{run_dir}/stale", fake.url):
        for _ in range(20):
            with contextlib.suppress(EngineError):
                Engine(endpoint, {})
        gc.collect()
        wait_until(lambda: len(list_fds()) <= fds)


def test_connections_are_few(fake: FakeEngine, connect: Callable[..., Engine]) -> None:
    client = connect()
    for number in range(50):
        client.inspect(fake.run(number))
        client.inspect(name_id(1000 + number))
    wait_until(lambda: len(fake._connections) <= 2)


def test_nothing_stays_open(fake: FakeEngine) -> None:
    fake.run(1)

    def visit(idle: float) -> None:
        with contextlib.closing(Engine(fake.url, {}, idle=idle)) as client:
            client.list_running()
            client.inspect(name_id(1))
            client.inspect(name_id(2))
            try:
                stream = client.follow()
            except EngineError:
                # The headers need not come within so short a time. That leaves nothing open either.
                assert idle < 1
                return
            if idle > 1:
                threading.Timer(0.02, stream.stop).start()
            list(stream)
            stream.release()

    visit(30.0)
    wait_until(lambda: not fake._connections or bool(fake.emit("start", name_id(1))))
    gc.collect()
    # Both counts are made while wait_until measures, with threads of its own.
    fds, threads = daemon.wait_until("a first count", count_open)
    for turn in range(12):
        visit(0.05 if turn % 2 else 30.0)
    # The server finds out that a stream has ended when it writes to it.
    wait_until(lambda: not fake._connections or bool(fake.emit("start", name_id(1))))
    wait_until(lambda: all(now <= before for now, before in zip(count_open(), (fds, threads), strict=True)))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the standard library has no distutils any more")
def test_the_sdk_brings_no_build_tools() -> None:
    """An SDK that wants distutils is content with the standard library's."""
    program = """
import contextlib, sys
from splicer.containers.engine import Engine, EngineError
with contextlib.suppress(EngineError):
    Engine("unix:///nothing/here", {})
print("docker" in sys.modules, "setuptools" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done
