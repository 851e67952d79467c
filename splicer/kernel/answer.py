# SPDX-License-Identifier: Apache-2.0
"""The programs of bpf/answer.c: attached, and left attached where ends outlive splicer.

Pins below the pin directory, beside those of the generation:

    links/answer4 links/answer6   both, or neither
    unanswered                    a symbolic link whose target says why neither
    left-N/NAME                   links, and the SOCKHASH, of a generation that has gone and left ends in it

An end that is left in a SOCKHASH goes on being redirected to, and its reader on asking. So its links stay
until somebody who starts, stops or unloads finds that SOCKHASH empty.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from splicer.kernel import bpffs, libbpf
from splicer.kernel.programs import ANSWERS

NAMES = tuple(program.name for program in ANSWERS)
NOTE = "unanswered"
_SOCKHASH = "spliced"
_LEFT = "left-"


def judge(found: str) -> str:
    """What is wrong with the class that sockets of ours see with the answers attached; empty if nothing."""
    return "" if found == "C" else f"it is still of class {found} when splicer answers"


def attach(pin_dir: str) -> str:
    """Attach and pin both programs, which the loader has pinned. Returns why not; empty if they are."""
    try:
        for name in NAMES:
            with contextlib.ExitStack() as opened:
                program = libbpf.open_pin(os.path.join(pin_dir, "programs", name))
                opened.callback(os.close, program)
                link = libbpf.link_function(program)
                opened.callback(os.close, link)
                libbpf.pin(link, os.path.join(pin_dir, "links", name))
    except libbpf.KernelError as error:
        detach(pin_dir)
        return str(error.strerror)
    return ""


def detach(pin_dir: str) -> None:
    """Unpin what there is of both. They are detached when nobody has their links open either."""
    for name in NAMES:
        for directory in ("links", "programs"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(pin_dir, directory, name))


def note(pin_dir: str, why: str) -> None:
    """Leave a note for the next daemon that they are not there, and why."""
    os.symlink(why, os.path.join(pin_dir, NOTE))


def open_links(pin_dir: str) -> dict[str, int]:
    """Descriptors of both links; empty if they are not there. Raises KernelError."""
    if not all(os.path.exists(os.path.join(pin_dir, "links", name)) for name in NAMES):
        return {}
    links: dict[str, int] = {}
    try:
        for name in NAMES:
            links[name] = libbpf.open_pin(os.path.join(pin_dir, "links", name))
    except BaseException:
        for fd in links.values():
            os.close(fd)
        raise
    return links


def keep(pin_dir: str, links: Mapping[str, int], spliced: libbpf.Map) -> bool:
    """Before the generation goes: pin its links elsewhere if ends are left in its SOCKHASH. True if so."""
    if not all(name in links for name in NAMES) or next(spliced.walk_keys(), None) is None:
        return False
    names = set(list_left(pin_dir))
    number = next(number for number in range(1, len(names) + 2) if f"{_LEFT}{number}" not in names)
    place = os.path.join(pin_dir, f"{_LEFT}{number}")
    try:
        os.mkdir(place, mode=0o700)
        # The SOCKHASH first: without it nobody could tell when the links may go.
        libbpf.pin(spliced.fd, os.path.join(place, _SOCKHASH))
        for name in NAMES:
            libbpf.pin(links[name], os.path.join(place, name))
    except OSError:
        # No place to pin anything: somebody has unmounted it. The other pins have gone with it.
        bpffs.remove_tree(place)
        return False
    return True


def list_left(pin_dir: str) -> list[str]:
    """Directories below the pin directory that hold what is left of generations that have gone."""
    try:
        return sorted(name for name in os.listdir(pin_dir) if name.startswith(_LEFT))
    except OSError:
        return []


def release(pin_dir: str) -> tuple[list[str], int]:
    """Remove what is left of generations whose last end has gone. Returns the paths that were removed, and
    how many ends there are of others."""
    removed: list[str] = []
    ends = 0
    for name in list_left(pin_dir):
        place = os.path.join(pin_dir, name)
        left = _count_ends(os.path.join(place, _SOCKHASH))
        ends += left
        if not left:
            removed += bpffs.remove_tree(place)
    return removed, ends


def _count_ends(path: str) -> int:
    if not os.path.exists(path):
        return 0
    with contextlib.closing(libbpf.Map.open(path)) as spliced:
        return sum(1 for _ in spliced.walk_keys())
