# SPDX-License-Identifier: Apache-2.0
"""`splicer bench` on a daemon that is at work: what it compares is what it says, and it leaves everything as
it was, however it ends. How much faster anything is does not matter here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import schemas
from support.bpf import list_held_named, list_objects
from support.cgroup import find_v2_root
from support.daemon import command_line, environment, wait_until
from support.host import Host
from support.lab import Lab
from support.nginx import running_nginx
from support.pauses import SLOWNESS

PORT = 7801
SERVES = "server {{ listen {address}:{port}; location / {{ return 200 'hello'; }} }}"
PATIENCE = 60 * SLOWNESS  # seconds
# Prints one number while everything is held plain, and another one while it is not.
TELLS = """
import json, socket, sys
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
control.sendall(b'{"command": "status"}\\n')
held = bool(json.loads(control.makefile().readline())["result"]["hold"])
print(sys.argv[2] if held else sys.argv[3])
"""


@pytest.fixture(scope="module")
def shared_host(_prerequisites: None) -> Iterator[Host]:
    with Host(services="") as made:
        yield made


@pytest.fixture
def service(host: Host, lab: Lab, tmp_path: Path) -> Iterator[str]:
    """The URL of an nginx on host a."""
    place = SERVES.format(address=lab.address("a"), port=PORT)
    with running_nginx(host, lab, "a", PORT, tmp_path / "nginx", place):
        yield f"http://{lab.address('a')}:{PORT}/"


def bench(host: Host, lab: Lab, *arguments: str, inside: bool = True) -> subprocess.CompletedProcess[str]:
    """Run to its end on host b; the load is below the attached cgroup if it is to be `inside`."""
    command = command_line("bench", f"--run-dir={host.run_dir}", *arguments)
    enter = f"echo $$ > {host.cgroup.path}/cgroup.procs && " if inside else ""
    return subprocess.run(
        [
            "nsenter",
            f"--net=/run/netns/{lab.namespace('b')}",
            "sh",
            "-c",
            f'{enter}exec "$@"',
            "sh",
            *command,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment(),
    )


@contextmanager
def benching(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run, to be interrupted."""
    process = subprocess.Popen(
        command_line("bench", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(host: Host, plain: float, spliced: float) -> str:
    control = str(host.run_dir / "control.sock")
    return shlex.join([sys.executable, "-I", "-c", TELLS, control, str(plain), str(spliced)])


def list_processes() -> dict[int, str]:
    """Command lines of everything that runs, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def test_a_service_before_and_after(host: Host, lab: Lab, service: str, tmp_path: Path) -> None:
    """Of the spliced legs most messages are redirected, of the plain ones hardly any; and everything is as it
    was."""
    files = tmp_path / "result.html", tmp_path / "result.png"
    done = bench(
        host, lab, "--url", service, "-n2", "-t1", "--json", f"--html={files[0]}", f"--png={files[1]}"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    schemas.check("bench", document)
    (found,) = document["workloads"]
    assert found["errors"] == {"plain": {}, "spliced": {}}
    requests = found["requests"]
    for sent, splicing in zip(requests["spliced"], found["splicing"], strict=True):
        assert splicing["redirected_messages"] > sent, "half of the messages, or more"
    for sent, redirected in zip(requests["plain"], found["redirected_in_plain_legs"], strict=True):
        assert redirected < 0.05 * sent
    assert (
        document["verdicts"][0]["words"].startswith("too few pairs for a verdict (2)")
        and not document["notes"]
    )
    assert files[1].read_bytes().startswith(b"\x89PNG") and "<svg" in files[0].read_text()
    assert host.daemon.status()["hold"] == {}
    assert done.stderr == "", "no progress bar where nobody looks"


def test_why_nothing_was_spliced_is_said(host: Host, lab: Lab, service: str) -> None:
    """The load is outside of the daemon's cgroup, as on another host."""
    done = bench(host, lab, "--url", service, "-n1", "-t1", inside=False)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "nothing was spliced; too few pairs" in text
    assert f"splicer knows no connection to port {PORT} of this run" in text


@pytest.mark.parametrize(
    ("plain", "spliced", "options", "direction", "words"),
    [
        (100, 80, [], "worse", "worse: 20 % smaller number"),
        (100, 200, [], "better", "2.0 times the number"),
        (100, 50, ["--less-is-better"], "better", "half the number"),
        (100, 200, ["--less-is-better"], "worse", "worse: 2.0 times the number"),
        (100, 80, ["--baseline"], "same", "no difference beyond noise"),
        (100, 100, [], "same", "no difference beyond noise"),
    ],
)
def test_a_number_that_splicing_changes(
    host: Host, lab: Lab, plain: float, spliced: float, options: list[str], direction: str, words: str
) -> None:
    """A command that knows whether splicing is on: what becomes worse is called so, and plain against plain
    is no difference."""
    done = bench(host, lab, "--cmd", tell(host, plain, spliced), "-n3", "--json", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    schemas.check("bench", document)
    (verdict,) = document["verdicts"]
    assert (verdict["direction"], words in verdict["words"]) == (direction, True), verdict
    metric = document["workloads"][0]["metrics"]["number"]
    assert metric["plain_samples"] == [plain] * 4
    assert metric["spliced_samples"] == [plain if "--baseline" in options else spliced] * 3
    assert host.daemon.status()["hold"] == {}


def test_a_hold_takes_connections_back_and_ends_by_itself(host: Host, lab: Lab) -> None:
    """Whoever asked for it may be dead. Meanwhile nobody else can have one."""
    client, server = host.peer(lab, "b"), host.peer(lab, "a")
    pair = host.connect(client, server, lab.address("a"))
    host.make_hot(pair)
    host.daemon.command("hold", holder="a test", seconds=4)
    host.talk_until(pair, "paired", "policy_off")
    refused = bench(host, lab, "--cmd", "echo 1", "-n1")
    assert refused.returncode == 1
    assert "another measurement holds connections plain (a test)" in refused.stderr
    host.talk_until(pair, "spliced", timeout=20)
    assert host.daemon.status()["hold"] == {}
    pair.verify()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_on_a_service(host: Host, number: int) -> None:
    """The hold is released, and what was started is gone with all that it has started."""
    mark = f"77{os.getpid()}"
    begun = host.directory / "begun"
    # The first run is that which nothing is switched for.
    command = f"if [ -e {begun} ]; then sleep {mark} & wait; fi; touch {begun}; echo 1"
    with benching("--cmd", command, f"--run-dir={host.run_dir}") as process:
        wait_until("it is held", lambda: host.daemon.status()["hold"], timeout=20)
        wait_until("it runs", lambda: any(f"sleep {mark} " in each for each in list_processes().values()))
        process.send_signal(number)
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None and "cleaned up" in process.stderr.read()
    assert host.daemon.status()["hold"] == {}
    wait_until("it is gone", lambda: not [each for each in list_processes().values() if mark in each])
    begun.unlink()


def test_an_interrupted_suite_leaves_nothing(tmp_path: Path) -> None:
    """No program, map, cgroup, directory, process: interrupted while its daemon is at work."""
    root = find_v2_root()
    assert root is not None

    def list_left(pid: int) -> list[str]:
        found = [str(path) for path in root.glob(f"splicer-bench-{pid}")]
        found += [str(path) for path in tmp_path.glob("splicer-bench-*")]
        return found + [each for each in list_processes().values() if f"{tmp_path}/splicer-bench-" in each]

    process = subprocess.Popen(
        command_line("bench", "connecting", "--pairs=50"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(tmp_path)),
    )
    try:
        wait_until("its daemon is at work", lambda: list_held_named(process.pid, "verdict"), timeout=30)
        own = list_held_named(process.pid, "")
        assert len(list_left(process.pid)) >= 3
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
        process.communicate()
    assert not list_left(process.pid)
    wait_until("the kernel has let go of all of it", lambda: not own & list_objects().keys())


def test_what_cannot_be_measured(host: Host, lab: Lab, tmp_path: Path) -> None:
    """Each says what to do, and changes nothing."""
    assert shutil.which("wrk")
    for arguments, code, message, hint in (
        (["--cmd", "echo hello"], 1, "no number (hello)", "have it end with one"),
        (["--cmd", "exit 3"], 1, "sh failed with 3", ""),
        (["--cmd", "echo 0"], 1, "a ratio needs numbers above 0", "another measure"),
        (["--cmd", "echo 1", "--container=web"], 1, "no running container", "no containers are known"),
        (["--url", f"http://{lab.address('a')}:1/"], 1, "does not answer", "curl -i"),
        (["--cmd", "echo 1", f"--run-dir={tmp_path}"], 3, "not running", "splicer run"),
    ):
        done = bench(host, lab, *arguments)
        assert done.returncode == code, done
        assert message in done.stderr and hint in done.stderr, done.stderr
        assert host.daemon.status()["hold"] == {}
