# SPDX-License-Identifier: Apache-2.0
"""`splicer tap` under test, and tshark to read what it wrote."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splicer.kernel import libbpf
from support.daemon import Outcome, command_line, environment, wait_until
from support.host import Host

TIMEOUT = 60.0  # seconds


@dataclass
class Tap:
    """A running command; `outcome` is there once the block is left. A file for each stream, since nobody
    reads a pipe of a command that writes much."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    @property
    def outcome(self) -> Outcome:
        code = self.process.poll()
        assert code is not None
        return Outcome(code, self.stdout.read_text(), self.stderr.read_text())


@contextmanager
def tapping(
    host: Host, place: Path, *arguments: str, end_by: int = signal.SIGINT, gives_way: bool = False
) -> Iterator[Tap]:
    """From the moment at which it records until the block is left. `place` is a directory for its output.

    With a priority of its own it does not give way: other tests may keep all CPUs busy."""
    stdout, stderr = place / "tap.out", place / "tap.err"
    where = (f"--run-dir={host.run_dir}", f"--pin-dir={host.pin_dir}")
    command = [*(() if gives_way else ("nice", "-n", "-1")), *command_line("tap", *where, *arguments)]
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd="/", env=environment())
    tap = Tap(process, stdout, stderr)
    try:

        def is_up() -> bool:
            assert process.poll() is None, stderr.read_text()
            return "tapping" in stderr.read_text()

        wait_until("splicer tap records", is_up, timeout=TIMEOUT)
        yield tap
        if process.poll() is None:
            process.send_signal(end_by)
        process.wait(TIMEOUT)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def tshark(file: Path, *arguments: str) -> str:
    """What it says of a file."""
    assert shutil.which("tshark"), "the program tshark is missing: make setup-test installs it"
    # No configuration of whoever runs the tests, and no files in his home.
    environ = {**os.environ, "HOME": str(file.parent), "XDG_CONFIG_HOME": str(file.parent)}
    command = ["tshark", "-n", "-r", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_fields(file: Path, wanted: str, *fields: str, options: tuple[str, ...] = ()) -> list[list[str]]:
    """The fields of the packets that a display filter finds."""
    names = [part for name in fields for part in ("-e", name)]
    said = tshark(file, *options, "-Y", wanted, "-T", "fields", "-E", "separator=|", *names)
    return [line.split("|") for line in said.splitlines()]


def follow(file: Path, number: int = 0) -> tuple[bytes, bytes]:
    """A TCP stream as Wireshark puts it together: what the end sent that spoke first in the file, and the
    other one."""
    said = tshark(file, "-q", "-z", f"follow,tcp,raw,{number}")
    first, second = bytearray(), bytearray()
    for line in said.splitlines():
        text = line.strip()
        if text and all(character in "0123456789abcdef" for character in text):
            (second if line.startswith("\t") else first).extend(bytes.fromhex(text))
    return bytes(first), bytes(second)


def list_gaps(file: Path, why: str) -> list[int]:
    """Sizes in bytes of the gaps whose comments say `why`: "went through TCP" or "missed"."""
    said = read_fields(file, "frame.comment", "frame.comment")
    return [int(number) for row in said for number in re.findall(rf"(\d+) bytes before this {why}", row[0])]


def list_complaints(file: Path) -> list[list[str]]:
    """Packets that Wireshark finds something wrong with."""
    return read_fields(
        file, "tcp.analysis.flags && !tcp.analysis.window_full", "frame.number", "_ws.expert.message"
    )


def list_tappers(pin_dir: Path) -> list[bytes]:
    """Ids of the programs that verdict goes on in."""
    taps = libbpf.Map.open(str(pin_dir / "maps" / "taps"))
    try:
        found = taps.get(bytes(4))
    finally:
        taps.close()
    return [] if found is None else [found]
