# SPDX-License-Identifier: Apache-2.0
"""The second start: from what the first one has compiled, and as if it had compiled it itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import environment, find_cache
from support.disk import fill
from support.host import Host
from support.lab import Lab
from support.tiers import thorough

from splicer.kernel import compiler, libbpf
from splicer.kernel.cache import Cache
from splicer.kernel.programs import MAPS, PROGRAMS
from splicer.policy.config import Settings

PEAK = 60  # MiB
# In the place of bcc: whoever imports it is found out, and has nothing.
TELLTALE = "open({path!r}, 'w').close()\nraise ImportError('there is no bcc')\n"


@pytest.fixture
def cached() -> Path:
    """The file that starts of this test run use."""
    name = compiler.collect(Settings.max_connections).name_compiled()
    path = Path(Cache(find_cache()).locate(name))
    if not path.exists():
        with Host():
            pass
    return path


@pytest.fixture
def copy(cached: Path, tmp_path: Path) -> Path:
    """A copy of it in a directory of its own."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return Path(shutil.copy(cached, directory))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(start=False) as made:
        yield made


def start(host: Host, directory: Path | str) -> list[dict[str, Any]]:
    """Start with this cache. What the log says of it."""
    if host.has_run and host.daemon.log.exists():
        host.daemon.log.unlink()
    host.start(f"--cache-dir={directory}")
    return [json.loads(line) for line in host.daemon.log.read_text().splitlines()]


def find(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    [found] = [each for each in events if each["event"] == name]
    return found


def list_names(events: list[dict[str, Any]]) -> list[str]:
    """The events that are about programs and their cache."""
    about = ("compiling", "programs_from_cache", "cache_unusable", "cache_not_written")
    return [each["event"] for each in events if each["event"] in about]


def describe_programs(pin_dir: Path) -> dict[str, Any]:
    """What was loaded: the programs' tags, which are a hash of their instructions without descriptors, and
    the names of the maps they use, in order; and the maps' shapes, with what describes them."""
    found: dict[str, Any] = {}
    for program in PROGRAMS:
        pin = pin_dir / "programs" / program.name
        shown = json.loads(subprocess.check_output(["bpftool", "-j", "prog", "show", "pinned", str(pin)]))
        maps = json.loads(subprocess.check_output(["bpftool", "-j", "map", "show"]))
        names = {each["id"]: each.get("name") for each in maps}
        found[program.name] = (shown["tag"], [names[number] for number in shown["map_ids"]])
    for name in MAPS:
        fd = libbpf.open_pin(str(pin_dir / "maps" / name))
        try:
            shape = libbpf.read_shape(fd)
        finally:
            os.close(fd)
        types = libbpf.read_types(shape.types) if shape.types else b""
        found[f"map {name}"] = (dataclasses.replace(shape, types=0), hashlib.sha256(types).hexdigest())
    return found


def test_the_second_start(host: Host, lab: Lab, tmp_path: Path) -> None:
    """It neither compiles nor so much as imports bcc, takes little memory, and loads the same."""
    directory = tmp_path / "cache"
    imported = tmp_path / "imported"
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text(TELLTALE.format(path=str(imported)))

    events = start(host, directory)
    assert list_names(events) == ["compiling"]
    assert find(events, "ready")["peak_mib"] > PEAK, "the compiler is not counted"
    compiled = describe_programs(host.pin_dir)
    assert host.daemon.stop() == 0

    host.prefix = ("env", f"PYTHONPATH={tmp_path}:{environment()['PYTHONPATH']}")
    events = start(host, directory)
    ready = find(events, "ready")
    print(f"second start: ready after {ready['start_seconds']} s, at most {ready['peak_mib']} MiB")
    assert list_names(events) == ["programs_from_cache"]
    assert ready["peak_mib"] < PEAK
    assert describe_programs(host.pin_dir) == compiled
    assert not imported.exists()
    host.check_alive(lab)


def test_a_takeover_asks_for_no_bcc(host: Host, tmp_path: Path) -> None:
    """Nor does it look into the cache: what is loaded already has to be neither compiled nor read."""
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text("raise ImportError('there is no bcc')\n")
    host.start()
    host.daemon.send_signal(signal.SIGKILL)
    host.daemon.wait()
    host.prefix = ("env", f"PYTHONPATH={tmp_path}:{environment()['PYTHONPATH']}")
    events = start(host, "off")
    assert find(events, "generation_taken_over")
    assert list_names(events) == []


def change_byte(path: Path) -> None:
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With a checksum that is right."""
    head, _, body = path.read_bytes().partition(b"\n")
    document = json.loads(body)
    change(document)
    body = json.dumps(document).encode()
    path.write_bytes(head[:-64] + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def be_of_another_kernel(path: Path) -> None:
    rewrite(path, lambda document: document.update(name="0" * 32, kernel="6.0.0"))


def refer_to_other_maps(path: Path) -> None:
    """It makes sense to all but the verifier: each map has another one's shape."""

    def turn(document: dict[str, Any]) -> None:
        maps = document["maps"]
        shapes = [{**maps[number - 1], "name": each["name"]} for number, each in enumerate(maps)]
        document.update(maps=shapes)

    rewrite(path, turn)


ODD = {
    "damaged": (change_byte, "it is damaged: its checksum is wrong"),
    "another-kernel": (be_of_another_kernel, "it was compiled for something else (kernel 6.0.0)"),
    "refused": (refer_to_other_maps, ""),
    "open": (lambda path: path.chmod(0o666), "others can write to it (mode 0666)"),
}


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(name, marks=[] if name in ("damaged", "refused") else [thorough("further reasons")])
        for name in ODD
    ],
)
def test_what_cannot_be_used(host: Host, lab: Lab, copy: Path, odd: str) -> None:
    """It is compiled anew, which is said, with the reason; and kept, so that the next start has it."""
    spoil, why = ODD[odd]
    spoil(copy)
    events = start(host, copy.parent)
    assert list_names(events) == ["cache_unusable", "compiling"]
    said = find(events, "cache_unusable")
    assert said["path"] == str(copy) and said["level"] == "warning"
    assert said["why"] == why or (not why and said["why"])
    host.check_alive(lab)
    assert host.daemon.stop() == 0
    assert list_names(start(host, copy.parent)) == ["programs_from_cache"]


def test_a_disk_that_is_full(host: Host, lab: Lab, small_disk: Path) -> None:
    """It starts, says that nothing is kept, and leaves no half of a file."""
    (small_disk / "cache").mkdir(mode=0o700)
    fill(small_disk)
    events = start(host, small_disk / "cache")
    assert list_names(events) == ["compiling", "cache_not_written"]
    said = find(events, "cache_not_written")
    assert (said["why"], said["level"]) == ("No space left on device", "warning")
    assert list((small_disk / "cache").iterdir()) == []
    host.check_alive(lab)


@thorough("test_a_disk_that_is_full with another reason")
def test_a_directory_that_cannot_be_written(host: Host, lab: Lab, small_disk: Path) -> None:
    """As in a container whose file system is read-only. What is kept there is used all the same."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    events = start(host, small_disk / "cache")
    assert list_names(events) == ["compiling", "cache_not_written"]
    said = find(events, "cache_not_written")
    assert (said["why"], said["level"]) == ("Read-only file system", "info")
    host.check_alive(lab)
