# SPDX-License-Identifier: Apache-2.0
"""The containers that run here: what events hint at, what a list tells, and what the kernel says of each.

An inventory is a mapping of ids to containers that never changes; another one takes its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType

from splicer.containers.engine import Event, InspectedContainer, ListedContainer
from splicer.host import namespaces
from splicer.host.scopes import Scopes
from splicer.model import Container

Inventory = Mapping[str, Container]

EMPTY: Inventory = MappingProxyType({})

# With more hints than this at once, asking for the list is cheaper.
MOST_DIRTY = 32


class Hint(IntEnum):
    """What an event says of a container, the weakest first."""

    ENDED = 0  # it may not run any more
    MOVED = 1  # it may be in other networks
    STARTED = 2  # it may run, or be called otherwise


_HINTS = {
    **dict.fromkeys(("die", "died", "destroy", "remove", "cleanup"), Hint.ENDED),
    **dict.fromkeys(("connect", "disconnect"), Hint.MOVED),
}


@dataclass(frozen=True)
class Hints:
    """What to ask about: containers, in the order of the hints, each with its strongest; or everything."""

    dirty: Mapping[str, Hint] = field(default_factory=dict)
    everything: bool = False

    def __bool__(self) -> bool:
        return bool(self.dirty) or self.everything


NO_HINTS = Hints()


def collect_hints(events: Iterable[Event], before: Hints = NO_HINTS) -> Hints:
    """Add what events hint at to the work there was. It never grows beyond MOST_DIRTY containers.

    An event says that a container may have changed, and not what it is now; so it does not matter which of
    them come twice, late, in another order or not at all.
    """
    if before.everything:
        return before
    dirty = dict(before.dirty)
    for event in events:
        hint = _HINTS.get(event.action, Hint.STARTED)
        dirty[event.container] = max(hint, dirty.get(event.container, hint))
        if len(dirty) > MOST_DIRTY:
            return Hints(everything=True)
    return Hints(dirty)


def sort_by_need(
    dirty: Mapping[str, Hint], inventory: Inventory, is_current: Callable[[Container], bool]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the containers hinted at: which to inspect, and which are gone without anybody having to be asked.

    The engine answers questions about a container only when it is through with starting or ending it, and
    whoever is next in line waits. So it is not asked about those that are about to start or have ended.
    """
    asked: dict[str, None] = {}
    gone = []
    for identifier, hint in dirty.items():
        known = inventory.get(identifier)
        if hint is Hint.ENDED and known is not None and is_complete(known) and not is_current(known):
            gone.append(identifier)
        elif hint is Hint.STARTED or known is not None:
            asked[identifier] = None
            if known is not None:
                # Whoever lives in its network namespace has moved along.
                modes = (f"container:{identifier}", f"container:{known.name}")
                asked |= dict.fromkeys(each.id for each in inventory.values() if each.network_mode in modes)
    return tuple(asked), tuple(gone)


def merge(inventory: Inventory, found: Iterable[Container], gone: Iterable[str]) -> Inventory:
    """The inventory with containers as they were found, and without those that are gone.

    The very same object if that makes no difference.
    """
    merged = {**inventory, **{each.id: each for each in found}}
    for each in gone:
        merged.pop(each, None)
    return inventory if merged == inventory else MappingProxyType(merged)


def find_changed(
    inventory: Inventory,
    listed: Iterable[ListedContainer],
    known: Mapping[str, int],
    is_current: Callable[[Container], bool],
) -> dict[str, int]:
    """Which of the listed containers to inspect, with their fingerprints: new ones, and those that changed.

    `known` are the fingerprints that belong to what the inventory says. `is_current` tells whether the host
    still agrees with it.
    """
    return {
        each.id: each.fingerprint
        for each in listed
        if known.get(each.id) != each.fingerprint
        or (container := inventory.get(each.id)) is None
        or not is_current(container)
    }


def is_complete(container: Container) -> bool:
    """Was everything found that policy needs? A container that just started or ends may lack some of it."""
    return bool(container.cgroup_id and container.netns)


def is_current(container: Container) -> bool:
    """Does its process live, in the cgroup it had? A restart makes another process and another cgroup."""
    try:
        return (
            is_complete(container)
            and os.stat(container.cgroup).st_ino == container.cgroup_id
            and os.path.exists(f"/proc/{container.pid}")
        )
    except OSError:
        return False


def locate(inspected: InspectedContainer, scopes: Scopes) -> Container:
    """Add what the kernel says to what the engine says: cgroup, network namespace, addresses."""
    container = Container(
        id=inspected.id,
        name=inspected.name,
        image=inspected.image,
        labels=inspected.labels,
        annotations=inspected.annotations,
        pod=inspected.pod,
        pid=inspected.pid,
        network_mode=inspected.network_mode,
        published=inspected.published,
    )
    place = scopes.find_container(inspected.id, inspected.pid)
    if place is not None:
        container = replace(container, cgroup=place.path, cgroup_id=place.id)
    path = f"/proc/{inspected.pid}/ns/net"
    with contextlib.suppress(OSError):
        netns, addresses = namespaces.read_cookie(path), namespaces.read_addresses(path)
        # Looked at last: the pid may have been the container's before it was another's, never the other way
        # round.
        if scopes.holds(place, inspected.id, inspected.pid):
            container = replace(container, netns=netns, addresses=addresses)
    return container
