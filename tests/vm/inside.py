# SPDX-License-Identifier: Apache-2.0
"""What runs in a guest: the steps of the plan, one after the other.

Reads /srv/plan.json: {"compile": whether to compile the programs first, "start": whether to see what `splicer
doctor` says and how `splicer run` starts, "steps": [{"name", "command", "timeout"}], "environment": {}}.
No step follows where it does not start. Leaves in /srv/results what the host takes: found.json, doctor.json,
dmesg.txt, and the output of each step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLACE = Path("/srv")
RESULTS = PLACE / "results"
TREE = PLACE / "splicer"
CGROUP = Path("/sys/fs/cgroup/vm")
READY = Path("/run/splicer.ready")
START_TIMEOUT = 600.0  # seconds


def say(text: str) -> None:
    print(f"=== [{time.monotonic():.0f}] {text}", flush=True)


def run_step(step: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """One command, with its output on the console and in a file of its name."""
    say(step["name"])
    begun = time.monotonic()
    process = subprocess.Popen(
        step["command"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=TREE,
        start_new_session=True,
    )
    copier = threading.Thread(target=_copy, args=(process, RESULTS / f"{step['name']}.txt"), daemon=True)
    copier.start()
    code = _wait(process, step["timeout"])
    # Who is left of it may hold its output open.
    copier.join(5.0)
    seconds = round(time.monotonic() - begun)
    say(f"{step['name']}: exit code {code} after {seconds} s")
    return {"name": step["name"], "code": code, "seconds": seconds}


def _copy(process: subprocess.Popen[bytes], file: Path) -> None:
    assert process.stdout is not None
    with file.open("wb", buffering=0) as sink:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            sink.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int:
    """Its exit code; it is made to end when it has not within `timeout` seconds."""
    for number, seconds in ((signal.SIGTERM, timeout), (signal.SIGKILL, 60.0)):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
    return process.wait()


def list_objects() -> list[str]:
    """Programs, maps and links of BPF that there are, in words."""
    found = []
    for kind in ("prog", "map", "link"):
        shown = subprocess.run(["bpftool", "-j", kind, "show"], capture_output=True, text=True, check=False)
        for each in json.loads(shown.stdout or "[]"):
            found.append(f"{kind} {each['id']} {each.get('name') or each.get('type')}")
    return found


def read_status(environment: dict[str, str]) -> dict[str, Any]:
    """What `splicer status` says, once older connections have been looked for."""
    for _ in range(60):
        status: dict[str, Any] = json.loads(
            _output("-m", "splicer", "status", "--json", environment=environment)
        )
        if status.get("census", {}).get("state") != "running":
            break
        time.sleep(1)
    return status


def start_and_stop(environment: dict[str, str]) -> dict[str, Any]:
    """What `splicer run` does here, what it says of the kernel, and what it leaves behind."""
    say("splicer run")
    CGROUP.mkdir(exist_ok=True)
    before = list_objects()
    begun = time.monotonic()
    command = [sys.executable, "-m", "splicer", "run", f"--cgroup={CGROUP}", "--docker=off"]
    log = RESULTS / "splicer-run.txt"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, f"--ready-file={READY}"], stdout=sink, stderr=sink, env=environment, cwd="/"
        )
    while process.poll() is None and not READY.exists() and time.monotonic() - begun < START_TIMEOUT:
        time.sleep(0.1)
    found: dict[str, Any] = {"start_seconds": round(time.monotonic() - begun)}
    if process.poll() is None and READY.exists():
        found["status"] = read_status(environment)
        process.send_signal(signal.SIGTERM)
    elif process.poll() is None:
        process.kill()
    found["code"] = process.wait()
    found["said"] = log.read_text(errors="replace").splitlines()[-4:]
    # The kernel frees programs and maps a little later.
    for _ in range(50):
        left = sorted(set(list_objects()) - set(before))
        if not left:
            break
        time.sleep(0.2)
    found["left"] = left + [str(path) for path in (READY, Path("/sys/fs/bpf/splicer")) if path.exists()]
    say(f"splicer run: {json.dumps(found)}")
    return found


def ask_doctor(environment: dict[str, str]) -> dict[str, Any]:
    """What `splicer doctor` says of this kernel, with its exit code. It splices something, where it can."""
    say("splicer doctor")
    command = [sys.executable, "-m", "splicer", "doctor", "--json", "--live", "--docker=off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")
    (RESULTS / "doctor.json").write_text(done.stdout)
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        found = {"verdict": (done.stderr.strip().splitlines() or ["no answer"])[-1], "checks": []}
    say(f"splicer doctor: {found['verdict']}")
    return found | {"code": done.returncode}


FIND_CLASS = "from splicer.kernel import probes; print(probes.find_class().name)"


def _output(*arguments: str, environment: dict[str, str]) -> str:
    """What Python prints with these arguments; the last line of its complaint if that is nothing."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd="/"
    )
    return done.stdout.strip() or (done.stderr.strip().splitlines() or ["no answer"])[-1]


# Nothing limits how long a compiler takes here, as it is limited in the daemon.
COMPILE = """
import sys
from splicer.kernel import compiler
from splicer.policy.config import Settings
compiler.compile_programs(compiler.collect(Settings().max_connections))
"""


def hand_over(found: dict[str, Any]) -> None:
    """Give the host what there is by now, should the guest not get to its end."""
    (RESULTS / "found.json").write_text(json.dumps(found))
    subprocess.run(["tar", "-cf", "/dev/vdc", "-C", str(RESULTS), "."], check=False)
    os.sync()


def main() -> None:
    plan = json.loads((PLACE / "plan.json").read_text())
    environment = os.environ | plan["environment"]
    found: dict[str, Any] = {
        "release": os.uname().release,
        "version": os.uname().version,
        "python": sys.version.split()[0],
        "steps": [],
    }
    say(f"{found['release']} {found['version']}")
    if plan["compile"]:
        step = {"name": "compile", "command": [sys.executable, "-c", COMPILE], "timeout": 900}
        found["compiled"] = run_step(step, environment)
        hand_over(found)
    if plan["start"]:
        found["class"] = _output("-c", FIND_CLASS, environment=environment)
        say(f"class {found['class']}")
        # What is ours is no setting of splicer's.
        without = {name: value for name, value in environment.items() if not name.startswith("SPLICER_")}
        found["doctor"] = ask_doctor(without)
        hand_over(found)
        found["start"] = start_and_stop(without)
    if not plan["start"] or found["start"]["code"] == 0:
        for step in plan["steps"]:
            found["steps"].append(run_step(step, environment))
            hand_over(found)
    log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", check=False).stdout
    (RESULTS / "dmesg.txt").write_text(log)
    hand_over(found)


if __name__ == "__main__":
    main()
