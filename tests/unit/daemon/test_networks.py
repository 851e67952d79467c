# SPDX-License-Identifier: Apache-2.0
"""When networks are looked at, and what was lost: with views that are made up."""

from __future__ import annotations

import ipaddress
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from splicer.daemon import networks
from splicer.daemon.networks import (
    DEAF_PERIOD_S,
    HEARING_PERIOD_S,
    HINT_PAUSE_S,
    REPEAT_S,
    NetworkEye,
    NetworkWatcher,
    compare,
)
from splicer.host.networks import Network
from splicer.kernel.layout import pack_place
from splicer.kernel.sweep import NO_LOSSES, Losses
from splicer.logs import Logger


def pack(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


A, B, C = map(pack, ("10.0.0.1", "fd00::1", "10.0.0.2"))
FULL = Network({A: True, B: True}, True)


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        (FULL, NO_LOSSES),
        (Network({A: True, B: True, C: True}, True), NO_LOSSES),
        (Network({A: False, B: True}, True), Losses(cut=frozenset({pack_place(7, A)}))),
        (Network({B: True}, True), Losses(removed=frozenset({pack_place(7, A)}))),
        (Network({}, True), Losses(removed=frozenset({pack_place(7, A), pack_place(7, B)}))),
        (Network({A: True, B: True}, False), Losses(silent=frozenset({7}))),
    ],
)
def test_what_a_namespace_has_lost(after: Network, lost: Losses) -> None:
    assert compare(7, FULL, after) == lost
    assert bool(lost) == (lost != NO_LOSSES)
    if lost:
        assert compare(7, after, FULL) == NO_LOSSES, "what comes is no loss"


def test_a_link_that_was_down_before_is_not_lost() -> None:
    """There are addresses on links that are never up, as those of services in IPVS."""
    assert compare(7, Network({A: False}, True), Network({A: False}, True)) == NO_LOSSES
    assert compare(7, Network({A: False}, True), Network({}, True)).removed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class View:
    """Namespaces by cookie, as they look; and what there is to hear."""

    def __init__(self, cpu: Clock, hears: bool = True) -> None:
        self.hears = hears
        self.is_full = self.is_closed = False
        self.cpu = cpu
        self.cost = 0.0
        self.namespaces: dict[int, Network] = {}
        self.admitted: set[int] = set()
        self.news: set[int] = set()
        self.looks: list[int] = []
        self.error: OSError | None = None
        self._fd = os.eventfd(0)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        self.is_closed = True
        os.close(self._fd)

    def admit(self, cookie: int, path: str) -> bool:
        assert path == f"/{cookie}"
        self.admitted.add(cookie)
        return True

    def hear(self) -> set[int]:
        heard, self.news = self.news, set()
        return heard

    def look(self, cookie: int) -> Network | None:
        if cookie not in self.admitted:
            return None
        self.looks.append(cookie)
        self.cpu.now += self.cost
        if self.error is not None:
            raise self.error
        return self.namespaces.get(cookie)


class Directory:
    def __init__(self) -> None:
        self.asked: list[tuple[int, set[int]]] = []
        self.unknown: set[int] = set()

    def find(self, cookie: int, pids: Iterable[int] = ()) -> str | None:
        self.asked.append((cookie, set(pids)))
        return None if cookie in self.unknown else f"/{cookie}"


class Scene:
    def __init__(self, hears: bool = True) -> None:
        self.clock, self.cpu, self.directory = Clock(), Clock(), Directory()
        self.views: list[View] = []
        self.hears = hears
        self.eye = NetworkEye(self._open, self.directory, self.clock, self.cpu)

    def _open(self) -> View:
        made = View(self.cpu, self.hears)
        if self.views:
            made.namespaces = self.view.namespaces
        self.views.append(made)
        return made

    @property
    def view(self) -> View:
        return self.views[-1]

    def keep(self, *cookies: int) -> None:
        for cookie in cookies:
            self.view.namespaces.setdefault(cookie, FULL)
        self.eye.keep({cookie: {cookie * 10} for cookie in cookies})
        assert not self.eye.work()

    def tell(self, *cookies: int) -> None:
        self.view.news |= set(cookies)
        self.eye.hear()

    def go_to(self, now: float) -> Losses:
        """Work whenever something is due, until then; all that was lost."""
        found = NO_LOSSES
        while self.eye.deadline <= now:
            self.clock.now = max(self.clock.now, self.eye.deadline)
            found |= self.eye.work()
        self.clock.now = now
        return found


@pytest.fixture
def scene() -> Scene:
    return Scene()


LOST = Losses(cut=frozenset({pack_place(1, A)}))
CUT = Network({A: False, B: True}, True)


def test_who_is_new_is_looked_at_at_once(scene: Scene) -> None:
    assert scene.eye.deadline == math.inf
    scene.keep(1, 2)
    assert sorted(set(scene.view.looks)) == [1, 2] and scene.eye.seen == {1, 2}
    assert (1, {10}) in scene.directory.asked


def test_one_look_follows_several_hints(scene: Scene) -> None:
    scene.keep(1, 2)
    scene.view.looks.clear()
    begun = scene.clock.now
    scene.view.namespaces[1] = CUT
    scene.tell(1)
    scene.clock.now += HINT_PAUSE_S / 2
    scene.tell(1)
    assert scene.eye.deadline == begun + HINT_PAUSE_S
    assert not scene.eye.work() and not scene.view.looks
    assert scene.go_to(begun + HINT_PAUSE_S) == LOST
    assert scene.view.looks == [1]


def test_news_of_others_are_no_hint(scene: Scene) -> None:
    scene.keep(1)
    due = scene.eye.deadline
    scene.tell(2)
    assert scene.eye.deadline == due


@pytest.mark.parametrize(("hears", "period"), [(True, HEARING_PERIOD_S), (False, DEAF_PERIOD_S)])
def test_what_nobody_told_of_is_found(hears: bool, period: float) -> None:
    scene = Scene(hears)
    scene.keep(1)
    scene.view.namespaces[1] = CUT
    begun = scene.clock.now
    assert not scene.go_to(begun + period - 0.01)
    assert scene.go_to(begun + period) == LOST


def test_a_loss_is_said_twice(scene: Scene) -> None:
    """The second time is for those who were just about to be spliced."""
    scene.keep(1)
    scene.view.namespaces[1] = CUT
    scene.tell(1)
    begun = scene.clock.now + HINT_PAUSE_S
    assert scene.go_to(begun) == LOST
    assert not scene.go_to(begun + REPEAT_S - 0.01)
    assert scene.go_to(begun + REPEAT_S) == LOST
    assert not scene.go_to(begun + 100)


def test_a_loss_that_is_seen_in_parts(scene: Scene) -> None:
    """All of it is said a second time."""
    scene.keep(1)
    both = Losses(removed=frozenset({pack_place(1, B)}), cut=frozenset({pack_place(1, A)}))
    for seen in (CUT, Network({A: False}, True), Network({A: False, C: True}, True)):
        scene.view.namespaces[1] = seen
        scene.tell(1)
        scene.go_to(scene.clock.now + HINT_PAUSE_S)
    assert scene.go_to(scene.clock.now + REPEAT_S) == both


def test_not_if_it_is_back(scene: Scene) -> None:
    scene.keep(1)
    scene.view.namespaces[1] = CUT
    scene.tell(1)
    assert scene.go_to(scene.clock.now + HINT_PAUSE_S) == LOST
    scene.view.namespaces[1] = FULL
    scene.tell(1)
    assert not scene.go_to(scene.clock.now + 100)
    scene.view.namespaces[1] = CUT
    scene.tell(1)
    assert scene.go_to(scene.clock.now + HINT_PAUSE_S) == LOST, "it is lost a second time"


def test_down_for_a_moment_that_nobody_has_seen(scene: Scene) -> None:
    scene.keep(1)
    scene.tell(1)
    assert not scene.go_to(scene.clock.now + 100)


def test_who_is_not_kept_is_not_looked_at(scene: Scene) -> None:
    scene.keep(1, 2)
    scene.keep(2)
    scene.view.looks.clear()
    scene.go_to(scene.clock.now + 100)
    assert set(scene.view.looks) == {2}
    scene.view.namespaces[1] = CUT
    scene.keep(1, 2)  # nothing is lost: it is as if it had never been seen
    assert scene.eye.seen == {1, 2}


def test_one_that_cannot_be_found_is_looked_for_again(scene: Scene) -> None:
    scene.directory.unknown.add(1)
    scene.keep(1)
    assert scene.eye.seen == frozenset()
    scene.directory.unknown.clear()
    scene.go_to(scene.clock.now + HEARING_PERIOD_S)
    assert scene.eye.seen == {1}


def test_a_look_that_fails_says_nothing(scene: Scene) -> None:
    scene.keep(1)
    scene.view.error = OSError(11, "busy")
    scene.tell(1)
    assert not scene.go_to(scene.clock.now + 1)
    scene.view.error = None
    scene.view.namespaces[1] = CUT
    assert scene.go_to(scene.clock.now + HEARING_PERIOD_S) == LOST


def test_a_view_that_is_full_is_replaced(scene: Scene) -> None:
    """What was seen still holds, and what happens meanwhile is found."""
    scene.keep(1, 2)
    scene.view.is_full = True
    scene.view.namespaces |= {1: CUT, 3: FULL}
    scene.eye.keep({1: set(), 2: set(), 3: set()})
    assert scene.go_to(scene.clock.now) == LOST
    assert len(scene.views) == 2 and scene.views[0].is_closed
    assert scene.view.admitted == {1, 2, 3}


@pytest.mark.parametrize("hears", [True, False])
def test_share_of_a_cpu(hears: bool) -> None:
    """Many namespaces, and news all the time."""
    scene = Scene(hears)
    scene.keep(*range(1, 301))
    scene.view.cost = 0.0002
    begun, spent = scene.clock.now, scene.cpu.now
    for _ in range(1000):
        scene.tell(1, 2, 3)
        scene.go_to(scene.clock.now + 0.1)
    assert scene.cpu.now - spent < 2.5 * networks.LOOK_SHARE * (scene.clock.now - begun)


class Log:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def __getattr__(self, _level: str) -> Callable[..., None]:
        return lambda event, **keys: self.warnings.append(f"{event} {keys.get('error', '')}")


class World:
    """A watcher at work, with the view that it has opened."""

    def __init__(self) -> None:
        self.log, self.lost = Log(), threading.Event()
        self.view = View(Clock())
        log: Logger = self.log
        self.watcher = NetworkWatcher(self.lost.set, log, open_view=lambda: self.view, directory=Directory())

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            threading.Event().wait(0.01)
        raise AssertionError("not within 10 s")

    def wait_seen(self, *cookies: int) -> None:
        self.wait(lambda: self.watcher.describe()["namespaces"] == list(cookies))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.view.namespaces = {1: FULL, 2: FULL, 3: FULL}
    with made.watcher:
        yield made
    assert made.view.is_closed


def test_the_thread_tells_of_a_loss(world: World) -> None:
    world.watcher.attend((1, 2), (11, 0))
    world.wait_seen(1, 2)
    assert world.watcher.describe()["state"] == "hears"
    world.view.namespaces[1] = CUT
    world.view.news = {1}
    os.eventfd_write(world.view.fileno(), 1)
    assert world.lost.wait(10)
    assert world.watcher.take() == LOST
    world.wait(lambda: world.watcher.take() == LOST)  # once more
    assert not world.watcher.take()


def test_who_was_attended_to_just_now_is_kept_once(world: World) -> None:
    """It may be spliced since the others were listed."""
    world.watcher.attend((1, 2), (0, 0))
    world.watcher.keep({})
    world.wait_seen(1, 2)
    world.watcher.keep({2: set(), 3: set()})
    world.wait_seen(2, 3)
    world.watcher.attend((0, 2), (5, 5))  # the first one is not known
    world.wait_seen(2, 3)


def test_more_than_can_be_watched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are watched already stay, and it is said once."""
    monkeypatch.setattr(networks, "MOST_NAMESPACES", 2)
    world.watcher.attend((2, 2), (0, 0))
    for _ in range(2):
        world.watcher.keep({1: set(), 3: set(), 2: set()})
        world.wait_seen(1, 2)
    assert world.log.warnings == ["networks_not_watched there are more than 2"]


def test_without_a_view() -> None:
    """Everything else goes on, and the log and `status` say so."""
    log, failed = Log(), OSError(1, "not permitted")

    def fail() -> View:
        raise failed

    named: Logger = log
    watcher = NetworkWatcher(lambda: None, named, open_view=fail, directory=Directory())
    with watcher:
        for _ in range(1000):
            if watcher.describe()["state"] == "unavailable":
                break
            threading.Event().wait(0.01)
        watcher.attend((1, 2), (0, 0))
    assert watcher.describe() == {"state": "unavailable", "namespaces": []}
    assert log.warnings == ["networks_not_watched [Errno 1] not permitted"]
