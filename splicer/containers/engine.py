# SPDX-License-Identifier: Apache-2.0
"""The container engine: Docker, or Podman's service that speaks like it. It is asked and never told.

What the SDK would wait for without end is asked here with a time limit: events() of its client has none.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import socket
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any, Literal, NamedTuple

from splicer.errors import SplicerError

SOCKETS = ("unix:///var/run/docker.sock", "unix:///run/podman/podman.sock")

# An engine under load may need seconds; one that needs more is of no use.
_TIMEOUT_S = 5.0
# Nothing may happen for hours, but a connection that died without a word must be noticed some time. An engine
# that hangs is waited for as long, since the answer's first line and its last are waited for alike.
_IDLE_S = 15.0
_LONGEST_EVENT = 1 << 20

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED)
_REFUSED = (errno.EACCES, errno.EPERM)

_SCHEMES = ("unix:///", "tcp://", "http://", "https://")

# Podman has words of its own: died, remove, cleanup. Everything else that happens to a container says nothing
# new about it; its health check alone would bring three events every few seconds.
_ACTIONS: Mapping[object, frozenset[str]] = {
    "container": frozenset(("start", "restart", "die", "died", "destroy", "remove", "cleanup", "rename")),
    "network": frozenset(("connect", "disconnect")),
}

Kind = Literal["absent", "lost", "refused", "failed"]


class EngineError(SplicerError):
    """What went wrong with the engine.

    `kind`: "absent" nobody listens; "lost" it does not answer, or stopped in the middle; "refused" it does
    not let us, or cannot be spoken to at all; "failed" it answers and cannot do this one thing.
    """

    def __init__(self, kind: Kind, message: str, *, hint: str | None = None) -> None:
        super().__init__(" ".join(message.split()), hint=hint)
        self.kind = kind


class Event(NamedTuple):
    """Something happened to a container. `time_ns` is the engine's time, nanoseconds since 1970."""

    action: str
    container: str
    time_ns: int


@dataclass(frozen=True)
class ListedContainer:
    """A container in the list. `fingerprint` changes with name, labels, ports and networks."""

    id: str
    fingerprint: int


@dataclass(frozen=True)
class InspectedContainer:
    """What the engine says of one container. `pid` is 0 when it does not run. `pod` is the name of the pod
    that it is in, empty for none, and where the engine knows no pods."""

    id: str
    name: str
    image: str
    labels: Mapping[str, str]
    pid: int
    network_mode: str
    published: tuple[str, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    pod: str = ""


def list_candidates(wanted: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where the engine may listen: at `wanted`, or for "auto" at $DOCKER_HOST and the usual sockets."""
    return (wanted,) if wanted != "auto" else (*filter(None, [environ.get("DOCKER_HOST")]), *SOCKETS)


def find_endpoint(candidates: Sequence[str]) -> str:
    """The first candidate that exists. Raises EngineError ("absent") when none of several does."""
    for candidate in candidates:
        path = path_of(candidate)
        if path is None or os.path.exists(path) or len(candidates) == 1:
            return candidate
    raise EngineError(
        "absent",
        f"no container engine listens here ({', '.join(candidates)})",
        hint="name its socket: --docker unix:///PATH",
    )


def path_of(endpoint: str) -> str | None:
    """The socket's path of a unix:// endpoint, None for others."""
    return endpoint.removeprefix("unix://") if endpoint.startswith("unix://") else None


class Engine:
    """A connection to the engine at `endpoint`. Requests may be made by one thread at a time.

    Everything raises EngineError. `timeout` bounds, in seconds, the wait for each piece of an answer, and
    `idle` the time without events after which a stream of them ends.
    """

    def __init__(
        self,
        endpoint: str,
        environ: Mapping[str, str],
        *,
        timeout: float = _TIMEOUT_S,
        idle: float = _IDLE_S,
    ) -> None:
        self.endpoint = endpoint
        self._idle = idle
        self._timeout = timeout
        with _translated(endpoint):
            docker = _import_docker()
            if not endpoint.startswith(_SCHEMES):
                # ssh:// leads to another host, whose containers are none of ours.
                raise EngineError("refused", f"cannot connect to this kind of address ({endpoint})")
            options: dict[str, Any] = {"base_url": endpoint, "timeout": timeout}
            if path_of(endpoint) is None:
                options = {
                    **docker.utils.kwargs_from_env(environment={**environ, "DOCKER_HOST": endpoint}),
                    **options,
                }
            # Left to itself the client asks for the version while it is made, and leaks when that fails.
            self._client = _make_client(docker.constants.DEFAULT_DOCKER_API_VERSION, options)
        try:
            with _translated(endpoint):
                told = self._client.version(api_version=False)
                self._client.close()
                self._client = _make_client(told["ApiVersion"], options)
                self._own_version = _read_own_version(told)
        except BaseException:
            self._client.close()
            raise

    def close(self) -> None:
        """Let go of all connections but those of event streams."""
        self._client.close()

    def list_running(self) -> tuple[ListedContainer, ...]:
        """Containers that have a process: running or paused."""
        with _translated(self.endpoint):
            entries = self._client.containers(filters={"status": ["running", "paused"]})
            return tuple(ListedContainer(entry["Id"], _take_fingerprint(entry)) for entry in entries)

    def inspect(self, container_id: str) -> InspectedContainer | None:
        """One container, or None if there is none with this id."""
        with _translated(self.endpoint):
            try:
                answer = self._client.inspect_container(container_id)
            except _import_docker().errors.NotFound:
                return None
            return _read_container(answer, self._inspect_own(container_id))

    def _inspect_own(self, container_id: str) -> Mapping[str, Any]:
        """What Podman tells of a container only those who ask in its own words; empty with another engine."""
        if not self._own_version:
            return {}
        answer = self._ask_own(f"containers/{container_id}")
        pod = self._ask_own(f"pods/{answer['Pod']}") if answer.get("Pod") else {}
        return {
            "annotations": (answer.get("Config") or {}).get("Annotations") or {},
            "pod": pod.get("Name") or "",
        }

    def _ask_own(self, what: str) -> Mapping[str, Any]:
        address = f"{self._client.base_url}/v{self._own_version}/libpod/{what}/json"
        response = self._client.get(address, timeout=self._timeout)
        # It is gone; or somebody stands between who lets nothing through but what is Docker's.
        if response.status_code in (403, 404):
            return {}
        response.raise_for_status()
        found: Mapping[str, Any] = response.json()
        return found

    def follow(self, since_ns: int = 0) -> Events:
        """The stream of events from now on, or from a time (nanoseconds since 1970, the engine's clock)."""
        parameters = {"filters": json.dumps({"type": ["container", "network"]})}
        if since_ns:
            parameters["since"] = f"{since_ns // 10**9}.{since_ns % 10**9:09}"
        with _translated(self.endpoint):
            response = self._client.get(
                f"{self._client.base_url}/v{self._client.api_version}/events",
                params=parameters,
                stream=True,
                timeout=(self._timeout, self._idle),
            )
            try:
                response.raise_for_status()
                return Events(response, self.endpoint)
            except BaseException:
                response.close()
                raise


class Events:
    """Events as they come. One thread iterates and releases; any thread may stop it."""

    def __init__(self, response: Any, endpoint: str) -> None:
        self._response = response
        self._endpoint = endpoint
        self._guard = threading.Lock()
        # A duplicate, so that the connection can be shut down while another thread waits in the SDK.
        self._socket: socket.socket | None = socket.socket(fileno=os.dup(response.raw.fileno()))
        self._stopped = False
        self.last_ns = 0
        """Time of the last event by the engine's clock; 0 before the first."""
        self.idle = False
        """True if the iteration ended because nothing happened for long."""

    def __iter__(self) -> Iterator[tuple[Event, ...]]:
        """Batches of events, as they arrive. Ends when stopped, idle, or cut off.

        Raises EngineError for what is no event.
        """
        chunked = self._response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        rest = b""
        try:
            for piece in self._response.iter_content(None if chunked else 1):
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > _LONGEST_EVENT:
                    raise ValueError("an event without end")
                if events := tuple(event for line in lines if (event := _read_event(line))):
                    self.last_ns = max(self.last_ns, events[-1].time_ns)
                    yield events
        except OSError as error:
            # Whichever way the connection ended, whoever iterates now opens another one. Only being idle is
            # different: it is nobody's fault.
            self.idle = not self._stopped and any(isinstance(each, TimeoutError) for each in _unfold(error))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError("lost", f"events cannot be understood ({self._endpoint}: {error})") from error

    def stop(self) -> None:
        """Make the iteration end now."""
        with self._guard:
            self._stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Close the connection. For the thread that iterates, when it is through."""
        with self._guard:
            self._response.close()
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _import_docker() -> Any:
    _import_distutils()
    import docker

    return docker


@functools.cache
def _import_distutils() -> None:
    """Older SDKs want distutils, Debian's among them. setuptools, where it is installed, puts its own in the
    place of the standard library's, and comes with it: 13 MB in a process that needs a comparison of
    versions. Up to Python 3.11 the standard library has one."""
    if "distutils" in sys.modules:
        return
    spec = PathFinder.find_spec("distutils", [sysconfig.get_path("stdlib")])
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["distutils"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        spec.loader.exec_module(module)


def _make_client(version: str, options: Mapping[str, Any]) -> Any:
    client = _import_docker().APIClient(version=version, **options)
    client.trust_env = False  # no proxies, no netrc
    # It would keep one open for each path it has asked for.
    client.headers["Connection"] = "close"
    return client


@contextlib.contextmanager
def _translated(endpoint: str) -> Iterator[None]:
    """Turn what the SDK, requests, urllib3 and the socket raise into EngineError."""
    try:
        docker = _import_docker()
    except ImportError as error:
        raise EngineError(
            "refused",
            f"the Python package docker is missing ({error.name})",
            hint="apt install python3-docker, or pip install docker; --docker off does without",
        ) from error
    try:
        yield
    except docker.errors.APIError as error:
        raise _judge_answer(endpoint, error.response.status_code, str(error.explanation or error)) from error
    except docker.errors.DockerException as error:
        raise EngineError("refused", f"cannot use this engine ({endpoint}: {error})") from error
    except OSError as error:  # all of requests' exceptions are
        raise _judge_failure(endpoint, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError("lost", f"no container engine answers ({endpoint}: {error!r})") from error


def _judge_answer(endpoint: str, code: int, text: str) -> EngineError:
    if code in (401, 403):
        return EngineError("refused", f"the container engine refuses ({endpoint}: {code} {text})")
    return EngineError("failed", f"the container engine fails ({endpoint}: {code} {text})")


def _judge_failure(endpoint: str, error: OSError) -> EngineError:
    from requests import exceptions

    if isinstance(error, exceptions.HTTPError) and error.response is not None:
        return _judge_answer(endpoint, error.response.status_code, error.response.reason)
    if isinstance(error, exceptions.InvalidSchema):
        return EngineError(
            "refused",
            f"the Python package docker is too old for its companion requests ({endpoint}: {error})",
            hint="from requests 2.32 on it takes docker 7.1 or newer: pip install --upgrade docker",
        )
    for cause in _unfold(error):
        if isinstance(cause, TimeoutError | exceptions.Timeout):
            return EngineError("lost", f"the container engine does not answer ({endpoint})")
        if isinstance(cause, OSError) and cause.errno in _ABSENT:
            return EngineError(
                "absent", f"no container engine listens ({endpoint}: {os.strerror(cause.errno)})"
            )
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return EngineError(
                "refused",
                f"the container engine's socket may not be used ({endpoint}: {os.strerror(cause.errno)})",
                hint="connecting takes the right to write to the socket: run splicer as root",
            )
    if isinstance(error, ValueError):
        return EngineError("lost", f"no container engine answers ({endpoint}: {error})")
    numbers = [cause.errno for cause in _unfold(error) if isinstance(cause, OSError) and cause.errno]
    text = os.strerror(numbers[0]) if numbers else str(error)
    return EngineError("lost", f"the connection to the container engine broke ({endpoint}: {text})")


def _unfold(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that it wraps: urllib3 and requests carry causes as arguments."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__context__, each.__cause__, getattr(each, "reason", None), *each.args]


def _take_fingerprint(entry: Mapping[str, Any]) -> int:
    """A number for what an entry of the list says, without what changes by itself ("Up 3 minutes").

    The order of ports and networks is another one each time.
    """
    kept = [entry.get(key) for key in ("Names", "Image", "Labels", "Ports", "State", "HostConfig")]
    networks = (entry.get("NetworkSettings") or {}).get("Networks")
    return hash(json.dumps(_sort([kept, networks]), sort_keys=True))


def _sort(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sort(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted((_sort(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True))
    return value


def _read_own_version(told: Mapping[str, Any]) -> str:
    """Version of the interface that is Podman's own, from what it says of its parts; empty for Docker."""
    for part in told.get("Components") or ():
        if part.get("Name") == "Podman Engine":
            return str((part.get("Details") or {}).get("APIVersion") or "")
    return ""


def _read_container(answer: Mapping[str, Any], own: Mapping[str, Any]) -> InspectedContainer:
    """From Docker's answer, and from what was found in Podman's own words."""
    state, config = answer["State"], answer["Config"]
    mode = answer["HostConfig"].get("NetworkMode") or ""
    ports = (answer.get("NetworkSettings") or {}).get("Ports") or {}
    return InspectedContainer(
        id=answer["Id"],
        name=answer["Name"].removeprefix("/"),
        image=config.get("Image") or answer.get("ImageName") or answer.get("Image") or "",
        labels=config.get("Labels") or {},
        # To Podman a paused container is not a running one.
        pid=(state.get("Pid") or 0) if state.get("Running") or state.get("Paused") else 0,
        network_mode="bridge" if mode == "default" else mode,
        published=tuple(
            sorted(
                f"{_bracket(binding.get('HostIp') or '0.0.0.0')}:{binding['HostPort']}->{port}"
                for port, bindings in ports.items()
                for binding in bindings or ()
            )
        ),
        # Docker has them since version 24.
        annotations=own.get("annotations") or answer["HostConfig"].get("Annotations") or {},
        pod=own.get("pod") or "",
    )


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _read_event(line: bytes) -> Event | None:
    """One line of the stream; None for what is not about a container's life, name or networks."""
    if not line.strip():
        return None
    document = json.loads(line)
    kind, action = document.get("Type"), document.get("Action") or document.get("status") or ""
    actor = document.get("Actor") or {}
    if action not in _ACTIONS.get(kind, ()):
        return None
    # Podman names the container, Docker the network and the container as an attribute.
    container = actor.get("ID") or document.get("id") or ""
    if kind == "network":
        container = (actor.get("Attributes") or {}).get("container") or container
    stamp = document.get("timeNano") or document.get("time", 0) * 10**9
    return Event(action, container, int(stamp)) if container else None
