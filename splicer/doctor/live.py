# SPDX-License-Identifier: Apache-2.0
"""A connection that is spliced for real, below a cgroup of its own.

By a daemon that is here already, or by one that lives for the occasion, with directories of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from splicer.daemon import control
from splicer.doctor.check import Outcome, Result, State, Verdict, fail, ok, unknown
from splicer.doctor.surroundings import Surroundings
from splicer.errors import FAILURE, OK, SplicerError
from splicer.host import sessions

_NAME = "splicer-doctor-"
_START_TIMEOUT_S = 300.0
_SPLICE_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
_PAUSE_S = 0.02


class _Trouble(Exception):
    """What went wrong, and in which check."""

    def __init__(self, name: str, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.result = Result(name, True, outcome)


@dataclass(frozen=True)
class _Stage:
    """Where the connection is to be, and whom to ask about it."""

    cgroup: str
    run_dir: str


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPLICER_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class _Talker:
    """The process of talk.py."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "splicer.doctor.talk"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=partial(sessions.end_with_parent, os.getpid(), signal.SIGTERM),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, order: str, name: str) -> dict[str, Any]:
        """Its answer. Raises _Trouble, in the check of this name."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            _, said = self._process.communicate()
            raise _Trouble(name, fail(f"what was to talk has ended ({_last(said.splitlines())})"))
        answer: dict[str, Any] = json.loads(line)
        if "trouble" in answer:
            raise _Trouble(name, fail(answer["trouble"]))
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def _scratch_cgroup(parent: str) -> Iterator[str]:
    for name in os.listdir(parent):
        # Of an earlier one that was killed outright.
        if name.startswith(_NAME) and not os.path.exists(f"/proc/{name.removeprefix(_NAME)}"):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(parent, name))
    path = os.path.join(parent, f"{_NAME}{os.getpid()}")
    os.mkdir(path)
    try:
        yield path
    finally:
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while True:
            try:
                os.rmdir(path)
                break
            except FileNotFoundError:
                break
            except OSError:
                # Who was in it has ended, and is still on its way out.
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)


@contextlib.contextmanager
def _daemon(surroundings: Surroundings, cgroup: str) -> Iterator[str]:
    """A daemon for this cgroup; its run directory. Raises _Trouble if it does not start, or end well."""
    settings = surroundings.settings
    place = tempfile.mkdtemp(prefix=_NAME)
    run_dir, ready = os.path.join(place, "run"), os.path.join(place, "ready")
    command = [
        *(sys.executable, "-P", "-m", "splicer", "run", f"--cgroup={cgroup}", f"--run-dir={run_dir}"),
        f"--pin-dir={os.path.join(os.path.dirname(settings.pin_dir), f'{_NAME}{os.getpid()}')}",
        *(f"--ready-file={ready}", "--docker=off", "--no-census", f"--fionread={settings.fionread}"),
        # What is kept for later starts stays as it is.
        *(f"--max-connections={settings.max_connections}", "--log-format=json", "--cache-dir=off"),
    ]
    log = os.path.join(place, "log")
    try:
        with open(log, "w") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=sink,
                env=_environment(),
                preexec_fn=partial(sessions.end_with_parent, os.getpid(), signal.SIGTERM),
            )
        try:
            _wait_ready(process, ready, log)
            yield run_dir
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        if code:
            raise _Trouble("live_stop", fail(f"the daemon ended with {code}: {_read_last(log)}"))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], ready: str, log: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not os.path.exists(ready):
        if process.poll() is not None:
            raise _Trouble(
                "live_start", fail(f"splicer run ended with {process.returncode}: {_read_last(log)}")
            )
        if time.monotonic() > deadline:
            raise _Trouble("live_start", fail(f"splicer run was not ready within {_START_TIMEOUT_S:g} s"))
        time.sleep(_PAUSE_S)


def _read_last(log: str) -> str:
    """What it complained of, without the hint."""
    with open(log, errors="replace") as stream:
        return _last(line for line in stream if line.startswith("splicer: ")).removeprefix("splicer: ")


def _last(lines: Iterable[str]) -> str:
    return next((line.strip() for line in reversed(list(lines)) if line.strip()), "no message")


@contextlib.contextmanager
def _staged(surroundings: Surroundings) -> Iterator[_Stage]:
    holder = surroundings.daemon
    if holder is not None and holder.purpose == "run":
        with _scratch_cgroup(holder.cgroup) as cgroup:
            yield _Stage(cgroup, holder.run_dir)
        return
    with _scratch_cgroup(surroundings.cgroup.path) as cgroup, _daemon(surroundings, cgroup) as run_dir:
        yield _Stage(cgroup, run_dir)


def _find_flow(stage: _Stage, where: Mapping[str, Any]) -> dict[str, Any] | None:
    flows: Any = control.request(stage.run_dir, "flows")["flows"]
    for flow in flows:
        if flow["netns"] == where["netns"] and str(flow["local"]).endswith(f":{where['port']}"):
            return dict(flow)
    return None


def _wait_spliced(stage: _Stage, where: Mapping[str, Any]) -> None:
    deadline = time.monotonic() + _SPLICE_TIMEOUT_S
    flow: dict[str, Any] | None = None
    while time.monotonic() < deadline:
        flow = _find_flow(stage, where)
        if flow is not None and flow["state"] == "spliced":
            return
        if flow is not None and flow["reason"] in ("policy", "off"):
            break
        time.sleep(_PAUSE_S)
    if flow is None:
        raise _Trouble("live_splice", fail("the daemon does not know of the connection"))
    raise _Trouble(
        "live_splice",
        fail(
            f"the connection stays plain ({flow['state']}, {flow['reason'] or 'no reason'})",
            "splicer flows --help",
        ),
    )


def _talk(stage: _Stage, talker: _Talker) -> Iterator[Result]:
    plain = talker.tell("plain", "live_bytes")
    with open(os.path.join(stage.cgroup, "cgroup.procs"), "w") as stream:
        stream.write(str(talker.pid))
    where = talker.tell("open", "live_bytes")
    _wait_spliced(stage, where)
    talker.tell("pause", "live_bytes")
    before = _find_flow(stage, where) or {"redirected_bytes": 0}
    yield Result("live_splice", True, ok("a connection of ours was spliced"))
    spliced = talker.tell("measure", "live_bytes")
    after = _find_flow(stage, where) or before
    yield Result(
        "live_bytes", True, _compare_bytes(spliced, after["redirected_bytes"] - before["redirected_bytes"])
    )
    yield Result("live_latency", False, _compare_times(plain["microseconds"], spliced["microseconds"]))


def _compare_bytes(spliced: Mapping[str, Any], redirected: int) -> Outcome:
    """The kernel counts what went through TCP, splicer's programs what did not."""
    there, back = spliced["there"], spliced["back"]
    if spliced["through_tcp"]:
        return fail(f"{spliced['through_tcp']} of {there + back} bytes went through TCP")
    if redirected != there + back:
        return fail(f"{redirected} of {there + back} bytes were redirected")
    return ok(f"{there} there and {back} back, all redirected")


def _compare_times(plain: float, spliced: float) -> Outcome:
    """Never a failure: who else was at work here meanwhile is not known."""
    return ok(f"plain {plain:.1f} us, spliced {spliced:.1f} us: {plain / spliced:.2f} times as fast")


def examine(surroundings: Surroundings, verdict: Verdict) -> list[Result]:
    """Splice a connection, and say what came of it. Leaves nothing behind."""
    if not verdict.can_run:
        return [Result("live", True, unknown("not tried, for the reasons above"))]
    results: list[Result] = []
    former = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        # The talker ends before its cgroup is removed.
        with _staged(surroundings) as stage, contextlib.closing(_Talker(_environment())) as talker:
            who = "a daemon that was here already" if surroundings.daemon else "a daemon of its own"
            results.append(Result("live_start", True, ok(f"by {who}")))
            for result in _talk(stage, talker):
                results.append(result)
    except _Trouble as trouble:
        results.append(trouble.result)
    except SplicerError as error:
        results.append(Result("live", True, fail(error.message, error.hint)))
    except OSError as error:
        results.append(Result("live", True, fail(str(error))))
    finally:
        signal.signal(signal.SIGTERM, former)
    return results


def judge(verdict: Verdict, results: Sequence[Result]) -> Verdict:
    """The verdict, with what --live came to."""
    failed = [
        each.name
        for each in results
        if each.name.startswith("live") and each.is_needed and each.outcome.state is not State.OK
    ]
    if verdict.exit_code != OK or not failed:
        return verdict
    return replace(verdict, words=f"This host should run splicer, but {failed[0]} failed", exit_code=FAILURE)
