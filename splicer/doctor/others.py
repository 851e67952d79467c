# SPDX-License-Identifier: Apache-2.0
"""Checks of who else is here: a daemon, what a dead one left, other users of BPF, a container engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

from splicer.containers import engine
from splicer.doctor.check import AS_ROOT, Check, Outcome, State, ok, unknown, warn
from splicer.doctor.surroundings import Surroundings
from splicer.kernel import answer, generation
from splicer.model import Neighbour
from splicer.text import plural


def _check_daemon(surroundings: Surroundings) -> Outcome:
    if (holder := surroundings.daemon) is not None:
        doing = "running" if holder.purpose == "run" else f"splicer {holder.purpose} is at work"
        return ok(f"{doing}: {holder.describe()}")
    if surroundings.uid != 0:
        return unknown("whether one is running only root may see", AS_ROOT)
    return ok("none is running")


def _check_leftovers(surroundings: Surroundings) -> Outcome:
    place = surroundings.settings.pin_dir
    try:
        os.listdir(place)
    except FileNotFoundError:
        return ok("nothing of an earlier run")
    if generation.is_in_use(place):
        return ok("nothing of an earlier run; what is pinned is in use")
    if generation.exists(place):
        return warn(
            f"programs of a daemon that is gone ({place})",
            "take them over: splicer run; take them out: splicer unload",
        )
    if answer.list_left(place):
        return warn("an earlier run left sockets spliced that are still open", "splicer unload")
    return ok("nothing of an earlier run")


def _describe(neighbour: Neighbour) -> str:
    name = f"{neighbour.program or '(no name)'}, id {neighbour.id}" if neighbour.id else "no program"
    return f"{neighbour.hook}: {name}, {neighbour.place} {neighbour.where or neighbour.where_id}"


def _check_neighbours(surroundings: Surroundings) -> Outcome:
    """Those on sockmaps keep sockets plain; the others run beside ours."""
    found = surroundings.neighbourhood
    others = tuple(_describe(each) for each in found.neighbours)
    if any(each.place == "map" or each.is_splicer for each in found.neighbours):
        text = "others have sockets in maps, which keeps these plain, or a splicer of their own"
        return Outcome(State.WARN, text, "see KNOWN_ISSUES.md for what it means", others)
    if found.unknown:
        return Outcome(State.UNKNOWN, f"not all could be looked at: {'; '.join(found.unknown)}", "", others)
    return Outcome(State.OK, "others run beside ours" if others else "no other BPF programs", "", others)


def _check_docker(surroundings: Surroundings) -> Outcome:
    wanted = surroundings.settings.docker
    if wanted == "off":
        return ok("off (--docker off)")
    try:
        endpoint = engine.find_endpoint(engine.list_candidates(wanted, surroundings.environ))
        asked = engine.Engine(endpoint, surroundings.environ)
        try:
            count = len(asked.list_running())
        finally:
            asked.close()
    except engine.EngineError as error:
        if error.kind == "absent" and wanted == "auto":
            return ok("no engine; splicer looks for one until it is there")
        if error.kind == "refused" and surroundings.uid != 0:
            return unknown(error.message, AS_ROOT)
        return warn(error.message, error.hint)
    return ok(f"{endpoint}: {plural(count, 'container')}")


def list_checks() -> Iterator[Check]:
    """In the order in which they are looked at."""
    yield Check("daemon", _check_daemon, is_needed=False)
    yield Check("leftovers", _check_leftovers, is_needed=False)
    yield Check("neighbours", _check_neighbours, is_needed=False, privileged=True)
    yield Check("docker", _check_docker, is_needed=False)
