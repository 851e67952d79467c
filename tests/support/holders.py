# SPDX-License-Identifier: Apache-2.0
"""Who may hold what should be gone from the kernel: for the message of a check that found it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from support.bpf import BpfObject, list_held, list_objects, list_pins, list_processes, list_used
from support.leftovers import NETNS

MOST = 20  # sockets that are told of a network namespace


def describe_holders(left: Iterable[BpfObject]) -> str:
    """Processes and pins that hold one of `left`, or a map that one of them uses; and all TCP sockets, since
    one that is or was in a SOCKHASH holds the program that judges what it sends."""
    wanted = {(each.kind, each.id) for each in left}
    wanted |= list_used(wanted)
    names = {key: str(each) for key, each in list_objects().items() if key in wanted}
    holders = [(f"process {each.name} ({_read_command(each)})", list_held(each)) for each in list_processes()]
    holders += [(f"pin {path}", held) for path, held in list_pins()]
    lines = [
        f"{holder} holds {', '.join(sorted(names.get(key, str(key)) for key in held & wanted))}"
        for holder, held in holders
        if held & wanted
    ]
    lines = lines or ["no process and no pin holds it, or a map that it uses"]
    return "\n".join([*lines, *_list_sockets()])


def _read_command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"


def _list_sockets() -> list[str]:
    """Those of all network namespaces that have a psock or could have one, and how many the kernel counts:
    one that is in no table is only counted."""
    places = {}
    for place in (*(each / "ns/net" for each in list_processes()), *NETNS.glob("*")):
        try:
            places[os.stat(place).st_ino] = place
        except OSError:
            continue  # it ended meanwhile
    lines = []
    for place in places.values():
        command = ["nsenter", f"--net={place}", "ss", "-tanpeH", "exclude", "bucket", "exclude", "listening"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = (done.stdout + done.stderr).splitlines()
        lines += [f"in {place}:", *found[:MOST], *(["and more"] if found[MOST:] else [])] if found else []
    counted = Path("/proc/net/sockstat").read_text().splitlines()
    return [*lines, *(line for line in counted if line.startswith("TCP:"))]
